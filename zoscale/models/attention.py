"""Attention of Hugging Face models: which implementation can serve, and masks that nobody has to look at."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from zoscale.config import ConfigError, ModelConfig
from zoscale.lanes import lane

_FLASH = "flash_attention_2"
_UNMASKED: set[int | None] = set()
"""Passes side by side whose padding nobody looks for."""


def check_attention(config: ModelConfig) -> None:
    """Refuse FlashAttention where it cannot run.

    Raises:
        ConfigError: what was expected.
    """
    if config.attention != _FLASH:
        return
    if config.dtype == "float32":
        remedy = "set model.dtype, or model.attention=sdpa"
        raise ConfigError(f"model.dtype bfloat16 or float16 beside model.attention={_FLASH}", "float32", remedy)
    if importlib.util.find_spec("flash_attn") is None:
        remedy = "pip install flash-attn, or set model.attention=sdpa, which has a kernel of the same kind"
        raise ConfigError(f"the package flash-attn beside model.attention={_FLASH}", "none", remedy)


@contextmanager
def padding_unmasked() -> Iterator[None]:
    """Within, the masks that transformers makes are causal (and of the model's windows), whatever is padding.

    For rows padded on the right, whose real tokens come before the padding and cannot see it. Looking for padding would
    make the host wait for the device, and a mask for it would keep SDPA from its fastest kernel.
    """
    if not _UNMASKED:
        for name, make in dict(ALL_MASK_ATTENTION_FUNCTIONS.items()).items():
            ALL_MASK_ATTENTION_FUNCTIONS[name] = _Unmasked(make)
    _UNMASKED.add(lane())
    try:
        yield
    finally:
        _UNMASKED.remove(lane())
        if not _UNMASKED:
            for name, make in dict(ALL_MASK_ATTENTION_FUNCTIONS.items()).items():
                if isinstance(make, _Unmasked):
                    ALL_MASK_ATTENTION_FUNCTIONS.pop(name)


class _Unmasked:
    """A maker of masks that is told of no padding by passes in `_UNMASKED`."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any, attention_mask: Any = None, **options: Any) -> Any:
        return self._make(*args, attention_mask=None if lane() in _UNMASKED else attention_mask, **options)
