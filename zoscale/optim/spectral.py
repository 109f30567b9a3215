"""`SpectralOptimizer`: which tensors an orthogonalising rule takes, and its options."""

import re
from collections.abc import Mapping
from typing import Any, get_args

from zoscale.optim.base import ZeroOrderOptimizer
from zoscale.optim.checks import check_choice
from zoscale.optim.newton_schulz import Iteration, Scale
from zoscale.shards import TensorSpec

_EMBEDDING_OR_HEAD = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|head|score)(\.|$)")


class SpectralOptimizer(ZeroOrderOptimizer):
    """Hidden matrices go by the rule `muon`; other tensors, embeddings and the head by `sign`, at another lr.

    A subclass sets `_sign_lr_scale`, the lr factor of the rule `sign`, before this is constructed.
    """

    is_elementwise = False
    _sign_lr_scale: float

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        check_choice("scale", options["scale"], get_args(Scale))
        check_choice("iteration", options["iteration"], get_args(Iteration))
        if options["power_rank"] < 1:
            raise ValueError(f"expected power_rank >= 1, got {options['power_rank']}")

    def rule(self, spec: TensorSpec) -> str:
        return "sign" if len(spec.shape) != 2 or _EMBEDDING_OR_HEAD.search(spec.name) else "muon"

    def rule_options(self, rule: str) -> dict[str, Any]:
        return {"lr_scale": self._sign_lr_scale} if rule == "sign" else {}
