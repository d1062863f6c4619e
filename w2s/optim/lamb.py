"""LAMB (You et al. 2020) for tensors that may be cut into slices over many ranks."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class Lamb(torch.optim.AdamW):
    """AdamW's update, rescaled for every whole tensor to the norm of its weights, at weight decay 0 too.

    The norms are those of whole tensors: `share` tells which tensor a slice belongs to and how the sums of squares of
    all ranks are added up, and which tensors are not rescaled. Without it every parameter is a whole tensor, and is
    rescaled. The state has AdamW's names.

    Args:
        params: parameters or groups of them, as torch's optimizers take them.
        trust_ratio: bounds of the ratio of the norms of a tensor and its update; None leaves it free. Where one of the
            two norms is 0 the ratio is 1, whatever the bounds.
        settings: AdamW's `lr`, `betas`, `eps` and `weight_decay`.

    Attributes:
        found_inf: 1 where the gradients are not to be used, else 0, as torch's fused optimizers know it: a step then
            changes nothing, and nothing is read back from a GPU.
    """

    def __init__(self, params: Any, *, trust_ratio: tuple[float, float] | None = None, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._bounds = trust_ratio
        self.found_inf = torch.zeros(())

    def share(
        self,
        tensor_of: Mapping[Tensor, int],
        count: int,
        reduce_norms: Callable[[Tensor], Tensor],
        exempt: Collection[int] = (),
    ) -> None:
        """Say how parameters make up tensors.

        Args:
            tensor_of: for each parameter (a slice) the number of its tensor.
            count: how many tensors there are.
            reduce_norms: takes [2, count] sums of squares of this rank's slices, returns those of whole tensors.
            exempt: numbers of the tensors whose ratio is 1, whatever the bounds.
        """
        self._tensor_of, self._count, self._reduce_norms = dict(tensor_of), count, reduce_norms
        self._adapted = torch.tensor([number not in exempt for number in range(count)])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters. Nothing is read back from a GPU."""
        slices = [(group["lr"], p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not hasattr(self, "_tensor_of"):
            self.share({p: i for i, (_, p) in enumerate(slices)}, len(slices), lambda sums: sums)
        updates = [update for group in self.param_groups for update in self._updates(group)]
        ratios = self._ratios([p for _, p in slices], updates)
        for (lr, p), update, ratio in zip(slices, updates, ratios, strict=True):
            p.addcmul_(update, ratio, value=lr)

    def _updates(self, group: dict[str, Any]) -> list[Tensor]:
        """Return what AdamW would add, by learning rate 1: the only new tensors of the weights' size."""
        members = [p for p in group["params"] if p.grad is not None]
        states, grads = [self._state_of(p) for p in members], [p.grad for p in members]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        # torch's kernel goes over all of them once, and subtracts what Adam would from the decay alone.
        updates = list(torch._foreach_mul(members, -group["weight_decay"])) if members else []
        adam(
            updates,
            grads,
            means,
            squares,
            [],
            steps,
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=1.0,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        return updates

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state, made at the first step."""
        state = self.state[p]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] = torch.zeros((), device=p.device)
        return state

    def _ratios(self, slices: list[Tensor], updates: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the trust ratio of the tensor that each slice belongs to."""
        device = slices[0].device if slices else None
        numbers = torch.tensor([self._tensor_of[p] for p in slices], dtype=torch.int64).to(device, non_blocking=True)
        sums = torch.zeros(2, self._count, device=device)
        if slices:
            norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (slices, updates)]
            sums.index_add_(1, numbers, torch.stack(norms).square_())
        weights, steps = self._reduce_norms(sums).sqrt()
        ratios = weights / steps
        if self._bounds is not None:
            ratios.clamp_(*self._bounds)
        adapted = (weights > 0) & (steps > 0) & self._adapted.to(device, non_blocking=True)
        return (torch.where(adapted, ratios, 1.0) * (1 - self.found_inf))[numbers].unbind()
