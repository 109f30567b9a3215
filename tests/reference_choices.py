"""The oracle of WeightLoRA+ by backpropagation (arXiv 2506.02724), in plain torch; it imports nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import reference as ref
import torch
from torch import Tensor, nn

_EXPANSION = 6  # the domain of the noise
Loss = Callable[[Any, Sequence[Any]], Tensor]


class Weighted(nn.Module):
    """y = W x + scaling w B A x in a PEFT model, as a function of A, B and w of any rank; without them y = W x."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.layers = [name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name]
        self.shapes = {name: param.shape for name, param in model.named_parameters()}

    @staticmethod
    def names(layer: str) -> tuple[str, str, str]:
        """Of A, B and w."""
        a, b = (f"{layer}.lora_{matrix}.default" for matrix in "AB")
        return f"{a}.weight", f"{b}.weight", f"{b}.factor"

    def forward(self, batches: Sequence[Any]) -> Tensor:
        return self.loss(self.model, batches)

    def value(self, trained: Mapping[str, Tensor], batches: Sequence[Any]) -> Tensor:
        """The loss at these tensors."""
        given = {}
        for a, b, w in map(self.names, self.layers):
            given[f"model.{a}"] = trained.get(a, torch.zeros(self.shapes[a]))
            given[f"model.{b}"] = trained[b] * trained[w] if b in trained else torch.zeros(self.shapes[b])
        return torch.func.functional_call(self, given, (batches,))  # type: ignore[no-any-return]


def choose(trained: dict[str, nn.Parameter], model: Weighted, keep: int, widen: Callable[[str], Tensor] | None) -> None:
    """Keep the adapters of the largest |w|, in place; at twice the rank if there is noise for it."""
    left = [layer for layer in model.layers if model.names(layer)[2] in trained]
    strongest = sorted(left, key=lambda layer: -trained[model.names(layer)[2]].abs().item())[:keep]
    noise = {a: widen(a) for a in (model.names(layer)[0] for layer in strongest)} if widen else {}
    for layer in left:
        a, b, w = model.names(layer)
        if layer not in strongest:
            for name in (a, b, w):
                del trained[name]
        elif widen:
            q, r = torch.linalg.qr(trained[a].detach().double().T)
            q, r = q * r.diagonal().sign(), r * r.diagonal().sign()[:, None]
            rows = noise[a].double() / math.sqrt(trained[a].shape[1])
            trained[a] = nn.Parameter(torch.cat([q.T, rows - rows @ q @ q.T]).float())
            wide = trained[b].detach().double() @ r.T
            trained[b] = nn.Parameter(torch.cat([wide, torch.zeros_like(wide)], 1).float())


def train(
    model: Weighted,
    trained: dict[str, nn.Parameter],
    batches: Callable[[int], Sequence[Any]],
    new_optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
    *,
    plan: Mapping[str, int],
    steps: int,
    max_grad_norm: float,
    seed: int,
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms; a tensor that stays keeps its state in the optimizer, a new one has none."""
    optimizer, losses, norms = new_optimizer(trained), [], []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model.value(trained, batches(step - 1))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)))
        optimizer.step()
        number, rest = divmod(step - plan["warmup_steps"], plan["expand_every"])
        if rest or not 0 <= number <= plan["expansions"]:
            continue
        ids = {name: place for place, name in enumerate(sorted(trained))}

        def widen(name: str, step: int = step, ids: dict[str, int] = ids) -> Tensor:
            stream = ref.Stream(seed, step, 0, ids[name], _EXPANSION)
            return torch.from_numpy(stream.normal(range(trained[name].numel()))).view(trained[name].shape)

        choose(trained, model, plan["keep"] // 2**number, widen if number else None)
        state, optimizer = optimizer.state, new_optimizer(trained)
        optimizer.state.update({param: state[param] for param in trained.values() if param in state})
    return losses, norms
