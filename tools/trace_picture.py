"""Draw a trace that `w2s rehearse --trace` has written: a row for each track of each rank.

python tools/trace_picture.py TRACE.json OUT.png
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

COLOURS = {"forward": "C0", "backward": "C1", "teacher": "C4", "optimizer": "C3", "rest": "0.7"}


def main(
    trace: Annotated[Path, typer.Argument(help="What --trace has written.")],
    out: Annotated[Path, typer.Argument(help="The picture.")],
) -> None:
    """Draw the spans of each track."""
    events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    longest = max(span["dur"] for span in spans)
    busy = {(span["pid"], span["tid"]) for span in spans if span["dur"] > longest / 1000}
    used = [track for track in tracks if track in busy]
    figure = Figure(figsize=(13, 1 + 0.22 * len(used)), layout="constrained")
    panel = figure.add_subplot()
    for row, track in enumerate(used):
        for span in spans:
            if (span["pid"], span["tid"]) == track:
                colour = COLOURS.get(span["name"], "C2")
                panel.barh(row, span["dur"] / 1e3, left=span["ts"] / 1e3, height=0.8, color=colour, linewidth=0)
    panel.set_yticks(range(len(used)), [f"{processes[track[0]]}: {tracks[track]}" for track in used], fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel("ms", fontsize=8)
    handles = [panel.barh(0, 0, color=colour, label=name) for name, colour in {**COLOURS, "calls": "C2"}.items()]
    panel.legend(
        handles=handles, fontsize=7, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1), frameon=False
    )
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    typer.run(main)
