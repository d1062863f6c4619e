"""EVA's files and runs of ours as teachers: `head(norm(tokens))` of every patch, as timm computes it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoint.peers import images, masked_stage, model_of, released, timm_tower
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.sections import ModelConfig, TeacherConfig
from w2s.errors import CheckpointError, ConfigError
from w2s.teachers.base import Teacher
from w2s.teachers.build import build_teacher
from w2s.teachers.networks import eva_vit


@pytest.fixture(params=["18b", "8b", "e", "g", "siglip"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A small model of each kind, which configs/model has for the length of a test."""
    small = model_of(request.param)
    monkeypatch.setattr(eva_vit, "named_model", lambda name: small)
    return small


def build(source: str, grid: int = 4, root: str | Path = "runs", **settings: str | int) -> Teacher:
    return build_teacher(TeacherConfig(source=source, **settings), grid=grid, device="cpu", root=root)


@torch.no_grad()
def targets(model: ModelConfig) -> Tensor:
    """What EVA's masked stage regresses: all tokens after the norm and the projection, without CLS."""
    tower = timm_tower(model)
    return tower.head(tower.forward_features(images(model)))[:, model.vision.class_tokens :]


@torch.no_grad()
def test_a_released_file_gives_the_projected_patch_tokens(model: ModelConfig, tmp_path: Path) -> None:
    torch.save({"module": released(model)}, tmp_path / "clip.pt")
    save_file(released(model), tmp_path / "clip.safetensors")
    for name in ("clip.pt", "clip.safetensors"):
        teacher = build(f"eva:small@{tmp_path / name}")
        assert (teacher.width, teacher.image_size, teacher.network.grid) == (model.embed_dim, 32, 4)
        # timm on both sides; another attention kernel may sum in another order
        torch.testing.assert_close(teacher(images(model)).patches, targets(model), atol=1e-5, rtol=1e-5)
        summary = teacher(images(model)).summary
        torch.testing.assert_close(summary, timm_tower(model)(images(model)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_run_of_ours_by_name_and_by_path(model: ModelConfig, tmp_path: Path) -> None:
    torch.save(released(model), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "runs" / "start")
    for source in ("w2s:start", f"w2s:{tmp_path / 'runs' / 'start'}"):
        teacher = build(source, root=tmp_path / "runs")
        torch.testing.assert_close(teacher(images(model)).patches, targets(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("peer", ["open_clip", pytest.param("timm", marks=pytest.mark.slow)])
@torch.no_grad()
def test_an_export_of_ours_that_was_moved(peer: str, tmp_path: Path) -> None:
    model = model_of("18b")  # the kind that timm knows by no name
    torch.save(released(model), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "start")
    export_checkpoint(tmp_path / "start", peer, tmp_path / "exported")
    (tmp_path / "exported").rename(tmp_path / "moved")
    features = build(f"{peer}:local-dir:{tmp_path / 'moved'}")(images(model))
    torch.testing.assert_close(features.patches, targets(model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.summary, timm_tower(model)(images(model)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_masked_run_gives_its_tokens_without_a_projection(tmp_path: Path) -> None:
    model = model_of("18b")
    tower = timm_tower(model)
    student = {name: value for name, value in tower.state_dict().items() if not name.startswith("head")}
    torch.save({**student, **masked_stage()}, tmp_path / "mim.pt")
    import_checkpoint(tmp_path / "mim.pt", model, tmp_path / "mim")
    teacher = build(f"w2s:{tmp_path / 'mim'}")
    assert (teacher.width, teacher.summary_width) == (32, 32)
    expected, features = tower.forward_features(images(model)), teacher(images(model))
    torch.testing.assert_close(features.patches, expected[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.summary, expected[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_masked_run_with_a_summary_head_projects_its_summary_alone(tmp_path: Path) -> None:
    model = model_of("18b")
    tower = timm_tower(model)
    visual = {f"visual.{name}": value for name, value in {**tower.state_dict(), **masked_stage()}.items()}
    torch.save(visual, tmp_path / "mim.pt")
    import_checkpoint(tmp_path / "mim.pt", model, tmp_path / "mim")
    teacher = build(f"w2s:{tmp_path / 'mim'}")
    assert (teacher.width, teacher.summary_width) == (32, 16)
    features = teacher(images(model))
    patches = tower.forward_features(images(model))[:, 1:]
    torch.testing.assert_close(features.patches, patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.summary, tower(images(model)), atol=1e-5, rtol=1e-5)


def test_weights_stay_in_the_file_or_in_half_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("e")
    monkeypatch.setattr(eva_vit, "named_model", lambda name: model)
    save_file({name: value.half() for name, value in released(model).items()}, tmp_path / "half.safetensors")
    teacher = build(f"eva:small@{tmp_path / 'half.safetensors'}", precision="bf16")
    block = teacher.network.trunk.blocks[0]
    assert block.mlp.fc1.weight.dtype == torch.bfloat16
    assert block.norm1.weight.dtype == torch.float32
    with torch.no_grad():
        # bfloat16 has eight bits: a few roundings through two layers
        torch.testing.assert_close(teacher(images(model)).patches, targets(model), atol=0.1, rtol=0.1)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_another_size_resamples_the_positions(model: ModelConfig, tmp_path: Path) -> None:
    save_file(released(model), tmp_path / "clip.safetensors")
    teacher = build(f"eva:small@{tmp_path / 'clip.safetensors'}", image_size=48)
    assert (teacher.image_size, teacher.network.grid) == (48, 6)
    assert teacher(torch.randn(1, 3, 48, 48)).patches.shape == (1, 16, model.embed_dim)


def test_what_is_no_such_teacher(tmp_path: Path) -> None:
    save_file(released(model_of("g")), tmp_path / "clip.safetensors")
    file = tmp_path / "clip.safetensors"
    with pytest.raises(CheckpointError, match=r"hold another model: visual\..* (is missing|does not fit)"):
        build(f"eva:tiny@{file}")
    with pytest.raises(ConfigError, match="model=eva02_clip_e does not exist: did you mean"):
        build(f"eva:eva02_clip_e@{file}")
    with pytest.raises(CheckpointError, match=r"teacher\.source=nothing is neither a path, nor a run below"):
        build("w2s:nothing", root=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_teacher_gives_the_same_features(model: ModelConfig, tmp_path: Path, precision: str) -> None:
    torch.save(released(model), tmp_path / "clip.pt")
    source = f"eva:small@{tmp_path / 'clip.pt'}"
    plain, compiled = (build(source, precision=precision, compile=flag)(images(model)) for flag in (False, True))
    for ours, theirs in ((compiled.patches, plain.patches), (compiled.summary, plain.summary)):
        assert not ours.requires_grad
        # Sums in another order; in bfloat16 with fewer roundings between the operators, each of 2^-9 of a value: two of
        # each of the four branches of the layers.
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < (1e-5 if precision == "fp32" else 8 * 2**-9)
