"""Where the stream stands: what a checkpoint keeps of it, joined over the ranks, and resumed by any number of them."""

from collections.abc import Sequence
from typing import Any

from w2s.config.sections import DataConfig
from w2s.data.stream.lanes import LaneState
from w2s.data.stream.phases import Phase
from w2s.data.stream.reader import LaneStates
from w2s.data.stream.sources import Source
from w2s.errors import DataError

Position = dict[str, Any]
"""Step, order of samples and the state of each lane in each source, for JSON."""

_VERSION = 2
"""Of the order of samples: positions of another one mean other samples."""


def merge_positions(positions: Sequence[Position]) -> Position:
    """Join the positions of all ranks after the same step into one that any rank can continue from.

    Raises:
        DataError: positions of different steps or of different orders of samples.
    """
    first = positions[0]
    for other in positions:
        if other["step"] != first["step"] or other["order"] != first["order"]:
            raise DataError(
                f"data positions of steps {first['step']} and {other['step']} do not belong together: "
                "merge what all ranks gave after the same step"
            )
    return first | {"lanes": {lane: states for each in positions for lane, states in each["lanes"].items()}}


def describe_order(
    data: DataConfig, sources: Sequence[Source], phases: Sequence[Phase], global_batch: int, seed: int
) -> dict[str, Any]:
    """Return all that the order of samples depends on, under the names that a user knows."""
    return {
        "version": _VERSION,
        "data.lanes": data.lanes,
        "data.shuffle": data.shuffle,
        "data.replacement": data.replacement,
        "train.global_batch": global_batch,
        "run.seed": seed,
        "data.train": ", ".join(f"{len(source.shards)} shards {source.digest}" for source in sources),
        "data.weights": [[phase.first, *phase.weights] for phase in phases],
    }


def restore_lanes(position: Position | None, order: dict[str, Any], lanes: range) -> dict[int, LaneStates]:
    """Return where lanes stand in each source.

    Raises:
        DataError: a position of another order of samples, of other lanes, or a damaged one.
    """
    if position is None:
        return {lane: {} for lane in lanes}
    try:
        version = position["order"].get("version", 1)
        if version != _VERSION:
            raise DataError(
                f"the checkpoint stands in the sample order of another w2s ({version}, this one's is {_VERSION}): "
                "finish the run with that, or start a new one from its weights, such as by init.vision=RUN"
            )
        for key, value in order.items():
            if position["order"].get(key) != value:
                raise DataError(
                    f"cannot continue with {key}={value}: the run began with {key}={position['order'].get(key)}, "
                    "keep that or start a new run"
                )
        missing = [lane for lane in lanes if str(lane) not in position["lanes"]]
        if not isinstance(position["step"], int):
            raise TypeError("a step is a number")
        if missing:
            raise DataError(f"the data position has no lane {missing[0]}: merge the positions of all ranks first")
        return {
            lane: {int(source): LaneState(**state) for source, state in position["lanes"][str(lane)].items()}
            for lane in lanes
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError("the data position of the checkpoint is damaged: use another checkpoint") from error
