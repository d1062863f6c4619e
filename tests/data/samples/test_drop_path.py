import numpy as np
import pytest

from w2s.data.samples.drop_path import branch_scales
from w2s.data.samples.random_numbers import Purpose, generator


def test_probabilities_rise_linearly_and_the_mean_stays() -> None:
    scales = np.stack([branch_scales(generator(0, Purpose.BRANCHES, index), 5, 0.4) for index in range(20_000)])
    assert scales.shape == (20_000, 5, 2) and scales.dtype == np.float32
    for layer, dropped in enumerate((0, 0.1, 0.2, 0.3, 0.4)):
        values, counts = np.unique(scales[:, layer], return_counts=True)
        assert values == pytest.approx([1] if layer == 0 else [0, 1 / (1 - dropped)])
        # 40,000 draws: a standard error of 0.0025 at most
        assert counts[-1] / 40_000 == pytest.approx(1 - dropped, abs=0.01)
    assert np.corrcoef(scales[:, -1].T)[0, 1] == pytest.approx(0, abs=0.03), "both branches have a draw of their own"


def test_one_layer_is_never_left_out() -> None:
    assert (branch_scales(generator(0, Purpose.BRANCHES, 0), 1, 0.9) == 1).all()
