"""Text towers of teachers: the embeddings of the CLIP that they come from, or a refusal."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoint.peers import captions, model_of, open_clip_config, open_clip_model, released, text_tower
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.sections import ModelConfig, TeacherConfig
from w2s.data.samples.tokens import tokenize
from w2s.errors import CheckpointError, ConfigError
from w2s.teachers import text as text_module
from w2s.teachers.text import TextTeacher, build_text_teacher, fit_context, text_shape

TEXTS = ["a red circle", "a cross", "two long captions are cut where the context of the tower that reads them ends"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A small EVA-CLIP, which configs/model has for the length of a test."""
    small = model_of("18b")
    monkeypatch.setattr(text_module, "named_model", lambda name: small)
    return small


def build(source: str, root: Path | str = "runs", context: int = 12) -> TextTeacher:
    return build_text_teacher(TeacherConfig(source=source), context_length=context, device="cpu", root=root)


def check(teacher: TextTeacher, expected: Tensor, tokens: Tensor) -> None:
    # The same network on both sides; another attention kernel may sum in another order.
    torch.testing.assert_close(teacher(tokens), expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@torch.no_grad()
def test_of_a_released_file_of_a_run_and_of_timm(model: ModelConfig, tmp_path: Path) -> None:
    file, tokens = tmp_path / "clip.pt", captions(model)
    torch.save(released(model), file)
    import_checkpoint(file, model, tmp_path / "runs" / "start")
    expected = text_tower(model)(tokens)
    for source in (f"eva:small@{file}", "w2s:start"):
        teacher = build(source, tmp_path / "runs")
        check(teacher, expected, tokens)
        assert teacher.width == 16
        assert teacher.logit_scale.item() == pytest.approx(torch.tensor(2.5).exp().item())
        assert text_shape(TeacherConfig(source=source), tmp_path / "runs") == (model.text, 16)
    # timm names the vision tower alone: the text tower is read off the file, and its heads are 64 wide.
    assert text_shape(TeacherConfig(source=f"timm:any@{file}")) == (replace(model.text, heads=1), 16)


@torch.no_grad()
@pytest.mark.parametrize("quick", [False, True])
def test_of_open_clip_and_openai(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    config = open_clip_config(model) | {"quick_gelu": quick}
    monkeypatch.setattr(open_clip, "list_models", lambda: ["small"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    clip, tokens = open_clip.CLIP(**config).eval(), captions(model)
    clip.load_state_dict(open_clip_model(model).state_dict())
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    for source in (f"open_clip:small@{tmp_path / 'clip.safetensors'}", f"open_clip:local-dir:{tmp_path}"):
        teacher = build(source)
        check(teacher, clip.encode_text(tokens), tokens)
        assert teacher.width == 16


def test_random_weights_are_equal_and_leave_the_generator_alone(model: ModelConfig) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = build("eva:small")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    second = build("eva:small")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@torch.no_grad()
def test_a_caption_of_another_context_is_read_as_the_tokenizer_would_make_it() -> None:
    for length in (8, 77):
        assert torch.equal(fit_context(tokenize(TEXTS, 20), length), tokenize(TEXTS, length))
    # A causal tower sees nothing after the end token, so it need not be given what follows.
    short, whole = build("open_clip:ViT-S-32", context=20), build("open_clip:ViT-S-32", context=100)
    assert (short.context_length, whole.context_length) == (20, 77)
    torch.testing.assert_close(short(tokenize(TEXTS, 20)), whole(tokenize(TEXTS, 77)), atol=1e-5, rtol=1e-5)


def test_what_has_no_text_tower_that_reads_our_tokens(model: ModelConfig, tmp_path: Path) -> None:
    vision = {name: value for name, value in released(model).items() if name.startswith("visual.")}
    save_file(vision, tmp_path / "vision.safetensors")
    sources = [f"eva:small@{tmp_path / 'vision.safetensors'}", "timm:test_vit", "efficientnet_lite0", "hf:folder"]
    cases = {source: "has no text tower: use a CLIP" for source in sources}
    cases["open_clip:ViT-B-16-SigLIP"] = "does not read CLIP's tokens"
    cases["open_clip:ViT-S-33"] = "nearest are ViT-S-32"
    for source, message in cases.items():
        with pytest.raises(ConfigError, match=message) as error:
            build(source)
        assert "\n" not in str(error.value)
    torch.save(released(model_of("18b")) | {"text.more": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"text\.more does not fit") as other:
        build(f"eva:small@{tmp_path / 'other.pt'}")
    assert "\n" not in str(other.value)
