"""Distributed save and load of towers, optimizer and small extra state, which any layout can read.

Every rank writes and reads its own share of the optimizer's state, and of the weights, by Megatron's and torch's
distributed checkpoints; nothing is gathered.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor, nn

from w2s.config.sections import Weights
from w2s.errors import CheckpointError
from w2s.megatron.checkpoint.async_save import AsyncSave, translated_errors
from w2s.megatron.checkpoint.safe_unpickling import COMMON, check_common, check_state, read_metadata
from w2s.megatron.checkpoint.tensor_store import AVERAGE, TensorStore, has_average
from w2s.megatron.parallel.fully_sharded import FullySharded
from w2s.megatron.parallel.optimizer import Optimizer, Towers
from w2s.megatron.parallel.process_groups import gather
from w2s.megatron.parallel.shard_boxes import joined, sharded_boxes, sharded_tensors
from w2s.megatron.parallel.sharded import unsharded

_KINDS = ("weights", "scales", "optimizer", "average", "guard", "extra")
"""What a rank holds of a training."""


def save(
    folder: Path, towers: Towers, optimizer: Optimizer, extra: Mapping[str, Tensor], background: bool = False
) -> AsyncSave:
    """Begin to write towers, optimizer and extra tensors (equal on all ranks) into an existing empty folder.

    Tensors are named `TOWER.PARAMETER`, layers numbered over the whole model, so that any layout can read them. Every
    rank writes its share of them, calls, and then `finish` of what it gets.

    Raises:
        CheckpointError: the files cannot be written.
    """
    return AsyncSave(folder, _sharded_state(towers, optimizer, extra), background)


def written_bytes(towers: Towers, optimizer: Optimizer, extra: Mapping[str, Tensor]) -> int:
    """Return the bytes of the shares that `save` writes on this rank, which the host holds until they are written."""
    parts = sharded_tensors(_sharded_state(towers, optimizer, extra))
    return sum(part.data.nbytes for part in parts if is_main_replica(part.replica_id))


def _sharded_state(towers: Towers, optimizer: Optimizer, extra: Mapping[str, Tensor]) -> dict[str, Any]:
    weights = _weights(towers)
    return {
        **_own_shares(_only(weights, lambda part: not _is_empty(part)), optimizer),
        "optimizer": optimizer.sharded.sharded_state_dict(weights, metadata=_metadata()),
        **_average(weights, optimizer),
        "guard": optimizer.guard.state(),
        "extra": dict(extra),
    }


def load(folder: Path, towers: Towers, optimizer: Optimizer, step: int) -> dict[str, Tensor]:
    """Read what `save` wrote after `step` updates, at any layout; return the extra tensors.

    An average begins at the weights that are read where the checkpoint has none; one that is not kept is not read.

    Raises:
        CheckpointError: the files are damaged.
    """
    with unsharded(towers.values()):
        weights = _weights(towers)
        optimizer.prepare_to_load()
        wanted = optimizer.sharded.sharded_state_dict(weights, is_loading=True, metadata=_metadata())
        average = _average(weights, optimizer) if optimizer.average is not None and has_average(folder) else {}
        # Weights are made of master weights; scales of FP8 are not there where other linears wrote the checkpoint.
        known = read_metadata(folder).state_dict_metadata

        def is_read(part: Any) -> bool:
            return not _is_shared(part) and (not isinstance(part, ShardedObject) or part.unique_key in known)

        state = _load({**_only(weights, is_read), "optimizer": wanted, **average}, folder)
        if "extra" not in state:
            raise CheckpointError(f"{folder / COMMON} is not that of a training: use another checkpoint")
        _into_towers(towers, state)
    if "guard" in state:  # checkpoints of older releases have none
        optimizer.guard.load(state["guard"])
    optimizer.load(state["optimizer"], step)
    optimizer.copy_master_to_model()
    _take_average(optimizer, [joined(boxes) for boxes in state.get("average", {}).values()])
    extra: dict[str, Tensor] = state["extra"]
    return extra


def own_tensors(towers: Towers, optimizer: Optimizer, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all that this rank holds of a training, as it lies there; the same layout alone can take it up."""
    return {
        **{f"weights.{name}": tensor for name, tensor in _own_weights(towers).items()},
        **{f"scales.{name}": tensor for name, tensor in _own_scales(towers).items()},
        **{f"optimizer.{name}": tensor for name, tensor in optimizer.slices().items()},
        **{f"average.{index}": tensor for index, tensor in enumerate(_own_average(optimizer).values())},
        **{f"guard.{name}": tensor for name, tensor in optimizer.guard.state().items()},
        **{f"extra.{name}": tensor for name, tensor in extra.items()},
    }


