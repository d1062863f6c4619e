"""Images spread over ranks by what their teachers cost."""

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from w2s.config.load import load
from w2s.megatron.parallel import process_groups
from w2s.planning.model.teacher import planned_teachers
from w2s.teachers.distillation.load_balance import balance, balance_samples


@pytest.fixture(scope="module")
def costs() -> dict[str, float]:
    """Operations of an image, of real teachers: a factor of 560 between the first and the last."""
    names = {"eplus": "eva:eva02_e_plus", "so400m": "eva:vit_so400m_14_siglip", "lite0": "efficientnet_lite0"}
    entries = ", ".join(f"{{name: {name}, source: '{source}'}}" for name, source in names.items())
    config = load("mim", ["model=eva_s", f"teachers=[{entries}]"])
    return dict(zip(names, (each.flops for each in planned_teachers(config)), strict=True))


def loads(costs: list[float], shares: list[list[int]]) -> list[float]:
    return [sum(np.multiply(share, costs)) for share in shares]


@pytest.mark.parametrize("names", [["eplus", "lite0"], ["eplus", "so400m"], ["lite0", "so400m", "eplus"]])
@pytest.mark.parametrize("one", [True, False])
def test_no_rank_has_much_more_than_the_mean(costs: dict[str, float], names: list[str], one: bool) -> None:
    """At most one image more, which is less than a tenth from ten images of the dearest teacher per rank on."""
    rng, image_costs, held = np.random.default_rng(0), [costs[name] for name in names], 0
    for _ in range(300):
        ranks, images = int(2 ** rng.integers(1, 7)), int(rng.integers(1, 65))
        shares = rng.dirichlet(np.ones(len(names)))
        drawn = rng.multinomial(1, shares, ranks * images) if one else rng.random((ranks * images, len(names))) < shares
        counts = drawn.sum(0).tolist()
        shared = balance(image_costs, counts, ranks)
        work = loads(image_costs, shared)
        mean, dearest = sum(work) / ranks, max(cost for cost, count in zip(image_costs, counts, strict=True) if count)
        assert np.sum(shared, axis=0).tolist() == counts, "each image is seen once"
        assert max(work) <= mean + dearest
        if dearest <= mean / 10:
            held += 1
            assert max(work) <= 1.1 * mean
    assert held > 100


def test_the_cheap_fill_what_the_dear_leave() -> None:
    """Three images of 4 and four of 1 on two ranks: 8 and 4 + 4."""
    assert sorted(balance([1.0, 4.0], [4, 3], 2)) == [[0, 2], [4, 1]]
    assert balance([1.0, 4.0], [0, 0], 2) == [[0, 0], [0, 0]]


def test_ranks_put_together_what_each_has_seen() -> None:
    found = run_ranks(_joined, 3)
    expected = [[0.0, 10.0, 0.0, 30.0, 40.0], [0.0, 0.0, 20.0, 0.0, 0.0]]
    assert all(each == (expected, 4) for each in found)


def _joined() -> tuple[list[list[float]], int]:
    """Of five samples the first has no teacher and the others one of two; the whole, and the images of all ranks."""
    has = np.array([[0, 0], [1, 0], [0, 1], [1, 0], [1, 0]], dtype=bool)
    samples = torch.arange(5.0)
    with process_groups.initialize_groups(load("mim", ["hardware=cpu"]).parallel, torch.device("cpu")) as ranks:
        shown = balance_samples(has, [1.0, 3.0], ranks.world_group)
        wholes = [part.join(10 * part.pick(samples)) for part in shown]
        images = sum(ranks.gather(sum(len(part.samples) for part in shown)))
    return [whole.tolist() for whole in wholes], images
