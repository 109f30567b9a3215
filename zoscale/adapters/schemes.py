"""What is trained: a PEFT adapter beside the frozen model, some of the model's own weights by name, or all of them."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, get_type_hints

from torch import nn

from zoscale.adapters.selection import Selection
from zoscale.config import ConfigError, did_you_mean, first_line, show
from zoscale.config.schema import conforms, type_name

PEFT_CONFIGS = {
    "lora": "LoraConfig",
    "prefix_tuning": "PrefixTuningConfig",
    "prompt_tuning": "PromptTuningConfig",
    "ia3": "IA3Config",
    "ln_tuning": "LNTuningConfig",
    "weight_lora": "LoraConfig",
}
"""`adapter.peft_type` -> class of peft that has the other fields; `weight_lora` has those of `Selection` too."""

_WIDER = {"lora_alpha": float, "prompt_tuning_init": Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"]}
"""Types of fields where PEFT's is too narrow, or takes any text for the default."""

_POSSIBLE: dict[str, tuple[str, Callable[[float], bool]]] = {
    "r": ("at least 1", lambda r: r >= 1),
    "lora_alpha": ("above 0", lambda alpha: alpha > 0),
    "lora_dropout": ("in [0, 1)", lambda share: 0 <= share < 1),
}
"""Values that PEFT accepts, some of them only to fail later or to train nothing."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of `init_lora_weights`, or how they begin, that take what the adapter starts with off the base weights."""


def check_scheme(adapter: Mapping[str, Any] | None, trainable: str | None, num_steps: int | None = None) -> None:
    """Refuse what can be refused without a model.

    Args:
        adapter, trainable: of the configuration.
        num_steps: of the run; None = not known.

    Raises:
        ConfigError: for an unknown `peft_type` or field, one that cannot be trained here, fields that PEFT refuses
            together, starting values that cannot be made again, or no regular expression; for a selection of adapters
            that comes after the end of the run.
    """
    try:
        re.compile(trainable or "")
    except re.error as error:
        raise ConfigError(f"a regular expression for trainable ({error})", repr(trainable), "correct it") from error
    if adapter is not None:
        name, options = _split(adapter)
        _check_fields(_peft_class(name), options)
        _check_start(name, str(options.get("init_lora_weights")).lower())
        _check_values(_peft_class(name), options)
        for key in ("prefix_projection", "inference_mode"):
            if options.get(key):
                raise ConfigError(f"adapter.{key} false", "true", "train the virtual tokens themselves")
        try:
            chosen = peft_config(adapter)
        except (ValueError, TypeError) as error:
            expected = f"adapter options that peft.{PEFT_CONFIGS[name]} takes"
            raise ConfigError(expected, first_line(error), "correct adapter") from error
        if chosen.is_prompt_learning and not (isinstance(count := chosen.num_virtual_tokens, int) and count >= 1):
            raise ConfigError("adapter.num_virtual_tokens of at least 1", repr(count), "raise it")
        if chosen.is_prompt_learning and chosen.modules_to_save:
            got = f"adapter.modules_to_save={show(chosen.modules_to_save)}"
            raise ConfigError(f"virtual tokens as all that is trained with {name}", got, "remove it, or use lora")
    selection = selection_of(adapter)
    if selection is not None and num_steps and selection.last_step >= num_steps:
        got = f"step {selection.last_step} (adapter.warmup_steps, expansions x expand_every)"
        raise ConfigError(f"the last choice of adapters before train.steps={num_steps}", got, "choose earlier")


