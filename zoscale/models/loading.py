"""Hugging Face causal language models, built directly sharded, and their tokenizers."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from zoscale.adapters.layers import check_adapted, check_prefix
from zoscale.adapters.schemes import choose_trainable, peft_config, quiet_peft, selection_of
from zoscale.adapters.weighted_lora import weigh_adapters
from zoscale.config import ConfigError, ModelConfig, first_line, one_line, show
from zoscale.models.quantization import keep_packing, loading_options
from zoscale.models.sizes import auto_model, blocks_of
from zoscale.models.tied import check_tied
from zoscale.shards import copy_values, vectors_gathered


def read_model_config(config: ModelConfig) -> Any:
    """The architecture (a transformers `PretrainedConfig`) of what is trained; no weights are read.

    Raises:
        ConfigError: if it cannot be found, or needs code from the model's repository that was not allowed; if a field
            is misspelt; if a head is to be untied that is not tied.
    """
    try:
        if config.config is not None:
            options = dict(config.config)
            model_type = options.pop("model_type", "")
            found: Any = AutoConfig.for_model(model_type, **options)
            found.to_json_string()  # which fails for some values that nothing has looked at
            _check_fields(options, found, AutoConfig.for_model(model_type))
        else:
            found = AutoConfig.from_pretrained(
                str(config.id), revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except ConfigError:
        raise
    except Exception as error:  # the library raises any type at all for a value of a wrong type
        wanted = config.id or f"model_type {dict(config.config or {}).get('model_type')!r}"
        remedy = missing_folder(str(config.id)) or one_line(error)
        raise ConfigError("a Hugging Face id, a local folder or a known model_type", wanted, remedy) from error
    if config.untie_head:
        _untie(found, config)
    return found


def _check_fields(options: Mapping[str, Any], found: Any, default: Any) -> None:
    """Refuse what the library would keep and never read; keys that resemble none may be of another of its versions."""
    for key in options:
        near = difflib.get_close_matches(key, [*vars(default), *default.attribute_map], n=1, cutoff=0.9)
        if near and key in vars(found) and not hasattr(default, key):
            kind = type(found).__name__
            raise ConfigError(f"fields of {kind} in model.config", show(key), f"did you mean {near[0]}?")


def _untie(architecture: Any, config: ModelConfig) -> None:
    if config.id is None:
        remedy = "set tie_word_embeddings: false in model.config"
        raise ConfigError("model.id beside model.untie_head", "random weights", remedy)
    if not getattr(architecture, "tie_word_embeddings", False):
        remedy = "leave model.untie_head out"
        raise ConfigError("a model whose head is tied, for model.untie_head", "one with a head of its own", remedy)
    architecture.tie_word_embeddings = False


_PEFT_REFUSES = (
    ValueError, TypeError, AttributeError, LookupError, NotImplementedError, AssertionError, StopIteration, ImportError,
)  # fmt: skip
"""What PEFT raises for options that do not fit a model."""

MERGING = frozenset(
    {
        "cohere", "gemma", "glm4", "gpt2", "gpt_neox", "gptj", "granite", "llama", "mistral", "mixtral", "olmo2",
        "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip
"""Model types whose losses with merged rows are tested to be those of separate rows."""


def can_merge_rows(architecture: Any, config: ModelConfig, longest: int) -> bool:
    """Whether the model's attention takes a mask of any form, with positions given.

    FlashAttention does not, and a sliding window would not be applied; a model's own code is not relied upon.
    """
    window = getattr(architecture, "sliding_window", None)
    return (
        architecture.model_type in MERGING
        and config.attention in (None, "sdpa", "eager")
        and not config.trust_remote_code
        and (not window or longest <= window)
    )


def load_model(config: ModelConfig, architecture: Any, device: torch.device | None = None) -> PreTrainedModel:
    """The model, each rank holding its shard from the start if ZeRO-3 is active.

    Args:
        config: of the model.
        architecture: from `read_model_config`.
        device: that weights which are read go to one by one, not as a whole model from the host's memory.

    Raises:
        ConfigError: if there are no safetensors weights and pickles were not allowed, the weights cannot be read, some
            are missing or of other sizes, or an option does not fit the model; see `check_tied`.
    """
    if config.id is None:
        return new_model(config, architecture)
    loaded, missing = _read_weights(config, architecture, **({} if device is None else {"device_map": {"": device}}))
    if config.untie_head:
        missing = _fill_untied(loaded, missing)
    if missing:
        raise _incomplete(config, loaded, missing)
    check_tied(config, loaded)
    keep_packing(loaded)
    return loaded


def load_sharded(config: ModelConfig, architecture: Any, types: Mapping[str, torch.dtype]) -> PreTrainedModel | None:
    """`load_model` under ZeRO-3; None if that fails, or the model is another than the one that a single rank loads.

    DeepSpeed casts what a model's code makes in a type of its own (routers in float32, say), and transformers forgets
    which weights are to stay in float32; some models read weights while they are made, which are in slices already.

    Args:
        config: of the model.
        architecture: from `read_model_config`.
        types: from `loaded_types`.
    """
    try:
        model = load_model(config, architecture)
    except (ConfigError, IndexError) as error:  # a mistake of the user, perhaps: a single rank will say so
        if isinstance(error.__cause__, OSError):  # which other ranks need not have
            raise
        return None
    return model if _types(model) == types else None


def loaded_types(config: ModelConfig, architecture: Any) -> dict[str, torch.dtype]:
    """The type of each weight and buffer that a single rank loads; nothing is read but the checkpoint's headers.

    Raises:
        ConfigError: see `load_model`.
    """
    with _unreported():
        return _types(_read_weights(config, architecture, device_map="meta")[0])


def _types(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in (*model.named_parameters(), *model.named_buffers())}


def _read_weights(config: ModelConfig, architecture: Any, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of its weights that the checkpoint lacks: they are random.

    Adapters begin alike however the model is loaded: random numbers that its code draws first, here or there, are not
    counted.
    """
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with _unreported() if config.untie_head else nullcontext(), torch.random.fork_rng(gpus):
            loaded, report = auto_model().from_pretrained(
                config.id,
                config=architecture,
                revision=config.revision,
                use_safetensors=None if config.allow_pickle else True,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # but to say which below
                **_model_options(config),
                **loading_options(config),
                **options,
            )
    except (ValueError, ImportError) as error:
        raise _misfit(error) from error
    except OSError as error:
        pickles = "pickled weights are loaded only with model.allow_pickle=true"
        remedy = "check model.id" if config.allow_pickle else pickles
        raise ConfigError(f"readable safetensors weights at {config.id}", first_line(error), remedy) from error
    for name, shape, wanted in sorted(report["mismatched_keys"]):
        got = f"{name} of {list(shape)} for {list(wanted)}"
        raise ConfigError(f"weights of the sizes in config.json at {config.id}", got, "correct config.json")
    weights = {name for name, _ in loaded.named_parameters(remove_duplicate=False)}  # buffers are computed
    return cast(PreTrainedModel, loaded), weights & set(report["missing_keys"])


