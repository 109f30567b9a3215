"""`zoscale export`: a finished run as an ordinary Hugging Face folder with its model card, and its upload."""

import argparse
import dataclasses
import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from zoscale.adapters.schemes import num_virtual_tokens
from zoscale.config import ConfigError
from zoscale.models.loading import load_model, load_tokenizer, read_model_config
from zoscale.release.export import ORIGIN, check_saved, read_origin
from zoscale.release.merging import merge
from zoscale.release.model_card import hub_id, model_card
from zoscale.release.run_record import RunRecord, check_base
from zoscale.run_directory import write_json, write_text

_BASE_KEY = "base_model_name_or_path"


def export_command(argv: Sequence[str]) -> int:
    """Write a run's result as PEFT or transformers load it, and push it if asked to.

    Returns:
        0.

    Raises:
        ConfigError: for a run that cannot be exported so.
        OSError: if the folder cannot be written, or the hub does not take it.
    """
    arguments = _parser().parse_args(argv)
    if arguments.private and not arguments.push:
        raise ConfigError("--push ID with --private", "none", "name the repository, or leave --private out")
    record = RunRecord.read(arguments.run, arguments.base)
    kind = "adapter" if arguments.adapter else "merged"
    if kind == "merged":  # an adapter is written without its base model
        check_base(record.config, arguments.base)
    _check(record, kind, arguments.push)
    summary = record.summary()
    out = Path(arguments.out) if arguments.out else record.directory.path / "export" / kind
    _check_folder(out)
    upload = _repository(arguments.push, private=arguments.private) if arguments.push else None
    name = arguments.push or out.resolve().name
    dtype = arguments.dtype or record.config.model.dtype
    try:
        card = model_card(record, summary, kind=kind, name=name, dtype=dtype)
    except (KeyError, TypeError) as error:  # of another version, or written by hand
        remedy = "remove it, and the run is finished anew"
        raise ConfigError(f"a whole summary in {record.directory.summary}", repr(error), remedy) from error
    write_export(record, out, kind=kind, dtype=dtype, card=card)
    print(f"{kind}: {out}")
    if upload is not None:
        print(f"pushed: {upload(out)}")
    return 0


def write_export(record: RunRecord, out: Path, *, kind: str, dtype: str, card: str) -> None:
    """Write the folder whole or not at all; an earlier export there is replaced.

    Args:
        record: of the run.
        out: the folder.
        kind: `adapter` or `merged`.
        dtype: of merged weights.
        card: text of README.md.

    Raises:
        ConfigError: if something else is there.
        OSError: if it cannot be written.
    """
    _check_folder(out)
    note = {"step": read_origin(record.directory.adapter), "config_hash": record.summary()["config_hash"]}
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent) as beside:
        aside = Path(beside) / out.name
        aside.mkdir()
        try:
            _WRITERS[kind](record, aside, dtype)
            write_text(aside / "README.md", card)
            write_json(aside / ORIGIN, {**note, "export": kind})
        except SafetensorError as error:  # a full disk comes as this
            raise OSError(errno.EIO, f"{out} could not be written: {error}") from error
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)


def _check_folder(out: Path) -> None:
    """Refuse to replace what is no export, and the working directory."""
    if Path.cwd().is_relative_to(out.resolve()):
        got = f"{out}, the working directory or one around it"
        raise ConfigError("a folder that can be replaced", got, "name a new one within it: --out NAME")
    if out.exists() and _kind_of(out) is None and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("a new folder, or one of an earlier export", str(out), "name another one with --out")


def _write_adapter(record: RunRecord, folder: Path, dtype: str) -> None:
    source = record.directory.adapter
    shutil.copy2(source / "adapter_model.safetensors", folder)
    options = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(record.config.model.id)
    options[_BASE_KEY] = str(Path(base).resolve()) if Path(base).exists() else base
    write_json(folder / "adapter_config.json", options)


def _write_merged(record: RunRecord, folder: Path, dtype: str) -> None:
    source, config = record.directory.adapter, record.config
    model_config = dataclasses.replace(config.model, dtype=cast(Any, dtype))
    if config.adapter is None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    else:
        model = merge(load_model(model_config, read_model_config(model_config)), source)
    model.save_pretrained(folder, safe_serialization=True)
    load_tokenizer(config.model).save_pretrained(folder)


_WRITERS: dict[str, Callable[[RunRecord, Path, str], None]] = {"adapter": _write_adapter, "merged": _write_merged}


def _check(record: RunRecord, kind: str, repo_id: str | None) -> None:
    config, adapter = record.config, record.directory.adapter
    if kind == "adapter" and config.adapter is None:
        raise ConfigError("a run with an adapter", "one that trained all weights", "export it with --merge")
    if kind == "merged" and num_virtual_tokens(config.adapter):
        got = f"{(config.adapter or {})['peft_type']}, whose virtual tokens are no weights of the model"
        raise ConfigError("an adapter that weights can take up", got, "export it with --adapter")
    if config.adapter is not None and config.model.id is None:
        got = "random weights (model.config)"
        raise ConfigError("a base model that others can load", got, "name it with --base")
    remedy = f"rebuild them: zoscale replay {record.directory.path} --out {adapter}"
    check_saved(adapter, is_adapter=config.adapter is not None, remedy=remedy)
    if repo_id is None:
        return
    validate_repo_id(repo_id)
    if kind == "adapter" and hub_id(config.model.id) is None:
        remedy = "name the base model's id on the hub with --base"
        raise ConfigError("a base model on the hub, to push an adapter for it", str(config.model.id), remedy)


def _repository(repo_id: str, *, private: bool) -> Callable[[Path], str]:
    """Make the repository if it is not there, before the long work; returns what uploads a folder to it."""
    from huggingface_hub import HfApi

    api = HfApi()
    made = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id

    def upload(folder: Path) -> str:
        message = "Upload by zoscale"
        return str(api.upload_folder(repo_id=made, folder_path=folder, commit_message=message).commit_url)

    return upload


def _kind_of(folder: Path) -> str | None:
    """What kind of export a folder is; None if it is none."""
    try:
        note: Mapping[str, Any] = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        return str(note["export"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoscale export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--merge", action="store_true", help="the whole model, for transformers")
    kind.add_argument("--adapter", action="store_true", help="the adapter alone, for PEFT")
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write (default: RUN/export/adapter or RUN/export/merged)"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="id or folder of the base model: if it has moved, or, with --merge, if it needs pickles or code of its "
        "own, to say that you trust it",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the merged weights (default: the run's); float32 adds the adapter without rounding",
    )
    parser.add_argument("--push", metavar="ID", help="upload to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="make a repository that is not there private")
    return parser
