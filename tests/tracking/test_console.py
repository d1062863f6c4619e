import io
import logging

import pytest
from rich.console import Console

from w2s.launch import show_notes
from w2s.tracking.console import RunConsole, metric_text, say


def terminal(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=is_terminal, width=60, highlight=False), text


def test_plain_lines_are_not_broken() -> None:
    console, text = terminal(is_terminal=False)
    run = RunConsole("clip", 200, 0, console)
    run.log(100, {f"metric_{index}": 0.5 for index in range(10)})
    run.close()
    (line,) = text.getvalue().splitlines()
    assert line.startswith("clip  step 100/200  metric_0 0.5") and "eta 0:00:0" in line


def test_a_terminal_gets_a_bar_that_is_taken_away() -> None:
    console, text = terminal(is_terminal=True)
    run = RunConsole("clip", 200, 0, console)
    run.log(100, {"loss": 1.0})
    run.log(150, {"loss": 0.5})
    run.close()
    assert "150/200" in text.getvalue() and "left" in text.getvalue()
    assert text.getvalue().rstrip("\n").endswith("\x1b[2K")  # the bar's line is erased


def test_no_time_is_promised_before_a_step_was_made() -> None:
    console, text = terminal(is_terminal=False)
    RunConsole("mim", 100, 40, console).log(40, {"loss": 1.0})
    assert text.getvalue() == "mim  step  40/100  loss 1\n"


def test_a_stage_without_steps() -> None:
    console, text = terminal(is_terminal=False)
    RunConsole("eval", 0, 0, console).log(0, {"zero_shot/top1": 0.104})
    assert text.getvalue() == "eval  zero-shot top-1 0.104\n"


def test_of_an_evaluation_only_the_headlines_are_shown() -> None:
    console, text = terminal(is_terminal=False)
    metrics = {
        "zero_shot/top1": 0.0123456,
        "zero_shot/top5": 0.25,
        "zero_shot/chance_top1": 0.001,
        "retrieval/image_to_text_recall_at_1": 0.5,
        "retrieval/image_to_text_recall_at_5": 0.75,
        "retrieval/text_to_image_recall_at_1": 0.625,
        "knn/top1": 0.2,
        "knn/coverage": 1.0,
        "knn_random/top1": 0.1,
    }
    RunConsole("clip", 6, 0, console).log(0, metrics)
    assert text.getvalue() == (
        "clip  step 0/6  zero-shot top-1 0.01235  top-5 0.25  image-to-text R@1 0.5  text-to-image R@1 0.625  "
        "k-NN top-1 0.2\n"
    )


def test_the_masked_stage_and_unreadable_samples() -> None:
    console, text = terminal(is_terminal=False)
    metrics = {"test/masked_cosine": 0.75, "test/constant_cosine": 0.5, "bad/decode": 2.0}
    RunConsole("mim", 6, 6, console).log(6, metrics)
    assert text.getvalue() == "mim  step 6/6  masked cosine 0.75  (constant prediction: 0.5)  bad/decode 2\n"


def test_sources_beside_their_weights() -> None:
    console, text = terminal(is_terminal=False)
    metrics = {"source/laion/samples": 812.0, "source/laion/share": 0.812, "source/laion/weight": 0.8}
    RunConsole("mim", 6, 0, console).log(6, metrics)
    assert text.getvalue() == "mim  step 6/6  laion 81.2%  (weight 80.0%)\n"


def test_units() -> None:
    values = {"samples_per_second": 1234.5, "data_wait": 0.126, "memory_gib": 1.234, "lr": 4e-4, "loss": -0.123456}
    shown = [metric_text(name, value) for name, value in values.items()]
    assert shown == ["1,234 samples/s", "wait 13%", "1.23 GiB", "lr 4.00e-04", "loss -0.1235"]


def test_a_narrow_terminal_breaks_no_words() -> None:
    console, text = terminal(is_terminal=True)
    path = "/a/folder/with/a/very/long/name/that/no/terminal/shows/in/one/line.html"
    say(console, f"mim  step 10/40  loss -0.5  grad 1.250  lr 1.00e-03  wait 3%  memory 1.23 GiB  report: {path}")
    sentence = "a sentence that is longer than the terminal is wide, which has to be broken between words only"
    say(console, sentence)
    lines = text.getvalue().splitlines()
    assert lines[0] == "mim  step 10/40  loss -0.5  grad 1.250  lr 1.00e-03  wait 3%"
    assert lines[1] == "  memory 1.23 GiB  report:"
    assert lines[2] == f"  {path}"
    assert all(len(line) <= 60 for line in lines if path not in line)
    assert " ".join(lines[3:]).split() == sentence.split()


def test_a_note_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich takes standard output over while a bar is there: a note has to go through what stands there then."""
    console, text = terminal(is_terminal=True)
    monkeypatch.setattr(logging.getLogger("w2s"), "handlers", [])
    show_notes()
    run = RunConsole("clip", 200, 0, console)
    run.log(100, {"loss": 1.0})
    logging.getLogger("w2s.data").info("a shard is built")
    run.close()
    assert "note: a shard is built\n" in text.getvalue()