@torch.no_grad()
def restore(tensors: Mapping[str, Tensor], towers: Towers, optimizer: Optimizer, step: int) -> dict[str, Tensor]:
    """Take up what `own_tensors` gave after `step` updates, an average as `load` does; return the extra tensors.

    Raises:
        CheckpointError: they are another layout's.
    """
    kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        kinds[kind][rest] = tensor
    optimizer.guard.load(kinds["guard"])
    for held, local in ((kinds["weights"], _own_weights(towers)), (kinds["optimizer"], optimizer.slices())):
        if {name: part.shape for name, part in held.items()} != {name: part.shape for name, part in local.items()}:
            raise CheckpointError("the checkpoint in memory is another layout's: leave checkpoint.memory out")
        for name, part in local.items():
            part.copy_(held[name])
    _take_scales(towers, kinds["scales"])
    for tower in towers.values():
        for wrapped in tower.wrapped:
            if isinstance(wrapped, FullySharded):
                wrapped.release()
    averages = kinds["average"]
    _take_average(optimizer, [averages[str(index)] for index in range(len(averages))])
    optimizer.resume_at(step)
    return kinds["extra"]


def _own_weights(towers: Towers) -> dict[str, Tensor]:
    """Weights and buffers of this rank's chunks, by tower, number of the chunk, and name: the tensors themselves.

    Of weights that are fully sharded it is this rank's shares.
    """
    return {
        f"{name}.{index}.{key}": tensor.data
        for name, tower in towers.items()
        for index, (chunk, wrapped) in enumerate(zip(tower.chunks, tower.wrapped, strict=True))
        for key, tensor in (*_parameters_of(chunk, wrapped), *chunk.named_buffers())
    }


def _parameters_of(chunk: nn.Module, wrapped: nn.Module) -> Iterator[tuple[str, Tensor]]:
    shares = wrapped.shares if isinstance(wrapped, FullySharded) else {}
    for name, parameter in chunk.named_parameters():
        yield name, shares[parameter].weight if parameter in shares else parameter


def _own_scales(towers: Towers) -> dict[str, Tensor]:
    """Scales of FP8 of this rank's chunks, by tower, number of the chunk, and name."""
    return {
        f"{name}.{index}.{key}": value
        for name, tower in towers.items()
        for index, chunk in enumerate(tower.chunks)
        for key, value in chunk.state_dict().items()
        if key.endswith("_extra_state") and isinstance(value, Tensor) and value.numel()
    }


def _take_scales(towers: Towers, scales: Mapping[str, Tensor]) -> None:
    for name, tower in towers.items():
        for index, chunk in enumerate(tower.chunks):
            prefix = f"{name}.{index}."
            local = {key.removeprefix(prefix): value for key, value in scales.items() if key.startswith(prefix)}
            for key, value in local.items():
                check_state(value, key)
            chunk.load_state_dict(local, strict=False)


def load_weights(folder: Path, towers: Towers, names: Iterable[str], weights: Weights = "last") -> None:
    """Read the named tensors (`TOWER.PARAMETER`), or their moving average, into the towers; others keep their values.

    Raises:
        CheckpointError: the files are damaged, or have no average.
    """
    names, keys = set(names), TensorStore(folder, weights).keys if weights == "ema" else {}

    def placed(parts: Mapping[str, Any]) -> dict[str, ShardedTensor]:
        local = {key: part for key, part in parts.items() if isinstance(part, ShardedTensor) and part.key in names}
        return {key: replace(part, key=keys.get(part.key, part.key)) for key, part in local.items()}

    with unsharded(towers.values()):
        wanted = {chunk: placed(parts) for chunk, parts in _weights(towers).items()}
        _into_towers(towers, _load(wanted, folder))


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every weight in a checkpoint, by name; optimizer states are left out."""
    return {name: tuple(tensor.shape) for name, tensor in TensorStore(folder).meta.items()}


def tower_shapes(towers: Towers) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every weight of the towers on any pipeline stage, by name; every rank calls."""
    local = {part.key: tuple(part.global_shape) for part in sharded_tensors(_weights(towers))}
    everywhere = gather(local, parallel_state.get_pipeline_model_parallel_group())
    return {name: shape for shapes in everywhere for name, shape in shapes.items()}


