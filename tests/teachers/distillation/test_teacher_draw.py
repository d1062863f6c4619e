"""Which teachers a sample has: a function of seed and number, by shares and sources."""

import numpy as np
import pytest

from w2s.config.load import load
from w2s.config.sections import Config
from w2s.errors import ConfigError
from w2s.teachers.distillation.teacher_draw import TeacherDraw, group_indices

TWO = "teachers=[{name: big, share: 3}, {name: small}]"
MIX = ["data.train=a/one/*.tar::a/two/*.tar", "data.weights=[0.75,0.25]"]


def configured(*overrides: str) -> Config:
    return load("mim", ["data.builtin=none", "train.global_batch=4096", "train.steps=10", *overrides])


def draw_of(*overrides: str) -> TeacherDraw:
    draw = TeacherDraw.of(configured(*overrides))
    assert draw is not None
    return draw


def test_without_sources_and_draws_every_sample_has_every_teacher() -> None:
    assert TeacherDraw.of(configured("teachers=[{name: big}, {name: small}]", *MIX)) is None
    assert TeacherDraw.of(configured()) is None
    assert TeacherDraw.of(configured("teachers=[{name: big, sources: [one, two]}]", *MIX)) is None


def test_one_teacher_is_drawn_by_shares() -> None:
    draw = draw_of(TWO, "teachers.draw=one", "data.train=x/*.tar")
    drawn = draw.drawn(np.arange(4096, 8192))
    assert ((drawn > 0).sum(1) == 1).all()
    assert set(drawn[:, 0]) == {0, 4 / 3} and set(drawn[:, 1]) == {0, 4}
    assert (drawn[:, 0] > 0).sum() == 3072
    assert draw.shares() == [0.75, 0.25]


def test_a_draw_depends_on_the_seed_and_the_number_of_the_sample_alone() -> None:
    options = [TWO, "teachers.draw=one", *MIX]
    whole = draw_of(*options).drawn(np.arange(4096, 8192))
    again = draw_of(*options)
    for data_rank in range(4):
        of_group = group_indices(4096 + data_rank + 4 * 7, 4096, 4)
        assert (of_group == np.arange(4096 + data_rank, 8192, 4)).all()
        assert (again.drawn(of_group) == whole[data_rank::4]).all()
    assert (draw_of(*options).drawn(np.arange(4096)) != whole).any(), "another step"
    assert (draw_of(*options, "run.seed=1").drawn(np.arange(4096, 8192)) != whole).any()


@pytest.mark.parametrize("groups", [1, 4, 64, 256, 1024])
@pytest.mark.parametrize("share", [1, 2, 3.7])
def test_every_data_parallel_group_has_as_many_samples_of_a_teacher_as_its_share_wants(
    groups: int, share: float
) -> None:
    draw = draw_of(TWO, f"teachers.big.share={share}", "teachers.draw=one", "data.train=x/*.tar")
    for step in range(8):
        has = draw.drawn(np.arange(4096 * step, 4096 * (step + 1)))[:, 0] > 0
        counts = [has[group::groups].sum() for group in range(groups)]
        assert np.abs(np.array(counts) - 4096 / groups * share / (1 + share)).max() < 1 + 1e-6


def test_every_sample_of_a_step_may_have_either_teacher() -> None:
    """Over 4,000 steps the first, a middle and the last have the share of 3/4, within three standard deviations."""
    draw = draw_of(TWO, "teachers.draw=one", "data.train=x/*.tar")
    found = [draw.drawn(4096 * step + np.array([0, 2048, 4095]))[:, 0] > 0 for step in range(4000)]
    assert np.abs(np.mean(found, axis=0) - 0.75).max() <= 3 * (0.75 * 0.25 / 4000) ** 0.5


def test_a_teacher_of_one_source_has_no_other_samples() -> None:
    """The samples of the source count alike for both, as the other source's have one teacher each."""
    draw = draw_of("teachers=[{name: big}, {name: small, sources: [two]}]", "teachers.draw=one", *MIX)
    drawn = draw.drawn(np.arange(4096))
    assert set(drawn[:, 0]) == {0, 1, 2} and set(drawn[:, 1]) == {0, 2}
    assert (drawn[:, 1] > 0).mean() == pytest.approx(0.125, abs=3 * (0.125 * 0.875 / 4096) ** 0.5)
    assert draw.shares() == [0.875, 0.125]
    both = draw_of("teachers=[{name: big}, {name: small, sources: [two]}]", *MIX)
    assert both.shares() == [1.0, 0.25]
    second = both.drawn(np.arange(4096))[:, 1]
    assert set(second) == {0, 1} and second.mean() == pytest.approx(0.25, abs=0.03)


def test_shares_are_those_of_all_phases() -> None:
    """Of 10 steps 4 draw from the first source alone, and 6 from the second."""
    phases = "data.phases=[{train: a/one/*.tar, samples: 16384}, {train: a/two/*.tar}]"
    draw = draw_of("teachers=[{name: big, sources: [one]}, {name: small, sources: [two]}]", phases)
    assert draw.shares() == pytest.approx([0.4, 0.6])
    assert (draw.drawn(np.arange(4))[:, 1] == 0).all()
    assert (draw.drawn(np.arange(16384, 16388))[:, 0] == 0).all()
    assert draw.in_first_batch() == [4096, 0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["big.sources=[onne]", *MIX], r"big has sources=\[onne\]: did you mean one\? There are one, two"),
        (["big.sources=[two]", "data.train=a/one/*.tar"], r"There are one \(one pool: data.weights"),
        (["big.sources=[one]", "teachers.small.sources=[one]", *MIX], "none is for the source two"),
    ],
)
def test_sources_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    first, *others = overrides
    with pytest.raises(ConfigError, match=message):
        TeacherDraw.of(configured("teachers=[{name: big}, {name: small}]", f"teachers.{first}", *others))
