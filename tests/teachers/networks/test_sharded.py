"""A run of ours split over tensor-parallel ranks gives the features that it gives whole."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint.peers import images, model_of, released, timm_tower
from tests.distributed import run_ranks
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.sections import ParallelConfig, TeacherConfig
from w2s.megatron.parallel import process_groups
from w2s.teachers.base import Features
from w2s.teachers.build import build_teacher

COUNTS = (3, 1)
"""Images of each rank."""


def encode(checkpoint: Path, kind: str) -> tuple[int, Features]:
    """Parameters that this rank holds, and the features of its images."""
    parallel = ParallelConfig(tensor=2)
    with process_groups.initialize_groups(parallel, torch.device("cpu")) as ranks:
        config = TeacherConfig(source=f"w2s:{checkpoint}", sharded=True)
        teacher = build_teacher(config, grid=2, device="cpu", parallel=parallel)
        local = images(model_of(kind), sum(COUNTS)).split(COUNTS)[ranks.rank]
        return sum(parameter.numel() for parameter in teacher.parameters()), teacher(local)


@pytest.mark.parametrize("kind", ["e", pytest.param("siglip", marks=pytest.mark.slow)])
def test_ranks_with_different_numbers_of_images_share_the_tower(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    torch.save(released(model), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "clip")
    (held, first), (_, second) = run_ranks(encode, 2, tmp_path / "clip", kind)
    tower = timm_tower(model)
    with torch.no_grad():
        tokens = tower.head(tower.forward_features(images(model, sum(COUNTS))))
        summaries = tower(images(model, sum(COUNTS)))
    maps = tokens[:, model.vision.class_tokens :].mT.unflatten(2, (4, 4))
    expected = torch.nn.functional.interpolate(maps, (2, 2), mode="bicubic", antialias=True).flatten(2).mT
    # float32 sums over 64 products, halved over two ranks
    torch.testing.assert_close(torch.cat([first.patches, second.patches]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([first.summary, second.summary]), summaries, atol=1e-5, rtol=1e-5)
    assert held < 0.75 * sum(parameter.numel() for parameter in tower.parameters())
