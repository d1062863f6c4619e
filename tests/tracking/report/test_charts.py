from typing import Any

from w2s.tracking.report.charts import Chart, Curve, charts, comparing


def lines(**metrics: list[float | None]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, one for each value."""
    length = max(map(len, metrics.values()))
    return [
        {"step": step, "samples_seen": 4 * step, "time": 1.0}
        | {name: values[step] for name, values in metrics.items() if step < len(values)}
        for step in range(length)
    ]


def shown(drawn: list[Chart]) -> dict[str, list[str]]:
    """Labels by title; in brackets what is dotted."""
    return {chart.title: [f"({c.label})" if c.dotted else c.label for c in chart.curves] for chart in drawn}


def test_what_belongs_together_is_in_one_chart_and_the_loss_comes_first() -> None:
    records = lines(
        lr=[0.1, 0.2],
        custom=[1.0, 2.0],
        **{"test/masked_cosine": [0.5, 0.6], "test/constant_cosine": [0.3, 0.3], "constant_cosine": [0.2, 0.3]},
        loss=[-0.4, -0.5],
        **{"source/a/share": [0.5, 0.4], "source/b/share": [0.5, 0.6]},
    )
    drawn, figures = charts(records)
    assert shown(drawn) == {
        "loss": ["training"],
        "cosine with the teacher's features": [
            "training",
            "test, masked patches",
            "(best constant, training)",
            "(best constant, test)",
        ],
        "learning rate": ["highest"],
        "share of each source": ["a", "b"],
        "custom": ["custom"],
    }
    assert [curve.colour for curve in drawn[1].curves] == [0, 1, 0, 1]
    # The loss is the negative cosine where that is not logged beside it.
    assert drawn[1].curves[0].values == [0.4, 0.5]
    assert figures == {}


def test_each_of_several_teachers_has_charts_of_its_own() -> None:
    names = ["cosine", "constant_cosine", "test/masked_cosine", "summary_cosine"]
    records = lines(loss=[1.0, 0.5], **{f"{who}/{name}": [0.2, 0.3] for who in ("a", "b") for name in names})
    drawn, _ = charts(records)
    of_features = ["training", "test, masked patches", "(best constant, training)"]
    assert shown(drawn) == {
        "loss": ["training"],
        "a: cosine with the teacher's features": of_features,
        "a: cosine with the teacher's summary": ["training"],
        "b: cosine with the teacher's features": of_features,
        "b: cosine with the teacher's summary": ["training"],
    }


def test_what_does_not_change_is_a_figure() -> None:
    drawn, figures = charts(lines(loss=[1.0, 0.5], memory_gib=[1.2301, 1.2303], teacher_images_per_rank=[64.0, 64.0]))
    assert list(shown(drawn)) == ["loss"]
    assert figures == {"memory_gib": 1.2301, "teacher_images_per_rank": 64.0}


def test_what_was_logged_once_and_fp8_of_every_layer_have_no_curve() -> None:
    drawn, figures = charts(lines(loss=[1.0], **{"fp8/vision.0/x": [1.0, 2.0]}))
    assert (drawn, figures) == ([], {})


def test_runs_are_compared_over_their_samples_and_keep_their_colours() -> None:
    runs = {"a": lines(loss=[3.0, 2.0], x=[1.0, 2.0]), "b": lines(loss=[3.0, None]), "c": lines(x=[1.0, 3.0])}
    losses, x = comparing(runs)
    assert (losses.title, losses.over, x.title) == ("loss", "training samples", "x")
    assert [(curve.label, curve.colour, curve.steps) for curve in losses.curves] == [("a", 0, [0, 4]), ("b", 1, [0, 4])]
    assert [(curve.label, curve.colour) for curve in x.curves] == [("a", 0), ("c", 2)]


def test_what_the_page_draws_is_thinned_and_keeps_its_gaps() -> None:
    values = [1 / 3, None, *([1.0] * 898)]
    curve = Curve("a", list(range(900)), values, colour=8, dotted=True)
    drawn = Chart("loss", [curve, Curve("b", [0, 1, 2], [0.5, None, 1.0])]).data()
    assert drawn["over"] == "step"
    assert drawn["curves"][0]["x"][:3] == [0, 2, 4] and drawn["curves"][0]["y"][0] == 0.333333
    assert (drawn["curves"][0]["variable"], drawn["curves"][0]["dotted"]) == ("--curve-1", True)
    assert drawn["curves"][1]["y"] == [0.5, None, 1.0]
