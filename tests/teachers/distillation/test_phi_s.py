import copy

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from w2s.errors import ConfigError
from w2s.teachers.distillation.phi_s import PhiS, hadamard
from w2s.teachers.distillation.targets import target_norm

WIDTH = 24


def features(images: int, seed: int) -> Tensor:
    """Channels of very different sizes that depend on each other, around a mean: [images, 16, WIDTH]."""
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) * torch.logspace(-1, 1, WIDTH)
    return torch.randn(images, 16, WIDTH, generator=made) @ mixed + 3


@pytest.mark.parametrize("size", [1, 2, 64, 192, 512, 640, 768, 1024, 1152, 1280, 1408, 1664, 1792])
def test_a_hadamard_matrix_is_orthogonal_and_flat(size: int) -> None:
    """Widths of teachers that there are: doubles of 1, 12, 20, 28, 36, 44 and 104."""
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=1e-12)


@pytest.mark.parametrize("size", [3, 100, 161])
def test_a_width_without_one_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"Hadamard matrix of {size} channels"):
        target_norm(size, "phi_s")


def test_all_channels_vary_alike_and_distances_keep_their_ratios() -> None:
    seen = features(64, seed=0)
    targets = target_norm(WIDTH, "phi_s")(seen, update=True).flatten(0, 1).double()
    torch.testing.assert_close(targets.mean(0), torch.zeros(WIDTH, dtype=torch.float64), rtol=0, atol=1e-5)
    # Sums of 24 products in float32, of channels whose sizes are up to 100 apart.
    torch.testing.assert_close(targets.var(0, correction=0), torch.ones(WIDTH, dtype=torch.float64), rtol=1e-4, atol=0)
    ratios = torch.pdist(targets[:50]) / torch.pdist(seen.flatten(0, 1)[:50].double())
    assert float(ratios.max() / ratios.min()) == pytest.approx(1, abs=1e-5)


def test_the_first_batch_decides_and_a_resumed_run_resumes_with_the_same_bits() -> None:
    norm, later = PhiS(WIDTH), features(8, seed=1)
    with pytest.raises(ValueError, match="no targets"):
        norm(later, update=False)
    norm(features(64, seed=0), update=True)
    resumed = PhiS(WIDTH)
    resumed.load_state_dict(copy.deepcopy(norm.state_dict()))
    assert norm.ready
    assert resumed.ready
    assert torch.equal(resumed(later, update=True), norm(later, update=True))
    assert torch.equal(norm(later, update=True), norm(later, update=False))


def test_ranks_find_the_rotation_of_all_their_features() -> None:
    alone = PhiS(WIDTH)(features(64, seed=0), update=True)
    parts = torch.cat(run_ranks(_own_part, 2))
    # Eigenvectors are found up to their signs: what does not depend on them is compared.
    torch.testing.assert_close(parts.norm(dim=-1), alone.norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.flatten(0, 1).square().mean(0), torch.ones(WIDTH), rtol=1e-4, atol=0)


def _own_part() -> Tensor:
    import torch.distributed as dist

    local = features(64, seed=0).chunk(2)[dist.get_rank()]
    return PhiS(WIDTH)(local, dist.group.WORLD, update=True)