def _check_fields(peft_class: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that PEFT's class has no field for.

    Raises:
        ConfigError: what was expected.
    """
    library = f"peft.{peft_class.__name__}"
    known = [f"adapter.{field.name}" for field in fields(peft_class)]
    for key in options:
        if f"adapter.{key}" not in known:
            remedy = did_you_mean(f"adapter.{key}", known, f"see the fields of {library}")
            raise ConfigError(f"a field of {library}", f"adapter.{key}", remedy)


def _check_values(peft_class: Any, options: Mapping[str, Any]) -> None:
    """Refuse what is not of the type that PEFT's class declares, which does not look itself, and what is impossible.

    Raises:
        ConfigError: what was expected.
    """
    hints = get_type_hints(peft_class) | _WIDER
    defaults = {field.name: field.default for field in fields(peft_class)}
    for key, value in options.items():
        if value is None and defaults[key] is None:  # which PEFT declares as a number
            continue
        if not conforms(value, hints[key]):
            expected = f"adapter.{key} to be {type_name(hints[key])}"
            raise ConfigError(expected, show(value), "give it a value of that type")
        wanted, holds = _POSSIBLE.get(key, ("", lambda _: True))
        if not holds(value):
            raise ConfigError(f"adapter.{key} {wanted}", show(value), "correct it")


def _check_start(name: str, start: str) -> None:
    """Refuse starting values of LoRA that whoever loads the result cannot make again.

    Some change the base weights, and PEFT changes them again when it loads the adapter: as they were in training, if
    the same layers have adapters of the same rank, and nothing is drawn at random.

    Raises:
        ConfigError: what was expected.
    """
    if start.startswith("pissa_niter"):
        remedy = "set it to pissa: a random decomposition gives others another base"
        raise ConfigError("adapter.init_lora_weights that can be made again", start, remedy)
    if name == "weight_lora" and start.startswith(_CHANGES_BASE):
        got = f"{start}, which layers that lose their adapter would keep"
        raise ConfigError("adapter.init_lora_weights that leaves the base weights, with weight_lora", got, "change it")


def selection_of(adapter: Mapping[str, Any] | None) -> Selection | None:
    """How the adapters are chosen that are kept; None where all are.

    Raises:
        ConfigError: for values that are impossible.
    """
    is_weighted = adapter is not None and adapter.get("peft_type") == "weight_lora"
    return Selection.take_from(dict(adapter or {})) if is_weighted else None


def peft_config(adapter: Mapping[str, Any]) -> Any:
    """The adapter's configuration in PEFT.

    Raises:
        TypeError, ValueError: for fields that it refuses.
    """
    name, options = _split(adapter)
    return _peft_class(name)(task_type="CAUSAL_LM", **options)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings that PEFT's own code causes in transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def num_virtual_tokens(adapter: Mapping[str, Any] | None) -> int:
    """Virtual tokens that the adapter puts before every row."""
    config = None if adapter is None else peft_config(adapter)
    return int(config.num_virtual_tokens or 0) if config is not None and config.is_prompt_learning else 0


def choose_trainable(model: nn.Module, pattern: str | None) -> None:
    """Train the weights whose names the pattern is found in, and freeze the others; None = train all.

    Raises:
        ConfigError: if it is found in no name, or only in a second name of a tied weight.
    """
    chosen = {name for name, _ in model.named_parameters() if re.search(pattern or "", name)}
    first_names = {id(param): name for name, param in model.named_parameters()}
    for name, param in model.named_parameters(remove_duplicate=False):
        if re.search(pattern or "", name) and (first := first_names[id(param)]) not in chosen:
            remedy = f"name {first} to train both as one, or set model.untie_head=true"
            raise ConfigError("trainable to name weights of their own", f"{name}, which is tied to {first}", remedy)
    if not chosen:
        some = ", ".join(list(first_names.values())[:3])
        raise ConfigError("trainable to be found in names of weights", repr(pattern), f"they are like {some}")
    for name, param in model.named_parameters():
        param.requires_grad_(name in chosen)


def _split(adapter: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The type of an adapter, and its other fields in PEFT."""
    options = dict(adapter)
    name = options.pop("peft_type", "lora")
    if not isinstance(name, str) or name not in PEFT_CONFIGS:
        raise ConfigError(f"adapter.peft_type {', '.join(PEFT_CONFIGS)}", show(name), "choose one of them")
    if name == "weight_lora":
        Selection.take_from(options)
    return name, options


def _peft_class(name: str) -> Any:
    import peft

    return getattr(peft, PEFT_CONFIGS[name])