@contextmanager
def _unreported() -> Iterator[None]:
    """Within, transformers does not say that a head of its own is random: it does not stay so."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


def _fill_untied(model: Any, missing: set[str]) -> set[str]:
    """Copy the embedding to a missing head, or the head to a missing embedding; returns what is missing still."""
    names = {id(param): name for name, param in model.named_parameters()}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    for target, source in ((head, embedding), (embedding, head)):
        if names[id(target)] in missing and names[id(source)] not in missing:
            copy_values(target, source)
            return missing - {names[id(target)]}
    return missing


def _incomplete(config: ModelConfig, model: Any, missing: set[str]) -> ConfigError:
    first, *others = sorted(missing)
    got = f"none for {first}" + (f" and {len(others)} others" if others else "")
    remedy = "complete the checkpoint: they would be random"
    head = getattr(model.get_output_embeddings(), "weight", None)
    if any(param is head and name in missing for name, param in model.named_parameters()):
        remedy += ". If its head is the embedding, set tie_word_embeddings true in its config.json, "
        remedy += "and model.untie_head=true to train it by itself"
    return ConfigError(f"weights for the whole model at {config.id}", got, remedy)


def new_model(config: ModelConfig, architecture: Any) -> PreTrainedModel:
    """The model with random weights; whatever `config.id` says, nothing is read.

    Raises:
        ConfigError: if an option does not fit the model.
    """
    try:
        return cast(PreTrainedModel, auto_model().from_config(architecture, **_model_options(config)))
    except (ValueError, ImportError) as error:
        raise _misfit(error) from error


def _model_options(config: ModelConfig) -> dict[str, Any]:
    options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    return options | ({} if config.attention is None else {"attn_implementation": config.attention})


def _misfit(error: Exception) -> ConfigError:
    return ConfigError("model options that fit the model", first_line(error), "correct the section model")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: if there is none.
    """
    place = config.tokenizer or config.id
    if place is None:
        raise ConfigError("model.tokenizer beside model.config", "none", "name an id or a folder")
    try:
        revision = config.revision if place == config.id else None  # which says nothing of another repository
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = missing_folder(place) or first_line(error)
        raise ConfigError(f"a tokenizer at {place}", reason, "set model.tokenizer") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_adapter(model: PreTrainedModel, adapter: Mapping[str, Any] | None, trainable: str | None = None) -> nn.Module:
    """Freeze the base and add what is trained; without an adapter the base's own weights are trained.

    Args:
        model: the base.
        adapter: `peft_type` (left out: lora) and fields of its configuration in PEFT.
        trainable: without an adapter, pattern of the names of the weights to train; None = all.

    Raises:
        ConfigError: for unknown fields, targets or names that the model does not have, or see `check_adapted`.
    """
    if adapter is None:
        choose_trainable(model, trainable)
        return model
    from peft import get_peft_model

    layers = _linear_layers(model)  # before PEFT replaces some
    copies_norms = adapter.get("peft_type") == "ln_tuning"  # which needs them whole
    if adapter.get("peft_type") == "prompt_tuning" and _reads_tokens(model.config.get_text_config()):
        got = f"prompt_tuning with {type(model).__name__}, whose blocks look at token ids, which virtual tokens lack"
        raise ConfigError("another adapter for this model", got, "set adapter.peft_type=lora")
    check_prefix(model, adapter)
    try:
        with vectors_gathered(model) if copies_norms else nullcontext(), quiet_peft():
            options = peft_config(adapter)
            if options.is_prompt_learning:
                _measure(options, model)
            adapted = cast(nn.Module, get_peft_model(model, options))
    except _PEFT_REFUSES as error:
        expected = f"adapter options that fit {type(model).__name__}"
        got = "a target without weights" if isinstance(error, StopIteration) else first_line(error)
        targets = [] if adapter.get("peft_type") in ("prompt_tuning", "prefix_tuning") else layers
        raise ConfigError(expected, got, _adapter_remedy(targets, error)) from error
    check_adapted(adapted)
    if (selection := selection_of(adapter)) is not None:
        weigh_adapters(adapted, selection)
    return adapted


