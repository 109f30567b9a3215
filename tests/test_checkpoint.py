"""Checkpoints and fingerprints on plain tensors; real ranks are in test_recovery.py."""

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zoscale import provenance
from zoscale.agreement import check_agreement
from zoscale.config import ConfigError
from zoscale.data.batch import MicroBatch
from zoscale.engine import ZeroOrderEngine
from zoscale.fingerprint import Diverged, check_replicas, checksum, of_model
from zoscale.mesh import Mesh
from zoscale.objectives import language_modeling
from zoscale.optim import JaguarMuon, JaguarSignSGD, ZeroOrderOptimizer
from zoscale.recovery import checkpoint
from zoscale.recovery.manifest import Manifest, complete, crc32, keep_last, name_of, read_manifest
from zoscale.recovery.resume import record_of, replay, restore
from zoscale.shards import local_slices


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model("opt", tmp_path_factory.mktemp("model"))


def engine_of(
    model_dir: Path, optimizer: type[ZeroOrderOptimizer] = JaguarSignSGD, dtype: torch.dtype = torch.float32
) -> ZeroOrderEngine:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    return ZeroOrderEngine(model, optimizer=lambda shards, mesh: optimizer(shards, mesh, lr=1e-3), seed=3)


def weights(engine: ZeroOrderEngine) -> list[torch.Tensor]:
    return [shard.truth.clone() for shard in engine.shards]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [JaguarSignSGD, JaguarMuon])
def test_weights_and_state_come_back(
    model_dir: Path, tmp_path: Path, optimizer: type[ZeroOrderOptimizer], dtype: torch.dtype
) -> None:
    """Pitfall 17: the steps after a checkpoint are those of the run that went on, momentum and seeds included."""
    engine = engine_of(model_dir, optimizer, dtype)
    for step in range(3):
        engine.step(tiny.batch(step))
    checkpoint.save(engine, tmp_path / "c", "hash")
    other = engine_of(model_dir, optimizer, dtype)
    checkpoint.load(other, tmp_path / "c", "hash")
    assert other.num_steps == 3
    assert equal([shard.live for shard in engine.shards], [shard.live for shard in other.shards]), "what a model reads"
    for step in range(3, 5):
        engine.step(tiny.batch(step))
        other.step(tiny.batch(step))
    assert equal(weights(engine), weights(other))
    assert not list(tmp_path.glob("*.tmp"))


def test_replay_takes_the_steps_without_a_forward(model_dir: Path) -> None:
    """Also a skipped one; the learning rate is the recorded one, and is put back."""
    engine = engine_of(model_dir)
    records = []
    for step in range(5):
        engine.optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        engine.objective = not_finite if step == 2 else language_modeling
        records.append(record_of(engine.step(tiny.batch(step))))
    other = engine_of(model_dir)
    other.forward = None  # type: ignore[assignment]
    replay(other, records)
    assert equal(weights(engine), weights(other))
    assert other.optimizer.param_groups[0]["lr"] == 1e-3
    assert [record.skipped for record in records] == [False, False, True, False, False]
    with pytest.raises(ValueError, match="expected step 5 in the journal, got 0"):
        replay(other, records)


