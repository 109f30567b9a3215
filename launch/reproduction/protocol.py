"""The protocol of a study: what it sets itself in every run, which `key=value` options leave alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoscale.config import ConfigError
from zoscale.config.command_line import read_command_line
from zoscale.config.strict_yaml import Text

OWN = {
    "seed": "use --seeds",
    "name": "leave it out; a run is named by its scheme and method",
    "output_dir": "use --out",
    "model.id": "use --model",
    "optimizer.name": "use --methods",
    "optimizer.lr": "use --lr METHOD=LR[,LR...]",
    "train.steps": "use --forwards, or steps in the memory section of a preset",
    "train.eval_every": "change evaluations in a preset of yours, --preset FILE",
    "tracking.experiment": "use --out; the experiment has its name",
}
"""What to do instead, by key."""


def check_options(options: Sequence[str]) -> None:
    """Raise `ConfigError` if one of the `key=value` options sets what is the study's."""
    for key, value in _leaves(read_command_line(options).given({}).values):
        if key in OWN:
            raise ConfigError("options that leave the protocol alone", f"{key}={value}", OWN[key])


def check_scheme(name: str, wanted: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> None:
    """Raise `ConfigError` if options gave a scheme an adapter, or took it away.

    Args:
        name: of the scheme.
        wanted: the run's configuration as far as the study sets it.
        adapter: of the run.
    """
    is_wanted = wanted.get("adapter", {}) is not None
    if is_wanted != (adapter is not None):
        expected = f"{'an' if is_wanted else 'no'} adapter in the scheme {name}"
        raise ConfigError(expected, f"options with {'none' if is_wanted else 'one'}", "use --schemes, or drop them")


def varied_lr(
    own: Mapping[str, Any], methods: Sequence[str], schemes: Sequence[str], lrs: Mapping[str, Sequence[float]]
) -> float:
    """The one learning rate of the method that `sensitivity` varies: the command line's, or the preset's.

    Args:
        own: `method`, `scheme` and `lr` of the preset.
        methods: that are left by the command line.
        schemes: that are left by the command line.
        lrs: of the command line, by method.

    Raises:
        ConfigError: if its method or scheme is not left, or there is another learning rate than its own.
    """
    for option, what, left in (("--methods", "method", methods), ("--schemes", "scheme", schemes)):
        if own[what] not in left:
            raise ConfigError(f"{option} with {own[what]}, which is varied", ", ".join(left), f"leave {option} out")
    method = own["method"]
    if lrs and (set(lrs) != {method} or len(lrs[method]) > 1):
        got = ", ".join(f"{name}={','.join(f'{lr:g}' for lr in values)}" for name, values in lrs.items())
        raise ConfigError(f"--lr {method}=LR, one for the method that is varied", got, "leave out the others")
    return float(lrs[method][0] if lrs else own["lr"])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, of mappings that are written as text too."""
    for key, given in tree.items():
        value = Text.as_mapping(given)
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
