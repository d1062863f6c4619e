"""Megatron-Core's FSDP: each data-parallel rank keeps a share of weights, gradients and optimizer states.

The weights of a layer are whole while it computes and no longer; those outside of layers are while a pass runs. Each
gradient is reduced to the rank that has the share as soon as the backward pass has made it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from w2s.megatron.compat import OpenFullySharded, begin_of_share, is_to_go_back, release_gathered
from w2s.megatron.model.tower import Tower


@dataclass(frozen=True)
class Share:
    """What a rank has of a parameter: a range of its numbers, perhaps none. Its tensors are flat views of buffers."""

    begin: int
    """Of the range in the flattened parameter."""
    weight: Tensor
    """In the type that the model computes in."""
    master: Tensor
    """In float32."""
    gradient: Tensor
    """Reduced."""


class FullySharded(OpenFullySharded):
    """A chunk of a model, all of whose parameters are trained, that Megatron's FSDP drives.

    Megatron has DTensors of the shares stand in for the chunk's parameters whenever no pass runs. Here the parameters
    stay what they are, whole in shape, with numbers during a pass alone; optimizer and checkpoints work on `shares`.
    """

    def __init__(self, part: Tower, settings: DistributedDataParallelConfig) -> None:
        units, device = [TransformerLayer, *part.fsdp_units], next(part.parameters()).device
        super().__init__(part.config, settings, part, fsdp_unit_modules=units, device=device)
        self._defer_reduction()
        self._layers_to_come = True
        self._gather_ahead_what_is_to_come(part)
        self._is_unsharded = False
        self.shares = {parameter: share for group in self._groups for parameter, share in _shares(group)}

    def _defer_reduction(self) -> None:
        """Reduce what is outside of layers when the backward pass has ended, as its bucket is full no sooner.

        Megatron reduces it then anyway, and once more if a parameter had its gradient before those of the chunk's
        output were there, as the scalars of a loss have.
        """
        for group in self._groups:
            for parameter in group.params if group.fsdp_unit_id is None else []:
                name = self.module.param_to_name[parameter]
                self.module.grad_acc_hooks.pop(f"grad_acc and reduce for {name}").remove()

    def _gather_ahead_what_is_to_come(self, part: Tower) -> None:
        """Gather nothing ahead where a pass has been through all layers.

        Megatron gathers what stands beside a module in its list, in which all that is outside of layers comes first or
        last: it would gather the first layers again for the head, and the last ones for the patch embedding's backward
        pass.
        """
        gather = self.module.all_gather_and_wait_parameters_ready
        layers = [module for module in part.modules() if isinstance(module, TransformerLayer)]

        def begin(*unused: Any) -> None:
            self._layers_to_come = True

        def end(*unused: Any) -> None:
            self._layers_to_come = False

        def gather_needed(params: Any, prefetch: bool = True, bwd: bool = False, **settings: Any) -> None:
            to_come = any(is_to_go_back(layer) for layer in layers) if bwd else self._layers_to_come
            gather(params, prefetch=prefetch and to_come, bwd=bwd, **settings)

        part.register_forward_pre_hook(begin, prepend=True)
        layers[-1].register_forward_hook(end)
        self.module.all_gather_and_wait_parameters_ready = gather_needed

    @property
    def _groups(self) -> list[Any]:
        groups: list[Any] = self.param_and_grad_buffer.parameter_groups
        return groups

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside, the parameters have all their numbers; what is written into them goes into the shares."""
        if self._is_unsharded:  # whoever began it ends it
            yield
            return
        self.release()
        self.module.start_param_sync(force_sync=True)
        self._is_unsharded = True
        try:
            yield
        finally:
            self._is_unsharded = False
        for group in self._groups:
            buffer = group.model_weight_buffer
            buffer.get_shard_from_local_buffer().copy_(buffer.get_shard_from_bucket(buffer.fetch_bucket()))
        self.release()

    def release(self) -> None:
        """Let go of what was gathered: the next pass gathers the shares as they are then."""
        release_gathered(self)
        self._layers_to_come = True

    def copy_master_to_model(self) -> None:
        """Copy the master weights into the shares' weights."""
        self.release()
        self.module.install_optimized_model_weights()

    def copy_model_to_master(self) -> None:
        """Copy the shares' weights into the master weights."""
        for share in self.shares.values():
            share.master.copy_(share.weight)


def _shares(group: Any) -> Iterator[tuple[nn.Parameter, Share]]:
    """The shares of a group of parameters whose numbers lie in one buffer."""
    weights = group.model_weight_buffer
    for index, parameter in enumerate(group.params):
        buffers = weights, group.main_weight_buffer, group.main_grad_buffer
        yield (
            parameter,
            Share(begin_of_share(weights, index), *(buffer.get_item(index, only_shard=True) for buffer in buffers)),
        )
