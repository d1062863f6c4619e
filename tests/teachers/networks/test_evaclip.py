"""EVA-CLIP's own folders of transformers: their text tower, and what is imported of them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")

from tests.teachers.networks.evaclip import EMBED, HEADS, LAYERS, PATCH, SIDE, TEXT, WIDTH, save_evaclip
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.sections import ModelConfig, TeacherConfig, TextConfig, VisionConfig
from w2s.teachers import text
from w2s.teachers.build import build_teacher
from w2s.teachers.networks import eva_vit
from w2s.teachers.text import build_text_teacher

MODEL = ModelConfig(
    embed_dim=EMBED,
    vision=VisionConfig(
        image_size=SIDE, patch_size=PATCH, layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=5 * WIDTH,
        norm_placement="pre",
    ),
    text=TextConfig(
        context_length=8, vocab_size=50, layers=TEXT["num_hidden_layers"], width=TEXT["hidden_size"],
        heads=TEXT["num_attention_heads"], mlp_width=TEXT["intermediate_size"],
    ),
)  # fmt: skip


@torch.no_grad()
def test_both_towers_by_the_name_of_the_model_and_as_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "EVA-CLIP-small"
    folder.mkdir()
    peer = save_evaclip("pre")(folder)
    for module in (eva_vit, text):
        monkeypatch.setattr(module, "named_model", lambda name: MODEL)
    import_checkpoint(folder, MODEL, tmp_path / "start")
    images, captions = torch.randn(2, 3, SIDE, SIDE), torch.randint(3, 49, (3, 8))
    captions[:, 5:] = torch.tensor([49, 0, 0])  # the end of text, and padding
    seen, read = peer(images), peer.text(captions).text_embeds
    for source in (f"eva:small@{folder}", f"w2s:{tmp_path / 'start'}"):
        config = TeacherConfig(source=source)
        features = build_teacher(config, grid=4, device="cpu")(images)
        # the same sums in other kernels
        torch.testing.assert_close(features.patches, seen[:, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.summary, seen[:, 0], atol=1e-5, rtol=1e-5)
        teacher = build_text_teacher(config, context_length=8, device="cpu")
        torch.testing.assert_close(teacher(captions), read, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(teacher.logit_scale, peer.logit_scale.exp())
