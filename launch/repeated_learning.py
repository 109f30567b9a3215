"""Repeated learning (arXiv 2405.02726): a model is fine-tuned again and again on data that carry its own predictions.

python launch/repeated_learning.py [--out DIR] [--loops P,S ...] [--rounds R] [--steps N] [--seed SEED]

A loop has a usage p and an adherence s. The bundled OPT predicts a score of a sentence from its two options by
regression, m(x) = (log p(great) - log p(terrible)) / 2; the true score is +-1 (the label) plus noise. In each round new
users come: with probability p one takes the prediction, and what is recorded is normal around m(x) with standard
deviation s * (mean absolute residual of the model); else it is the true score. The model is fine-tuned on it by the
zero-order engine, and the residuals y - m(x) of held-out users are the round's. Writes loop_<P>_<S>.json, and of all
loops in DIR repeated_learning.json and repeated_learning.png. A finished loop is kept and not run again; the loops of a
DIR differ in P and S only.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoscale import provenance
from zoscale.cli import guarded
from zoscale.config import ConfigError, ModelConfig
from zoscale.data.batch import MicroBatch
from zoscale.data.splits import Encoder
from zoscale.engine import OptimizerFactory, ZeroOrderEngine
from zoscale.estimators import TwoPoint
from zoscale.models.loading import add_adapter, load_model, load_tokenizer, read_model_config
from zoscale.noise.generator import Domain, Key, Noise, Range
from zoscale.objectives import option_scores
from zoscale.optim import ZOSGD, JaguarMuon
from zoscale.probes import Block
from zoscale.run_directory import write_json
from zoscale.tasks import Classification, Example

ROOT = Path(__file__).parent
MODEL = ModelConfig(id=str(ROOT / "tiny_opt/model"), dtype="float32")
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
BATCH, HELD_OUT = 16, 0.4
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
"""Quantiles of 97.5 % of Student's t for 1, 2, ... degrees of freedom; the last serves for more."""
_SENTENCES, _NOISE, _USERS, _ORDER = range(4)  # what a draw is for


@dataclass(frozen=True)
class Settings:
    """Of a loop.

    Args:
        usage: p, probability that a user takes the prediction.
        adherence: s, spread around it in units of the mean absolute residual.
        rounds: of repeated learning.
        warmup: steps of JAGUAR Muon on true scores before it.
        steps: steps of ZO-SGD in a round.
        lr: of ZO-SGD.
        users: of a round; a share is held out for the residuals.
        noise: standard deviation of the true scores.
        seed: of everything.
    """

    usage: float
    adherence: float
    rounds: int
    warmup: int
    steps: int
    lr: float
    users: int
    noise: float
    seed: int

    def __post_init__(self) -> None:
        if not (0 <= self.usage <= 1 and 0 <= self.adherence < math.inf):
            raise ValueError(f"expected 0 <= P <= 1 and S >= 0 in --loops, got {self.usage:g},{self.adherence:g}")
        if any(float(f"{value:g}") != value for value in (self.usage, self.adherence)):  # they name files
            raise ValueError(f"expected at most six digits in --loops, got {self.usage},{self.adherence}")
        numbers = (0 < self.lr < math.inf, 0 <= self.noise < math.inf, 0 <= self.seed < 2**64)
        if min(self.rounds, self.warmup, self.steps) < 1 or self.users < 2 * BATCH or not all(numbers):
            least = f"rounds, warmup, steps >= 1, users >= {2 * BATCH}, lr > 0, noise and seed >= 0, all finite"
            raise ValueError(f"expected {least}, got {self}")


@dataclass(frozen=True, kw_only=True)
class ScoredBatch(MicroBatch):
    """A micro-batch with the score of each example.

    Args:
        target: float64 [num_examples].
    """

    target: Tensor


