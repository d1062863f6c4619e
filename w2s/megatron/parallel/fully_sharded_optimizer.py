"""An optimizer over the shares of Megatron's FSDP."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from w2s.megatron.parallel.fully_sharded import FullySharded, Share
from w2s.megatron.parallel.gradients import clip_or_skip
from w2s.megatron.parallel.shard_boxes import joined, optimizer_boxes
from w2s.optim.guard import StepGuard

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FullyShardedOptimizer:
    """What `Optimizer` asks of Megatron's distributed optimizer, for chunks that are fully sharded.

    Its states have the names and places in a checkpoint that the distributed optimizer's have.

    Args:
        base_optimizer: the optimizer, over the chunks' parameters; from then on over this rank's shares of them.
        chunks: the chunks.
        clip_grad: largest norm of the gradients.
        guard: what judges the steps.
        group: the data-parallel group, over which the norm is taken.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        chunks: Sequence[FullySharded],
        clip_grad: float,
        guard: StepGuard,
        group: ProcessGroup,
    ) -> None:
        self.optimizer, self.wrapped, self.loss = base_optimizer, chunks, None
        self._clip_grad, self._guard, self._group = clip_grad, guard, group
        self.shares: dict[nn.Parameter, Share] = {p: share for chunk in chunks for p, share in chunk.shares.items()}
        self.masters = {
            parameter: nn.Parameter(share.master) for parameter, share in self.shares.items() if share.master.numel()
        }
        for each in base_optimizer.param_groups:
            each["params"] = [self.masters[parameter] for parameter in each["params"] if parameter in self.masters]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, with their rates."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Do nothing: the chunks clear their gradients."""

    @torch.no_grad()
    def step(self) -> tuple[bool, Tensor, None]:
        """Judge, clip and update; the next pass gathers the new weights. The second result is the gradient norm."""
        for parameter, master in self.masters.items():
            master.grad = self.shares[parameter].gradient.float()
        trainable = [p.grad for each in self.param_groups if not each["frozen"] for p in each["params"]]
        norm = clip_or_skip(self.optimizer, trainable, self._guard, self._clip_grad, self._group, self.loss)
        self.optimizer.step()
        self.copy_master_to_model()
        for chunk in self.wrapped:
            chunk.start_param_sync()
        return True, norm, None

    def copy_master_to_model(self) -> None:
        """Copy the master weights into the weights."""
        for chunk in self.wrapped:
            chunk.copy_master_to_model()

    def reload_model_params(self) -> None:
        """Copy the weights into the master weights."""
        for chunk in self.wrapped:
            chunk.copy_model_to_master()

    def slices(self) -> dict[nn.Parameter, Tensor]:
        """This rank's share of the master weight of each parameter that it has one of."""
        return dict(self.masters)

    def ranges(self) -> dict[nn.Parameter, tuple[int, Tensor]]:
        """Where this rank's range of each flattened parameter begins, and its numbers in the model's type."""
        return {parameter: (share.begin, share.weight) for parameter, share in self.shares.items()}

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> dict[str, Any]:
        """Describe master weights and moments as parts of whole tensors, as `_DistributedOptimizer` does."""
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        states = ((parameter, self.shares[parameter].begin, self._states(parameter)) for parameter in self.masters)
        return {
            "optimizer": {"param_groups": settings},
            "param_state": optimizer_boxes(model_sharded_state_dict, states),
            "param_state_sharding_type": "fully_reshardable",
        }

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what was read into the parts that `sharded_state_dict` describes."""
        for parameter, parts in zip(self.masters, saved["param_state"].values(), strict=True):
            for name, local in self._states(parameter).items():
                local.copy_(joined(parts[name]))

    def _states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        master = self.masters[parameter]
        return {"param": master.data, **{name: self.optimizer.state[master][name] for name in _MOMENTS}}
