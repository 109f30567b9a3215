"""Layers with an adapter: that they can have one, that PEFT loads it again, and that the model calls them."""

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from zoscale.config import ConfigError, show
from zoscale.config.strict_yaml import did_you_mean

_NOT_LINEAR = ("DeepseekV4GroupedLinear", "Llama4Router", "PhimoeTopKRouter")
"""Subclasses of `nn.Linear` in transformers that do more than multiply: an adapter's output does not fit theirs."""


def check_adapted(adapted: nn.Module) -> None:
    """Refuse an adapter of layers that cannot have one, or that would be lost between saving and loading it.

    Raises:
        ConfigError: with the names of the layers, or for virtual tokens that PEFT would embed beside others; for
            `modules_to_save` that the model does not have, or that hold layers with adapters or each other.
    """
    _check_embedding(adapted)
    _check_saved(adapted)
    _check_kinds(adapted)
    _check_loads(adapted)


def check_prefix(base: Any, adapter: Mapping[str, Any]) -> None:
    """A prefix is a cache of keys and values; models without attention (Mamba) ignore it, and it changes nothing.

    Raises:
        ConfigError: for a prefix that the model does not take.
    """
    takes_cache = "past_key_values" in inspect.signature(base.forward).parameters
    if adapter.get("peft_type") == "prefix_tuning" and not takes_cache:
        remedy = "set adapter.peft_type=prompt_tuning, or lora"
        raise ConfigError("a model that takes a prefix of keys and values", type(base).__name__, remedy)


def _check_embedding(adapted: Any) -> None:
    """PEFT looks for the embedding of the tokens beside virtual ones by its number of rows."""
    if adapted.active_peft_config.peft_type == "PROMPT_TUNING":
        base, found = adapted.get_base_model(), adapted.word_embeddings
        if found is not base.get_input_embeddings():
            got = f"{type(base).__name__}, for which it takes {'none' if found is None else type(found).__name__}"
            remedy = "set adapter.peft_type=lora"
            raise ConfigError("a model whose embedding of tokens PEFT finds, for prompt_tuning", got, remedy)


def _check_saved(adapted: Any) -> None:
    """PEFT says nothing of names in `modules_to_save` that it misses, and cannot load adapters within modules."""
    from peft.utils import ModulesToSaveWrapper

    modules = dict(adapted.named_modules(remove_duplicate=False))
    saved = [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]
    wanted = adapted.active_peft_config.modules_to_save or ()
    if unknown := [name for name in wanted if not any(full.endswith(name) for full in saved)]:
        names = dict.fromkeys(full.rpartition(".")[2] for full in modules)
        expected = f"adapter.modules_to_save with names of modules of {type(adapted.get_base_model()).__name__}"
        raise ConfigError(expected, show(unknown[0]), did_you_mean(unknown[0], names, "correct or remove it"))
    if nested := [name for name in saved if any(name.startswith(f"{full}.") for full in saved)]:
        remedy = "correct it: a name stands for all modules whose names end so"
        raise ConfigError("adapter.modules_to_save apart from each other", f"{_shown(nested)} in another one", remedy)
    held = [name for name in adapted_layers(adapted) if any(name.startswith(f"{full}.original_") for full in saved)]
    if held := [name.replace(".original_module", "") for name in held]:
        got = f"{_shown(held)}, in a module that is trained as a whole"
        raise ConfigError("adapters of layers outside of adapter.modules_to_save", got, _leave_out(held))


def _check_kinds(adapted: nn.Module) -> None:
    kinds = {name: type(layer.base_layer).__name__ for name, layer in adapted_layers(adapted).items()}
    unfit = {name: kind for name, kind in kinds.items() if kind in _NOT_LINEAR}
    if unfit:
        got = f"{_shown(unfit)} ({', '.join(dict.fromkeys(unfit.values()))})"
        raise ConfigError("an adapter of layers that only multiply", got, _leave_out(unfit))


def _check_loads(adapted: Any) -> None:
    """Load the adapter's values into itself, as PEFT will.

    It renames them as transformers renames the weights of older checkpoints, and says nothing of names that the model
    does not have then.
    """
    if adapted.active_peft_config.is_prompt_learning:
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    trained = {name for name, param in adapted.named_parameters() if param.requires_grad}
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lost = trained & set(set_peft_model_state_dict(adapted, saved).missing_keys)
    if lost:
        layers = [layer for layer in adapted_layers(adapted) if any(name.startswith(f"{layer}.") for name in lost)]
        expected = f"an adapter of {type(adapted.get_base_model()).__name__} that PEFT loads as it was saved"
        got = f"{_shown(layers or lost)}, which it renames and loses"
        raise ConfigError(expected, got, _leave_out(layers))


def _leave_out(names: Iterable[str]) -> str:
    """The remedy for some layers: their last names, with that of what they are in."""
    ends = [[part for part in name.split(".")[-2:] if not part.isdigit()] for name in names]
    excluded = ",".join(dict.fromkeys(".".join(end) for end in ends))
    return f"set adapter.exclude_modules=[{excluded}], or other adapter.target_modules"


@contextmanager
def uncalled_told(model: nn.Module) -> Iterator[None]:
    """Warn after it of layers with trained adapters that the model did not call: these adapters change nothing."""
    with uncalled(model) as idle:
        yield
    if idle:
        what = f"the model does not call {_shown(idle)}, so that their adapters change nothing"
        warnings.warn(f"{what}: train others (adapter.target_modules, adapter.exclude_modules)", stacklevel=2)


@contextmanager
def uncalled(model: nn.Module) -> Iterator[list[str]]:
    """After it, the list holds the names of layers with trained adapters that the model did not call.

    Such a layer's weights are read behind its back (Mamba's `dt_proj`), or the pass has no use for it. Of modules in a
    list, as experts are, other inputs may call others.
    """
    layers = {name for name, layer in adapted_layers(model).items() if any(p.requires_grad for p in layer.parameters())}
    above = {part for name in layers for part in _paths(name)}
    watched = {name: module for name, module in model.named_modules() if name in above}
    called, idle = set[nn.Module](), list[str]()
    with ExitStack() as stack:
        for module in watched.values():
            stack.enter_context(module.register_forward_pre_hook(lambda module, args: called.add(module)))
        yield idle
    ran = {part for name, module in watched.items() if module in called for part in _paths(name)}
    if ran:
        idle += [name for name in layers if name not in ran and not _is_one_of_many(watched, name, ran)]


def _is_one_of_many(modules: dict[str, nn.Module], name: str, ran: set[str]) -> bool:
    """Whether the outermost module around a layer that did not run is in a list."""
    outermost = next(p for p in _paths(name) if p not in ran and type(modules[p]).forward is not nn.Module.forward)
    return isinstance(modules.get(outermost.rpartition(".")[0]), nn.ModuleList | nn.ModuleDict)


def _paths(name: str) -> list[str]:
    """The names of the modules around one, from the outermost on, and its own."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter of PEFT, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _shown(names: Iterable[str]) -> str:
    """Names of layers as a user knows them, those that differ in numbers as one, and of many the first few."""
    found = {re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix("base_model.model.")): None for name in sorted(names)}
    first, others = list(found)[:6], len(found) - 6
    return ", ".join(first) + (f" and {others} others" if others > 0 else "")
