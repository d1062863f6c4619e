"""The shipped suites, and what is refused of a file."""

from pathlib import Path
from statistics import fmean

import pytest

from w2s.config.suites import columns, load_suite
from w2s.errors import ConfigError

SHIPPED = {"clip27": 27, "imagenet_robust": 6, "retrieval": 2, "video": 4}
PAPER = {
    "clip27": {"EVA-02-CLIP-E/14+": 78.7, "EVA-CLIP-8B": 79.4, "EVA-CLIP-18B": 80.7},
    "imagenet_robust": {"EVA-02-CLIP-E/14+": 81.1, "EVA-CLIP-8B": 82.9, "EVA-CLIP-18B": 83.6},
    "retrieval": {"EVA-02-CLIP-E/14+": 85.7, "EVA-CLIP-8B": 86.2, "EVA-CLIP-18B": 87.8},
    "video": {"EVA-02-CLIP-E/14+": 72.1, "EVA-CLIP-8B": 73.6, "EVA-CLIP-18B": 75.0},
}
"""The means that the paper prints in its tables 2, 6, 3 and 5."""


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_suites_have_the_papers_means(name: str) -> None:
    suite = load_suite(name)
    assert len(suite.sets) == SHIPPED[name]
    assert len({one.folder for one in suite.sets}) == len(suite.sets)
    # Its figures have one decimal: their mean is off by 0.05 at most, and it prints that with one decimal.
    assert {model: fmean(figures) for model, figures in suite.published.items()} == pytest.approx(PAPER[name], abs=0.1)


def test_texts_are_retrieved_from_all_sets_before_images() -> None:
    titles = [column.title for column in columns(load_suite("retrieval"))]
    assert titles[:4] == ["Flickr30K text R@1", "Flickr30K text R@5", "Flickr30K text R@10", "COCO text R@1"]
    assert titles[6] == "Flickr30K image R@1" and len(titles) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\nsetz: []", "unknown key setz: did you mean sets?"),
        ("title: x\nsets: [{name: a, folders: b}]", "unknown key folders: did you mean folder?"),
        ("title: x\nsets: [{name: a, metric: accuracy}]", "metric: Invalid value 'accuracy'"),
        ("title: x\nsets: []", "sets are named []: give at least one"),
        ("title: x\nsets: [{name: a}, {name: a}]", "each with a name of its own"),
        ("title: x\nsets: [{name: a/b}]", "'a/b' is not a name of a test set"),
        ("title: x\nsets: [{name: pets}]\nmeans: [{name: m, title: m, of: [pet]}]", "no set pet: did you mean pets?"),
        ("title: x\nsets: [{name: a, metric: recall}]\npublished: {m: [1]}", "m has 1 numbers for 6 columns"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_suite(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"suite=clip72 does not exist: did you mean suite=clip27\?"):
        load_suite("clip72")
