"""LAMB (You et al. 2020) for tensors that may be cut into slices over many ranks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.AdamW):
    """AdamW's update, rescaled for every whole tensor to the norm of its weights, at weight decay 0 too.

    The norms are those of whole tensors: `share` tells which tensor a slice belongs to and how the sums of squares of
    all ranks are added up. Without it every parameter is whole. The state has AdamW's names.
    """

    def share(self, tensor_of: Mapping[Tensor, int], count: int, add_up: Callable[[Tensor], Tensor]) -> None:
        """Say how parameters make up tensors.

        Args:
            tensor_of: for each parameter (a slice) the number of its tensor.
            count: how many tensors there are.
            add_up: takes [2, count] sums of squares of this rank's slices, returns those of whole tensors.
        """
        self._tensor_of, self._count, self._add_up = dict(tensor_of), count, add_up

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        slices = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not hasattr(self, "_tensor_of"):
            self.share({p: i for i, (_, p) in enumerate(slices)}, len(slices), lambda sums: sums)
        updates = [self._update(group, p) for group, p in slices]
        squares = torch.zeros(2, self._count, device=slices[0][1].device if slices else None)
        for (_, p), update in zip(slices, updates, strict=True):
            squares[:, self._tensor_of[p]] += torch.stack([p.float().square().sum(), update.square().sum()])
        weights, steps = self._add_up(squares).sqrt()
        ratios = torch.where((weights > 0) & (steps > 0), weights / steps, 1.0)
        for (group, p), update in zip(slices, updates, strict=True):
            p.sub_(update * ratios[self._tensor_of[p]] * group["lr"])

    def _update(self, group: dict[str, Any], p: Tensor) -> Tensor:
        state = self.state[p]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] = state.get("step", torch.zeros(())) + 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        unbiased = mean / (1 - beta1 ** state["step"].item())
        root = (square / (1 - beta2 ** state["step"].item())).sqrt_()
        return unbiased / root.add_(group["eps"]) + group["weight_decay"] * p
