"""The terminal: a progress bar with the time that is left, and a line for every log call."""

import datetime
import textwrap
import time
from collections.abc import Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from w2s.redaction import shown

_FORMATS = {
    "teacher_images_per_rank": "teacher {:.0f} images/rank",
    "grad_norm": "grad {:.3f}",
    "lr": "lr {:.2e}",
    "samples_per_second": "{:,.0f} samples/s",
    "seconds_per_step": "{:.3g} s/step",
    "data_wait": "wait {:.0%}",
    "memory_gib": "{:.2f} GiB",
    "fp8_saturation": "fp8 saturation {:.2%}",
    "fp8_underflow": "fp8 underflow {:.2%}",
    "constant_cosine": "(constant prediction: {:.4g})",
    "cosine": "cosine {:.4g}",
    "summary_cosine": "summary cosine {:.4g}",
    "summary_constant_cosine": "(constant: {:.4g})",
    "test/masked_cosine": "masked cosine {:.4g}",
    "test/visible_cosine": "visible cosine {:.4g}",
    "test/all_cosine": "cosine {:.4g}",
    "test/unmasked_cosine": "unmasked cosine {:.4g}",
    "test/constant_cosine": "(constant prediction: {:.4g})",
    "test/summary_cosine": "summary cosine {:.4g}",
    "test/summary_constant_cosine": "(constant: {:.4g})",
    "knn/top1": "k-NN top-1 {:.4g}",
    "zero_shot/top1": "zero-shot top-1 {:.4g}",
    "zero_shot/top5": "top-5 {:.4g}",
    "retrieval/image_to_text_recall_at_1": "image-to-text R@1 {:.4g}",
    "retrieval/text_to_image_recall_at_1": "text-to-image R@1 {:.4g}",
}


_JOINT = "\u00a0"
"""A space at which no line is broken."""


class RunConsole:
    """Shows how a run continues.

    Args:
        stage: name of the stage, the first word of every line.
        steps: last step; 0 for a stage without steps, which has no bar.
        resumed_step: step that the run continues from.
        console: terminal to print on.
    """

    def __init__(self, stage: str, steps: int, resumed_step: int, console: Console | None = None) -> None:
        self._stage = stage
        self._steps = steps
        self._first_step = resumed_step
        self._console = console or Console(highlight=False)
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints a line and moves the bar to `step`.

        Of the results, whose names have a prefix (`zero_shot/top1`), only the headlines are in the line.
        """
        left = self._time_left(step)
        parts = [self._stage]
        if self._steps:
            parts.append(f"step {step:>{len(str(self._steps))}}/{self._steps}")
        parts += [metric_text(name, value) for name, value in metrics.items() if _is_shown(name)]
        if left and not self._console.is_terminal:
            parts.append(f"eta {left}")
        self.print("  ".join(parts))
        if self._steps and self._console.is_terminal:
            self._move_bar(step, left)

    def print(self, content: RenderableType) -> None:
        """Prints a line without markup, line breaks or credentials, or anything that rich can draw."""
        if isinstance(content, str):
            say(self._console, content)
        else:
            self._console.print(content)

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if not self._steps or done <= 0 or step >= self._steps:
            return ""
        seconds = (time.monotonic() - self._began) * (self._steps - step) / done
        return str(datetime.timedelta(seconds=round(seconds)))

    def _move_bar(self, step: int, left: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task(self._stage, total=self._steps, left="")
            self._progress.start()
        self._progress.update(self._task, completed=step, left=f"{left} left" if left else "")


def say(console: Console, text: str) -> None:
    """Prints a line without markup or credentials, on a terminal broken between words only; elsewhere it stays one.

    Where `  ` separates the parts of a line, as in a log line, it is broken there first.
    """
    line = shown(text)
    if console.is_terminal:
        parts = [part.replace(" ", _JOINT) if len(part) + 2 <= console.width else part for part in line.split("  ")]
        wrapped = textwrap.wrap(
            "  ".join(parts), console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        line = "\n".join(wrapped).replace(_JOINT, " ")
    console.print(line, markup=False, soft_wrap=True)


def _is_shown(name: str) -> bool:
    of_teacher = name.count("/") == 1 and name.endswith(("/cosine", "/summary_cosine"))  # where there are several
    return name in _FORMATS or "/" not in name or name.startswith("bad/") or _is_share(name) or of_teacher


def _is_share(name: str) -> bool:
    return name.startswith("source/") and name.endswith(("/share", "/weight"))


def metric_text(name: str, value: float) -> str:
    """A metric as the log line shows it."""
    if _is_share(name):
        _, source, figure = name.split("/")
        return f"{source} {value:.1%}" if figure == "share" else f"(weight {value:.1%})"
    return _FORMATS.get(name, f"{name} {{:.4g}}").format(value)