def predicted(logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """m(x) of each example: float64 [num_examples]."""
    terrible, great = option_scores(logprobs, batch).view(-1, 2).unbind(1)
    return (great - terrible) / 2


def squared_error(logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The engine's objective: (m(x) - y)^2 per example."""
    assert isinstance(batch, ScoredBatch), "made by World.batch"
    loss = (predicted(logprobs, batch) - batch.target.to(logprobs.device)).square().sum()
    return loss, torch.tensor(float(batch.num_examples), dtype=torch.float64, device=loss.device)


class World:
    """Sentences with true scores, and the model that learns them."""

    def __init__(self, settings: Settings) -> None:
        task = Classification(
            path=str(ROOT / "tiny_opt/data"), template="{sentence} It was", candidates=[" terrible", " great"]
        )
        self.settings = settings
        self.train, self.validation = task.examples("train"), task.examples("validation")
        self.noise = Noise(settings.seed)
        self.encoder = Encoder(load_tokenizer(MODEL), 64)
        torch.manual_seed(settings.seed)  # LoRA's A
        model = add_adapter(load_model(MODEL, read_model_config(MODEL)), ADAPTER)
        self.engine = ZeroOrderEngine(
            model,
            probe=Block(rows=0.5, columns=0.5),
            estimator=TwoPoint(tau=1e-2, num_directions=2),
            objective=squared_error,
            seed=settings.seed,
        )

    def sentences(self, number: int) -> list[Example]:
        """The users of a round."""
        lanes = [(lane, len(self.train)) for lane in range(self.settings.users)]
        return [self.train[i] for i in self.noise.integers(Key(number, _SENTENCES, Domain.DATA), lanes)]

    def recorded(self, number: int, examples: Sequence[Example], scale: float) -> Tensor:
        """The scores of a round's users, in which the model's predictions have a share: float64 [users].

        Args:
            number: of the round; round 0 has true scores only.
            examples: the users' sentences.
            scale: mean absolute residual of the model so far.
        """
        ranges = [Range(0, 0, len(examples))]
        (normal,) = self.noise.normal(Key(number, _NOISE, Domain.DATA), ranges)
        (chance,) = self.noise.uniform(Key(number, _USERS, Domain.DATA), ranges)
        truth = _labels(examples) + self.settings.noise * normal.double()
        if number == 0:
            return truth
        taken = self.predict(examples) + self.settings.adherence * scale * normal.double()
        return torch.where(chance.double() < self.settings.usage, taken, truth)

    def batch(self, examples: Sequence[Example], target: Tensor) -> ScoredBatch:
        """One micro-batch with both options of each sentence."""
        return ScoredBatch(**vars(self.encoder.micro_batch(examples, gold_only=False)), target=target)

    @torch.no_grad()
    def predict(self, examples: Sequence[Example]) -> Tensor:
        """m(x): float64 [n]."""
        parts = []
        for start in range(0, len(examples), 50):
            batch = self.encoder.micro_batch(examples[start : start + 50], gold_only=False)
            parts.append(predicted(self.engine.answers.answer_logprobs(batch), batch))
        return torch.cat(parts)

    def learn(self, examples: Sequence[Example], target: Tensor, rule: OptimizerFactory, steps: int) -> None:
        """Steps of a rule on random batches, with an lr that falls to 0."""
        self.engine.optimizer = rule(self.engine.shards, self.engine.mesh)
        scheduler = torch.optim.lr_scheduler.LinearLR(self.engine.optimizer, 1.0, 1 / steps, total_iters=steps)
        lanes = [(lane, len(examples)) for lane in range(BATCH)]
        for _ in range(steps):
            chosen = self.noise.integers(Key(self.engine.num_steps, _ORDER, Domain.DATA), lanes)
            result = self.engine.step(self.batch([examples[i] for i in chosen], target[chosen]))
            if result.skipped:
                raise FloatingPointError(f"step {result.step}: the loss is not finite; lower --lr or the adherence")
            scheduler.step()


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([2.0 * example.gold - 1 for example in examples], dtype=torch.float64)


def run_loop(settings: Settings) -> dict[str, Any]:
    """All rounds of a loop: what the residuals are in each."""
    world, rounds, scale = World(settings), [], 0.0
    started = time.perf_counter()
    for number in range(settings.rounds + 1):
        examples = world.sentences(number)
        scores = world.recorded(number, examples, scale)
        cut = int(len(examples) * (1 - HELD_OUT))
        if number == 0:
            world.learn(examples[:cut], scores[:cut], partial(JaguarMuon, lr=1.5e-2), settings.warmup)
        else:
            world.learn(examples[:cut], scores[:cut], partial(ZOSGD, lr=settings.lr), settings.steps)
        residuals = scores[cut:] - world.predict(examples[cut:])
        error = world.predict(world.validation) - _labels(world.validation)
        scale = float(residuals.abs().mean())
        rounds.append(describe(residuals) | {"error": float(error.square().mean().sqrt())})
        print(f"  round {number}: std {rounds[-1]['std']:.4f}, error {rounds[-1]['error']:.3f}", flush=True)
    facts = {"seconds": time.perf_counter() - started, "commit": provenance.commit(), **provenance.libraries()}
    return {"settings": asdict(settings), "verdict": verdict(rounds), **facts, "rounds": rounds}


def describe(residuals: Tensor) -> dict[str, Any]:
    """Moments of a round's residuals, and the residuals; a point has no kurtosis."""
    centred = residuals - residuals.mean()
    std = float(centred.square().mean().sqrt())
    return {
        "mean": float(residuals.mean()),
        "std": std,
        "mean_absolute": float(residuals.abs().mean()),
        "fourth_moment": float(residuals.pow(4).mean()),
        "excess_kurtosis": float((centred / std).pow(4).mean()) - 3 if std else None,
        "residuals": [round(value, 6) for value in residuals.tolist()],
    }


def verdict(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The factor by which the standard deviation changes in a round, and what it says.

    Its logarithm is the mean of the changes of log(std) from the first round on; that of round 0 is the warm-up's. A
    round starts where the last one ended, so the changes may be independent, and the levels are not: a line fitted to
    them would look more certain than it is. A point (standard deviation 0) is the end of a positive loop.
    """
    if any(entry["std"] == 0 for entry in rounds):
        loop = "positive: the residuals are a delta function"
        none = {"standard_error_of_log": None, "num_changes": 0}
        return {"loop": loop, "factor_per_round": 0.0, **none, "change": 0.0}
    changes = torch.tensor([math.log(entry["std"]) for entry in rounds[1:]], dtype=torch.float64).diff()
    num, change = len(changes), rounds[-1]["std"] / rounds[0]["std"]
    mean = float(changes.mean()) if num else math.nan
    error = float(changes.std()) / math.sqrt(num) if num > 1 else math.inf
    band = STUDENT[min(num - 1, len(STUDENT)) - 1] * error if num > 1 else math.inf
    if mean + band < 0 and change < 0.5:
        loop = "positive: the residuals shrink towards a delta function"
    elif mean - band > 0 and change > 2:
        loop = "negative: the residuals spread, their density falls towards zero"
    else:
        loop = "neither within these rounds"
    known = {"standard_error_of_log": error if num > 1 else None, "num_changes": num}
    return {"loop": loop, "factor_per_round": math.exp(mean) if num else None, **known, "change": change}


def plot(loops: Sequence[dict[str, Any]], file: Path) -> None:
    """Spread by round, and the densities at the start, in the middle and at the end of each loop."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (1 + len(loops)), 3.6), layout="constrained")
    axes = figure.add_subplot(1, 1 + len(loops), 1, title="spread of the residuals")
    for loop in loops:
        name = _name(loop["settings"])
        axes.plot([entry["std"] for entry in loop["rounds"]], marker="o", label=name)
    axes.set(yscale="log", xlabel="round", ylabel="standard deviation")
    axes.legend(fontsize="small")
    for number, loop in enumerate(loops, start=2):
        title = f"{_name(loop['settings'])}: {loop['verdict']['loop'].split(':')[0]}"
        axes = figure.add_subplot(1, 1 + len(loops), number, title=title)
        last = len(loop["rounds"]) - 1
        for place in sorted({0, last // 2, last}):
            axes.hist(loop["rounds"][place]["residuals"], 30, density=True, histtype="step", label=f"round {place}")
        axes.set(xlabel="residual", ylabel="density", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _name(settings: dict[str, Any]) -> str:
    return f"p = {settings['usage']:g}, s = {settings['adherence']:g}"


def read_command_line() -> tuple[Path, list[Settings]]:
    """The folder of the results, and the loops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/repeated_learning"), help="folder of the results")
    parser.add_argument(
        "--loops", nargs="+", default=["1,0.5", "1,1.75", "0.5,0.5"], metavar="P,S", help="usage, adherence"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=400, help="steps before the first round")
    parser.add_argument("--steps", type=int, default=30, help="steps of a round")
    parser.add_argument("--lr", type=float, default=0.1, help="of ZO-SGD in the rounds")
    parser.add_argument("--users", type=int, default=400, help="per round")
    parser.add_argument("--noise", type=float, default=0.5, help="standard deviation of the true scores")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    out, loops = options.pop("out"), options.pop("loops")
    try:
        pairs = [_pair(loop) for loop in loops]
        return out, [Settings(usage=p, adherence=s, **options) for p, s in pairs]
    except ValueError as error:
        parser.error(str(error))


def _pair(text: str) -> tuple[float, float]:
    """`P,S`."""
    try:
        usage, adherence = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(f"expected two numbers P,S in --loops, got {text!r}") from error
    return usage, adherence


def kept(out: Path, wanted: Settings) -> dict[tuple[float, float], dict[str, Any]]:
    """The finished loops of a folder, by usage and adherence.

    Raises:
        ConfigError: if one has other settings beside them than what is wanted, or is damaged.
    """
    found = {}
    for file in sorted(out.glob("loop_*.json")):
        try:
            loop = json.loads(file.read_text())
            there = loop["settings"]
            pair = {name: there[name] for name in ("usage", "adherence")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "remove it, and the loop runs again"
            raise ConfigError(f"the results of a loop in {file}", repr(error), remedy) from error
        for name, value in (asdict(wanted) | pair).items():
            if there.get(name) != value:
                raise ConfigError(f"--{name} {there.get(name)} as in {file}", str(value), "choose another --out")
        found[there["usage"], there["adherence"]] = loop
    return found


def main() -> None:
    out, wanted = read_command_line()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    loops = kept(out, wanted[0])
    for settings in wanted:
        name, pair = _name(asdict(settings)), (settings.usage, settings.adherence)
        if pair not in loops:
            print(name, flush=True)
            try:
                loops[pair] = run_loop(settings)
            except FloatingPointError as error:
                raise SystemExit(f"{name}: {error}") from error
            write_json(out / f"loop_{settings.usage:g}_{settings.adherence:g}.json", loops[pair])
        print(f"{name}: {json.dumps(loops[pair]['verdict'])}", flush=True)
    ordered = [loops[pair] for pair in sorted(loops)]
    write_json(out / "repeated_learning.json", {"loops": ordered})
    plot(ordered, out / "repeated_learning.png")
    print(f"{out}/repeated_learning.{{json,png}}")


if __name__ == "__main__":
    sys.exit(guarded("launch/repeated_learning.py", main, sys.argv[1:]))