def _load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    check_common(folder)
    try:
        with translated_errors(f"read {folder}", "use another checkpoint"):
            state = dist_checkpointing.load(wanted, str(folder))
    # A connection to a rank that died is a RuntimeError, and no fault of the files.
    except (CheckpointingException, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"cannot read {folder} ({reason}): use another checkpoint") from error
    _check_states(state, folder)
    return state


def _check_states(state: Mapping[str, Any], folder: Path) -> None:
    """Refuse scales of FP8 that would run code when Transformer Engine unpickles them."""
    for parts in state.values():
        for key, value in parts.items() if isinstance(parts, Mapping) else ():
            if str(key).endswith("_extra_state"):
                check_state(value, f"{folder}: {key}")


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _weights(towers: Towers) -> dict[str, Any]:
    """Describe every weight that this rank holds, by tower and chunk; names and layer numbers are global.

    Beside its weight each linear has a place for scales of FP8, a `ShardedObject`.
    """
    return {
        f"{name}/{index}": chunk.sharded_state_dict(prefix=f"{name}.", metadata=_metadata())
        for name, tower in towers.items()
        for index, chunk in enumerate(tower.chunks)
    }


def _only(weights: dict[str, Any], wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Leave out what is not wanted of each chunk."""
    return {chunk: {key: part for key, part in parts.items() if wanted(part)} for chunk, parts in weights.items()}


def _is_empty(part: Any) -> bool:
    """Whether it is the place for the scales of a linear that has none."""
    return isinstance(part, ShardedObject) and (part.data is None or len(part.data) == 0)


def _own_shares(weights: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Describe of each weight what this rank's share of the optimizer's state has of it."""
    ranges = optimizer.sharded.ranges()

    def share(part: ShardedTensor) -> list[ShardedTensor]:
        begin, values = ranges.get(part.data, (0, torch.empty(0)))
        return sharded_boxes(part, part.key, values, begin)

    shares = {
        chunk: {key: share(part) if _is_shared(part) else part for key, part in parts.items()}
        for chunk, parts in weights.items()
    }
    return _only(shares, lambda part: part != [])


def _average(weights: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Describe what this rank holds of the average of each weight; nothing where none is kept."""
    if optimizer.average is None:
        return {}
    whole, ranges = {part.data: part for part in sharded_tensors(weights)}, optimizer.sharded.ranges()
    parts = {
        index: sharded_boxes(whole[parameter], f"{AVERAGE}{whole[parameter].key}", local, ranges[parameter][0])
        for index, (parameter, local) in enumerate(_own_average(optimizer).items())
    }
    return {"average": parts}


def _own_average(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """This rank's slices of the average by parameter: the tensors themselves; none where no average is kept."""
    average = optimizer.average
    return {} if average is None else {p: average[local] for p, local in optimizer.sharded.slices().items()}


def _take_average(optimizer: Optimizer, saved: Sequence[Tensor]) -> None:
    """Take up the slices of a checkpoint; where it has none the average begins at the weights."""
    if optimizer.average is not None and not saved:
        optimizer.average.restart()
    elif optimizer.average is not None:
        for local, held in zip(_own_average(optimizer).values(), saved, strict=True):
            local.copy_(held)


def _is_shared(part: Any) -> bool:
    """Whether it is a weight of which each data-parallel rank has a share.

    What is not trained is nobody's, and weights in FP8 have scales for the whole.
    """
    trained = isinstance(part, ShardedTensor) and isinstance(part.data, nn.Parameter) and part.data.requires_grad
    return trained and not is_float8tensor(part.data)


def _into_towers(towers: Towers, state: Mapping[str, Any]) -> None:
    for name, tower in towers.items():
        for index, part in enumerate(tower.chunks):
            # A chunk of which nothing was read is not there.
            local = {key.removeprefix(f"{name}."): value for key, value in state.get(f"{name}/{index}", {}).items()}
            with torch.no_grad():
                part.load_state_dict(local, strict=False)