def _measure(options: Any, model: Any) -> None:
    """Fill in sizes of virtual tokens that PEFT takes from the wrong place, or does not find."""
    if options.peft_type == "PROMPT_TUNING" and options.token_dim is None:
        options.token_dim = model.get_input_embeddings().embedding_dim  # not hidden_size, as OPT-350M shows
    heads = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    config = model.config.get_text_config()
    if options.num_attention_heads is None and not any(name in config.to_dict() for name in heads):
        found = getattr(config, "num_attention_heads", None)  # by another name in MPT, XGLM and others
        options.num_attention_heads = found or (1 if options.peft_type == "PROMPT_TUNING" else None)  # of no matter


def _reads_tokens(config: Any) -> bool:
    """Whether a model needs token ids beyond its embedding: hashed experts, embeddings of each layer."""
    return config.model_type in ("deepseek_v4", "gemma3n_text") or bool(
        config.model_type == "gemma4_text" and config.hidden_size_per_layer_input
    )


def _linear_layers(model: nn.Module) -> list[str]:
    """What an adapter can be put on: the last names of the linear layers within the blocks."""
    kinds = (nn.Linear, Conv1D)
    layers = [n for block in blocks_of(model) for n, module in block.named_modules() if isinstance(module, kinds)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def _adapter_remedy(layers: Sequence[str], error: BaseException) -> str:
    names = [name for name in layers if repr(name) not in str(error)]  # Mamba's out_proj is refused
    targets = f"; the linear layers of its blocks, for adapter.target_modules: {', '.join(names)}" if names else ""
    return f"correct adapter{targets}"


def missing_folder(place: str) -> str | None:
    """What is wrong with a place that can only be a folder and is none; None for others."""
    is_folder = place.count("/") > 1 or place[:1] in ("/", ".", "~")
    return f"there is no folder {Path(place).absolute()}" if is_folder and not Path(place).is_dir() else None
