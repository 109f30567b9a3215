"""`choose_forward`: the forward by its name in the configuration; `auto` fans out where it can."""

from collections.abc import Sequence

from zoscale.config import ConfigError
from zoscale.config.sections import CompileName, ForwardName
from zoscale.forward.compilation import CompiledAnswers, compiled_answers
from zoscale.forward.fan import Fan
from zoscale.forward.fan_out import FanOutForward
from zoscale.forward.lora_fan import LoraFan, find_lora_pairs
from zoscale.forward.sequential import Forward, SequentialForward
from zoscale.forward.tangent import TangentForward
from zoscale.forward.weight_fan import WeightFan, find_units
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.models.generation import Generator
from zoscale.objectives import GeneratedLoss, Objective
from zoscale.shards import ShardedParam


def choose_forward(
    name: ForwardName,
    answers: AnswerModel,
    shards: Sequence[ShardedParam],
    mesh: Mesh,
    *,
    derivatives: bool,
    objective: Objective,
    generator: Generator | None,
    max_rows: int | None,
    num_parts: int,
    compile: CompileName,
) -> Forward:
    """The forward that a run takes its losses from.

    Args:
        name: as configured.
        answers: the model.
        shards: this rank's slices of all trainable tensors.
        mesh: the ranks.
        derivatives: whether directional derivatives are wanted instead of losses.
        objective: of the run.
        generator: of texts, for objectives that need them.
        max_rows, num_parts, compile: see `ZeroOrderEngine`.

    Raises:
        ValueError: if the named one cannot serve.
    """
    generates = isinstance(objective, GeneratedLoss)
    fan = None if derivatives or generates or name == "sequential" else _fan(answers, shards, mesh)
    answers = compiled_answers(compile, answers, _obstacle(derivatives, objective, fan))
    if derivatives:
        _check_tangents(name, answers)
        return TangentForward(answers, shards, mesh, num_parts=num_parts)
    if isinstance(fan, LoraFan):
        fan.in_place = isinstance(answers, CompiledAnswers) and answers.has_cuda_graphs
    if fan is not None:
        return FanOutForward(answers, mesh, fan, max_rows=max_rows, num_parts=num_parts)
    if name == "fan_out" or (generates and generator is None):
        raise _misfit(generates)
    texts = None if generator is None or not generates else lambda batch: generator.texts(batch)  # meters replace it
    return SequentialForward(answers, shards, mesh, num_parts=num_parts, answer=texts)


def _misfit(generates: bool) -> ValueError:
    if generates:
        return ValueError("expected a tokenizer and the forward sequential or auto for an objective that generates")
    got = "experts, DoRA, aLoRA, virtual tokens, a weight elsewhere, or a model that uses some in its own way"
    expected = "trainable weights in modules that keep rows in order for forward.name fan_out"
    return ConfigError(expected, got, "set forward.name to auto or sequential")


def _check_tangents(name: ForwardName, answers: AnswerModel) -> None:
    if answers.module is not answers.model:
        raise ValueError(
            "expected the whole model on every rank (mesh.shard_size=1) for forward gradients, got ZeRO-3, which "
            "gathers weights without their tangents"
        )
    if name == "fan_out":
        raise ConfigError("forward.name auto or sequential for forward gradients", "fan_out", "set forward.name")


def _obstacle(derivatives: bool, objective: Objective, fan: Fan | None) -> str | None:
    """What compiled blocks cannot do."""
    if derivatives:
        return "forward gradients, whose tangents no graph carries"
    if isinstance(objective, GeneratedLoss):
        return "an objective that generates text"
    if isinstance(fan, WeightFan):
        return "weights that each candidate has drawn within the blocks (forward.name=sequential draws them before)"
    return None


def _fan(answers: AnswerModel, shards: Sequence[ShardedParam], mesh: Mesh) -> Fan | None:
    pairs = find_lora_pairs(answers.model, [shard.spec for shard in shards])
    if pairs is not None:
        return LoraFan(shards, mesh, pairs)
    units = find_units(answers.model)
    return None if units is None else WeightFan(units)