def not_finite(logprobs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return logprobs.sum() * float("nan"), torch.tensor(1.0)


def split(folder: Path, parts: int) -> None:
    """Rewrite a one-file checkpoint as `parts` files with odd borders, as other shard sizes would have."""
    manifest = read_manifest(folder)
    whole = load_file(folder / manifest.files[0].name)
    files = []
    for part in range(parts):
        tensors, slices = {}, {}
        for key, value in whole.items():
            name = key.split("/", 1)[1]
            size = -(-len(value) // parts)
            start, stop = min(part * size, len(value)), min((part + 1) * size, len(value))
            if start < stop:
                tensors[key] = value[start:stop].clone()
                slices[name] = {"offset": start, "length": stop - start}
        path = folder / f"rank_{part:05d}.safetensors"
        save_file(tensors, path)
        files.append({"name": path.name, "num_bytes": path.stat().st_size, "crc32": crc32(path), "slices": slices})
    tree = json.loads((folder / "manifest.json").read_text()) | {"files": files}
    (folder / "manifest.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_any_number_of_files_gives_the_same_weights(model_dir: Path, tmp_path: Path, parts: int) -> None:
    engine = engine_of(model_dir)
    engine.step(tiny.batch(0))
    checkpoint.save(engine, tmp_path / "c", "hash")
    split(tmp_path / "c", parts)
    other = engine_of(model_dir)
    checkpoint.load(other, tmp_path / "c", "hash")
    engine.step(tiny.batch(1))
    other.step(tiny.batch(1))
    assert equal(weights(engine), weights(other))


def test_names_in_a_file_are_asked_for_once(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time they are made into a list of all: with thousands of tensors that took most of a resume."""
    engine, asked = engine_of(model_dir), list[str]()
    checkpoint.save(engine, tmp_path / "step_00000000", "hash")
    open_ = checkpoint.safe_open

    class Counted:
        def __init__(self, path: Path, **options: Any) -> None:
            self.file = open_(path, **options)
            self.get_slice = self.file.get_slice

        def keys(self) -> list[str]:
            asked.append("keys")
            return list(self.file.keys())

    monkeypatch.setattr(checkpoint, "safe_open", Counted)
    checkpoint.load(engine, tmp_path / "step_00000000", "hash")
    assert len(engine.shards) > 1 and len(asked) == 1


def test_a_checkpoint_is_read_to_the_host(model_dir: Path, tmp_path: Path) -> None:
    """A GPU that weights and state fill has no room for them once more: resumed, or brought back to its best step."""
    engine = engine_of(model_dir)
    engine.step(tiny.batch(0))
    checkpoint.save(engine, tmp_path / "c", "hash")
    other = engine_of(model_dir)
    for shard in other.shards:
        shard.truth = shard.truth.to("meta")  # another device, of which nothing can be read
    manifest = read_manifest(tmp_path / "c")
    found = list(checkpoint._read_all(other, tmp_path / "c", manifest, "hash"))
    assert equal([truth for truth, _ in found], weights(engine))
    for shard, (_, state) in zip(engine.shards, found, strict=True):
        assert torch.equal(state["momentum"], engine.optimizer.state_of(shard)["momentum"])


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / "manifest.json").read_text())
        change(tree)
        (folder / "manifest.json").write_text(json.dumps(tree))

    return apply


def first_slice(tree: dict[str, Any]) -> dict[str, int]:
    slices: dict[str, dict[str, int]] = tree["files"][0]["slices"]
    return slices[min(slices)]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "another run": (changed(lambda t: t.update(config_hash="other")), "configuration"),
    "another shape": (changed(lambda t: t["shapes"].update({min(t["shapes"]): [1]})), "another model"),
    "another tensor": (changed(lambda t: t["shapes"].update(more=[1])), "another model"),
    "a gap": (changed(lambda t: first_slice(t).update(length=1)), "of shape"),
    "no files": (changed(lambda t: t.update(files=[])), "do not cover"),
    "a path": (changed(lambda t: t["files"][0].update(name="../x.safetensors")), "pattern"),
    "another step": (changed(lambda t: t.update(step=2)), "step 2"),
    "a later format": (changed(lambda t: t.update(format=2)), "format 1"),
    "a negative number": (changed(lambda t: first_slice(t).update(offset=-1)), "greater than or equal to 0"),
    "a huge number": (changed(lambda t: first_slice(t).update(length=2**70)), "less than"),
    "a missing key": (changed(lambda t: t.pop("shapes")), "required"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "a checkpoint in"),
    "no json": (lambda folder: (folder / "manifest.json").write_text("["), "manifest.json"),
    "a flipped bit": (lambda folder: flip(folder / "rank_00000.safetensors", -3), "checksum"),
    "a pickle": (lambda folder: (folder / "rank_00000.safetensors").write_bytes(b"\x80\x04N."), "bytes instead of"),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_the_engine_left_as_it_was(model_dir: Path, tmp_path: Path, damage: str) -> None:
    engine = engine_of(model_dir)
    engine.step(tiny.batch(0))
    checkpoint.save(engine, tmp_path / name_of(1), "hash")
    apply, message = DAMAGE[damage]
    apply(tmp_path / name_of(1))
    other = engine_of(model_dir)
    before = weights(other)
    with pytest.raises(ConfigError, match=message):
        checkpoint.load(other, tmp_path / name_of(1), "hash")
    assert equal(before, weights(other))
    assert other.num_steps == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_fuzzed_manifests(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Arbitrary bytes, and a real manifest with pieces replaced: a manifest or a ConfigError."""
    folder = tmp_path_factory.mktemp("fuzz")
    good = json.dumps(
        {
            "step": 3, "config_hash": "h", "shapes": {"a": [2, 3]}, "state": ["momentum"], "scalars": {}, "format": 1,
            "files": [{"name": "rank_00000.safetensors", "num_bytes": 9, "crc32": 1,
                       "slices": {"a": {"offset": 0, "length": 6}}}],
        }
    ).encode()  # fmt: skip
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, len(good)))
    content = data.draw(
        st.one_of(st.binary(max_size=200), st.binary(max_size=8).map(lambda b: good[:start] + b + good[stop:]))
    )
    (folder / "manifest.json").write_bytes(content)
    try:
        assert isinstance(read_manifest(folder), Manifest)
    except ConfigError as error:
        assert str(folder) in str(error)  # noqa: PT017
    finally:
        shutil.rmtree(folder)


def test_an_unfinished_write_is_not_seen_and_old_ones_are_removed(model_dir: Path, tmp_path: Path) -> None:
    engine = engine_of(model_dir)
    for step in (1, 2, 3):
        engine.num_steps = step
        checkpoint.save(engine, tmp_path / name_of(step), "hash")
    (tmp_path / "step_00000009.tmp").mkdir()
    (tmp_path / "step_00000008").mkdir()  # without a manifest
    (tmp_path / "step_x").mkdir()
    assert [step for step, _ in complete(tmp_path)] == [1, 2, 3]
    keep_last(tmp_path, 2)
    assert [step for step, _ in complete(tmp_path)] == [2, 3]


def test_a_write_that_fails_leaves_nothing(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model_dir)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(engine, tmp_path / "c", "hash")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checksum_adds_up_over_slices_and_sees_every_change(dtype: torch.dtype) -> None:
    whole = torch.randn(5003, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = checksum(whole, 0)
    for cut in (0, 1, 2500, 5003):
        assert (checksum(whole[:cut], 0) + checksum(whole[cut:], cut)) % 2**64 == total
    for place in (0, 1, 777, 5002):
        other = whole.clone()
        other.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[place] ^= 1
        assert checksum(other, 0) != total
    swapped = whole.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert checksum(swapped, 0) != total


def test_model_fingerprint_names_the_weights(model_dir: Path) -> None:
    one, two = engine_of(model_dir), engine_of(model_dir)
    assert of_model(one.model, one.mesh, trainable=True) == of_model(two.model, two.mesh, trainable=True)
    two.shards[3].truth[1] += 1
    two.shards[3].publish()
    assert of_model(one.model, one.mesh, trainable=True) != of_model(two.model, two.mesh, trainable=True)


class Others(Mesh):
    """A mesh whose other ranks say what the test wants."""

    def __init__(self, *others: Any, shard_size: int = 1) -> None:
        super().__init__(ranks=(0, 1 + len(others)), shard_size=shard_size)
        self.others = others

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_agreement_names_the_first_difference() -> None:
    same = {"optimizer.lr": 1e-3, "code": "1"}
    check_agreement(Others(same, same), same)
    with pytest.raises(ConfigError, match=r"the same code on all ranks, got '1' on rank 0 and '2' on rank 2"):
        check_agreement(Others(same, same | {"code": "2"}), same)
    with pytest.raises(ConfigError, match="the same more on all ranks"):
        check_agreement(Others(same | {"more": 1}), same)


def test_the_commit_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `+` if it was changed since; not that of a project that has the package installed beside its own code."""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def commit_in(folder: str) -> str:
        monkeypatch.setattr(provenance, "__file__", str(tmp_path / folder / "provenance.py"))
        return provenance.commit()

    for folder in ("zoscale", ".venv/zoscale"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "provenance.py").write_text("1\n")
    assert commit_in("zoscale") == "unknown", "outside a checkout"
    (tmp_path / ".gitignore").write_text(".venv\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert commit_in("zoscale") == git("rev-parse", "HEAD")[:12]
    assert commit_in(".venv/zoscale") == "unknown"
    git("tag", "v1")
    (tmp_path / "zoscale/provenance.py").write_text("2\n")
    assert commit_in("zoscale") == git("rev-parse", "HEAD")[:12] + "+"
    (tmp_path / "zoscale/COMMIT").write_text("abc")
    assert commit_in("zoscale") == "abc", "of a copy"


def test_another_base_model_in_a_replica_is_refused(model_dir: Path) -> None:
    engine = engine_of(model_dir)
    sums = [checksum(values, 0) for _, _, values in local_slices(engine.model, trainable=True)]
    assert of_model(engine.model, Others(sums), trainable=True) == of_model(engine.model, engine.mesh, trainable=True)
    with pytest.raises(ConfigError, match=f"the same {engine.specs[2].name} on all ranks"):
        of_model(engine.model, Others(sums, [*sums[:2], sums[2] ^ 1, *sums[3:]]), trainable=True)


def test_replicas_are_compared_by_group(model_dir: Path) -> None:
    engine = engine_of(model_dir)
    own = [checksum(shard.truth, 0) for shard in engine.shards]
    check_replicas(engine.shards, Others(own))
    wrong = [*own[:4], own[4] + 1, *own[5:]]
    with pytest.raises(Diverged, match=engine.specs[4].name):
        check_replicas(engine.shards, Others(own, wrong))


def test_an_engine_refuses_replicas_that_begin_with_other_weights(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As adapters do whose first values each rank draws for itself: every rank would train another model."""
    own = [checksum(shard.truth, 0) for shard in engine_of(model_dir).shards]
    for others in (own, [own[0] + 1, *own[1:]]):
        monkeypatch.setattr("zoscale.engine.place", lambda model, accelerator, others=others: (model, Others(others)))
        told = pytest.raises(Diverged, match=r"in replica 1 .from rank 1.: call torch.manual_seed on all ranks")
        with nullcontext() if others == own else told:
            engine_of(model_dir)


def test_a_checkpoint_beyond_the_journal_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """The journal has no scalars for the steps before it: the run could not be replayed."""
    engine = engine_of(model_dir)
    records = [record_of(engine.step(tiny.batch(step))) for step in range(2)]
    checkpoint.save(engine, tmp_path / name_of(2), "hash")
    for count in (2, 1):
        again = engine_of(model_dir)
        with nullcontext() if count == 2 else pytest.raises(ConfigError, match="step 1 or earlier, got step 2"):
            restore(again, tmp_path, records[:count], "hash", print, chosen=tmp_path / name_of(2))
