"""`Allocations`: the memory that the tensors of a piece of code take, counted as they come and go."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of live tensors, by what runs: a transformer block, the rest of the forward pass, or the backward pass.

    Args:
        existing: tensors that do not count.
        packed: those of them of which every operation makes a whole copy in the compute type, and drops it.
    """

    def __init__(self, existing: Any, packed: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.written = 0
        self.peaks = {"blocks": 0, "outside": 0, "backward": 0}
        self._where = "outside"
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}
        self._packed = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in packed}

    def enter(self, module: nn.Module, args: object) -> None:
        self._where = "blocks"

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self._where = "outside"

    def begin_backward(self) -> int:
        """From here on the backward pass runs; what it begins with."""
        self._where = "backward"
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for storage in made:
            self._add(storage)
        scratch = args[0].nbytes if func is torch.ops.aten.logsumexp.default else 0  # its differences from the maximum
        if self._packed and not any(storage._cdata in self._packed for storage in made):  # no view of one
            unpacked = self._unpacked_by(args)
            scratch += unpacked
            self.written += unpacked
        self.peaks[self._where] = max(self.peaks[self._where], self.live + scratch)
        return result

    def _unpacked_by(self, args: Any) -> int:
        """Bytes of the copies that an operation makes of packed tensors."""
        tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return sum(self._packed.get(tensor.untyped_storage()._cdata, 0) for tensor in tensors)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.written += storage.nbytes()
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes
