"""Writing what was trained as ordinary Hugging Face folders."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoscale.adapters.choice import AdapterChoice
from zoscale.adapters.weighted_lora import plain
from zoscale.config import ConfigError
from zoscale.run_directory import write_json
from zoscale.shards import gathered
from zoscale.step import Engine

ORIGIN = "zoscale.json"
"""The note beside saved weights: their step and their run's configuration."""


def save_trained(engine: Engine, folder: Path | str) -> None:
    """Write the adapter in PEFT's format, or the whole model if there is none. A collective; rank 0 writes.

    Raises:
        OSError: if the folder cannot be written; on rank 0 only.
    """
    model: Any = engine.model
    is_adapter = hasattr(model, "peft_config")
    state = _collect(model, trainable_only=is_adapter, keep=engine.mesh.is_main)
    if engine.mesh.is_main:
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            if is_adapter and model.active_peft_config.is_prompt_learning:
                _save_virtual_tokens(model, state, Path(folder))
            elif engine.adapters is not None:
                _save_chosen(engine.adapters, model, state, Path(folder))
            else:
                if not is_adapter:
                    _forget_unused_names(model)
                model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        except SafetensorError as error:  # a full disk comes as this
            raise OSError(errno.EIO, f"{folder} could not be written: {error}") from error
    engine.mesh.barrier()


def _forget_unused_names(model: Any) -> None:
    """Make transformers write the names that the checkpoint of the model has.

    Under ZeRO-3 it keeps all the ways in which it could have renamed weights when it loaded them, used or not, and
    reverses all of them when it saves.
    """
    renamings = getattr(model, "_weight_conversions", None)
    if renamings is not None:
        model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]


def _save_virtual_tokens(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write them as PEFT does, which would call the sharded embedding for it, a collective, on rank 0 alone."""
    ((name, values),) = state.items()
    if not name.endswith("embedding.weight"):
        raise ValueError(f"expected the embedding of the virtual tokens as the only trainable tensor, got {name}")
    save_file({"prompt_embeddings": values.contiguous()}, folder / SAFETENSORS_WEIGHTS_NAME)
    replace(model.active_peft_config, inference_mode=True).save_pretrained(str(folder))


def _save_chosen(adapters: AdapterChoice, model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write the adapters that are connected as an ordinary LoRA of their layers."""
    ours, (plain_config, folded) = dict(model.peft_config), plain(model, adapters.slots, state)
    model.peft_config[model.active_adapter] = plain_config
    try:
        model.save_pretrained(folder, state_dict=folded, safe_serialization=True)
    finally:
        model.peft_config.update(ours)


def write_origin(engine: Engine, folder: Path, config_hash: str) -> None:
    """Note beside the weights which step of which run they are."""
    write_json(folder / ORIGIN, {"step": engine.num_steps, "config_hash": config_hash})


def read_origin(folder: Path) -> int | None:
    """The step of saved weights; None where nothing is saved.

    Raises:
        ConfigError: if the note is malformed.
    """
    path = folder / ORIGIN
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"a step in {path}", repr(error), "restore the file from a copy") from error
    if type(step) is not int or step < 0:
        raise ConfigError(f"a step in {path}", repr(step), "restore the file from a copy")
    return step


def check_saved(folder: Path, *, is_adapter: bool, remedy: str) -> None:
    """Refuse saved weights that are missing or cut short; of the values nothing is read.

    Args:
        folder: of the weights.
        is_adapter: whether they are an adapter's, or a whole model's.
        remedy: what to do about them.

    Raises:
        ConfigError: if a file is missing or damaged.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"the run's weights in {folder}", "none", remedy)
    name, key = ("adapter_config.json", "peft_type") if is_adapter else ("config.json", "model_type")
    path = weights[0]
    try:
        for path in weights:
            with safe_open(path, "pt"):  # compares what its header says with its length
                pass
        path = folder / name
        if not isinstance(json.loads(path.read_text(encoding="utf-8"))[key], str):
            raise ValueError(f"a {key} that is no name")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"a whole {path}", repr(error)[:200], remedy) from error


def _collect(model: nn.Module, *, trainable_only: bool, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, gathered one at a time; empty where `keep` is false. Tied weights are one tensor.

    Buffers are those of the model, or of modules that PEFT trains as a whole, which it saves too.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad or not trainable_only:
            names.setdefault(param, []).append(name)
    state: dict[str, Tensor] = {}
    for param, own in names.items():
        with gathered(param):
            if keep:
                state |= dict.fromkeys(own, param.detach().to("cpu", copy=True))
    if keep:
        kept = {name for name in _persistent(model) if not trainable_only or ".modules_to_save." in name}
        state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in kept}
    return state


def _persistent(model: nn.Module) -> set[str]:
    """Names of the buffers that a checkpoint holds."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }
