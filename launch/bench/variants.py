"""The four variants of a cell on one model: `bare`, `mezo`, `sequential`, `fan_out`."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional

from bench.cells import ADAPTERS, DTYPES, SHAPES, Cell, deepspeed_config
from bench.mezo import Mezo
from zoscale.config import ModelConfig
from zoscale.data.batch import IGNORED, MicroBatch
from zoscale.engine import ZeroOrderEngine
from zoscale.estimators import TwoPoint
from zoscale.forward.sequential import Forward, SequentialForward
from zoscale.models.answers import AnswerModel
from zoscale.models.loading import add_adapter, load_model, read_model_config
from zoscale.models.sizes import ModelSize, count_parameters
from zoscale.optim import JaguarSignSGD
from zoscale.probes import Block, Gaussian, Rademacher
from zoscale.runtime import Runtime, read_deepspeed_config, start
from zoscale.shards import order_gathers_after_writes

_LR = 1e-7  # so small that a hundred steps leave a random model's loss finite
PROBES = {"block": Block(rows=0.1, columns=0.1), "rademacher": Rademacher(), "gaussian": Gaussian()}
"""By their names in a cell."""


@dataclass(frozen=True)
class Bench:
    """A model and its variants.

    Args:
        engine: holds the model.
        steps: by name of the variant, one step of it.
    """

    engine: ZeroOrderEngine
    steps: dict[str, Callable[[], None]]


def build(cell: Cell) -> Bench:
    """The cell's model with random weights and its variants; joins the other ranks."""
    config = ModelConfig(config=SHAPES[cell.model], dtype=DTYPES[cell.dtype])
    architecture = read_model_config(config)
    size = count_parameters(architecture)
    torch.set_num_threads(cell.threads)
    torch.manual_seed(cell.seed)
    engine = _engine(cell, config, architecture, size)
    batches = [MicroBatch.from_labels(_rows(cell, rank, architecture.vocab_size)) for rank in range(cell.ranks)]
    fan_out = engine.forward
    sequential = SequentialForward(fan_out.model, engine.shards, engine.mesh)  # type: ignore[attr-defined]
    for forward in (sequential, fan_out):
        engine.forward = forward
        engine.rehearse(batches)
    steps = {
        "bare": _bare(engine, batches[engine.mesh.rank].to(engine.mesh.device), 2 * cell.q),
        "mezo": _mezo(engine, _rows(cell, engine.mesh.rank, architecture.vocab_size), cell),
        "sequential": _engine_step(engine, sequential, batches),
        "fan_out": _engine_step(engine, fan_out, batches),
    }
    return Bench(engine, steps)


def _engine(cell: Cell, config: ModelConfig, architecture: object, size: ModelSize) -> ZeroOrderEngine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = None
    if cell.ranks > 1:
        deepspeed = read_deepspeed_config(deepspeed_config(torch.cuda.is_available()))
        runtime = Runtime(dtype=config.dtype, deepspeed=deepspeed, threads=cell.threads)
        accelerator = start(runtime, size=size)
        model = add_adapter(load_model(config, architecture), ADAPTERS[cell.scheme])
    else:
        with device:
            model = add_adapter(load_model(config, architecture), ADAPTERS[cell.scheme])
        model.to(device)
    return ZeroOrderEngine(
        model,
        accelerator=accelerator,
        optimizer=lambda shards, mesh: JaguarSignSGD(shards, mesh, lr=_LR),
        probe=PROBES[cell.probe],
        estimator=TwoPoint(num_directions=cell.q, tau=1e-3),
        seed=cell.seed,
        master=cell.master,  # type: ignore[arg-type]
        forward="fan_out",
        compile=cell.compile,  # type: ignore[arg-type]
    )


def _rows(cell: Cell, rank: int, vocabulary: int) -> dict[str, Tensor]:
    """Random tokens [batch, tokens], the last one of each row labelled; others for each rank."""
    generator = torch.Generator().manual_seed(cell.seed * 1_000_003 + rank)
    ids = torch.randint(4, vocabulary, (cell.batch, cell.tokens), generator=generator)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels}


def _bare(engine: ZeroOrderEngine, own: MicroBatch, copies: int) -> Callable[[], None]:
    """The model's own forward of all K x B rows at once, the head on one contiguous matrix of answer positions."""
    rows = own.repeat(copies)
    answers = AnswerModel(engine.answers.module, engine.answers.model, wide_logits=False)

    @torch.no_grad()
    def step() -> None:
        answers.answer_logprobs(rows)

    return step


def _engine_step(engine: ZeroOrderEngine, forward: Forward, batches: list[MicroBatch]) -> Callable[[], None]:
    """A whole step: noise, losses and update."""

    def step() -> None:
        engine.forward = forward
        if engine.step(batches).skipped:
            raise RuntimeError("expected finite losses, got one that is not: the step was not a whole one")

    return step


def _mezo(engine: ZeroOrderEngine, rows: dict[str, Tensor], cell: Cell) -> Callable[[], None]:
    """MeZO's step with the logits of all positions, on the same weights."""
    mesh, numbers = engine.mesh, count(1)
    ids, labels = (rows[name].to(mesh.device) for name in ("input_ids", "labels"))

    def loss() -> float:
        order_gathers_after_writes(engine.answers.module)
        engine.model.eval()
        logits = engine.answers.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        own = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return float(mesh.gather_items(own.double().view(1, 1), cell.ranks).mean())

    mezo = Mezo(engine.shards, loss, lr=_LR, num_directions=cell.q, rank=mesh.rank)

    def step() -> None:
        mezo.step(next(numbers))

    return step
