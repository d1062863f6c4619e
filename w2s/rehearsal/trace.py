"""A simulated rehearsal as a trace that Perfetto and chrome://tracing open."""

import json
from pathlib import Path
from typing import Any

from w2s.files import write_text
from w2s.rehearsal.kinds import stage_of
from w2s.rehearsal.rehearsal import Rehearsal
from w2s.rehearsal.timeline import GPU_LANE


def write_trace(path: Path, rehearsal: Rehearsal) -> None:
    """Write a process for each rank, with a track for its GPU and one for each kind of group.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, json.dumps({"traceEvents": _events(rehearsal), "displayTimeUnit": "ms"}))


def _events(rehearsal: Rehearsal) -> list[dict[str, Any]]:
    """Events of the Trace Event Format: names of processes and tracks, then spans in microseconds."""
    spans = rehearsal.timeline.spans
    lanes = [GPU_LANE, *sorted({span.lane for span in spans} - {GPU_LANE})]
    names: list[dict[str, Any]] = []
    for rank in sorted({span.rank for span in spans}):
        stage = stage_of(rank, rehearsal.config.parallel, rehearsal.world_size)
        about = {"name": f"pipeline stage {stage}, rank {rank}"}
        names.append({"ph": "M", "name": "process_name", "pid": rank, "args": about})
        names += [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": index, "args": {"name": lane}}
            for index, lane in enumerate(lanes)
        ]
    return names + [
        {
            "ph": "X",
            "name": span.name,
            "pid": span.rank,
            "tid": lanes.index(span.lane),
            "ts": 1e6 * span.begin,
            "dur": 1e6 * (span.end - span.begin),
        }
        for span in spans
    ]
