"""The contrastive stage in open_clip."""

import json
import tempfile
from pathlib import Path

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CustomTextCLIP
from torch import Tensor

from w2s.bench.marks import Marks
from w2s.bench.peers.base import Peer, forward_flops
from w2s.checkpoint.export.formats.open_clip import open_clip_config
from w2s.checkpoint.export.formats.timm import timm_config
from w2s.config.sections import Config
from w2s.data.samples.batch import Batch, normalize, require
from w2s.stages.clip import sample_spec
from w2s.towers.vision import channel_statistics


class OpenClip(Peer):
    """The contrastive stage's step, with all samples in one micro-batch."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, open_clip_model(config, device), sample_spec(config), device)
        self.criterion = ClipLoss()

    def loss(self, micro: Batch, marks: Marks) -> Tensor:
        """Return open_clip's contrastive loss of a whole batch."""
        images = normalize(micro.images, *channel_statistics(self.config.model.vision))
        with marks.part("forward"), self.autocast():
            features = self.model(images, require(micro.tokens))
        loss: Tensor = self.criterion(*features)
        return loss

    def forward_flops(self) -> float:
        """Count the operations of both towers for one pair."""
        meta, model = torch.device("meta"), self.config.model
        images = torch.empty(1, 3, model.vision.image_size, model.vision.image_size, device=meta)
        tokens = torch.empty(1, model.text.context_length, dtype=torch.int64, device=meta)
        return forward_flops(open_clip_model(self.config, meta), images, tokens)


def open_clip_model(config: Config, device: torch.device) -> CustomTextCLIP:
    """Return open_clip's module for a CLIP: timm's vision tower with patch dropout, and its own text tower."""
    model, dropout = config.model, config.clip.patch_dropout
    with tempfile.TemporaryDirectory() as folder, device:
        description = json.dumps(timm_config(model.vision, features=0))
        (Path(folder) / "config.json").write_text(description, encoding="utf-8")
        settings = open_clip_config(model, f"local-dir:{folder}", logit_bias=False)["model_cfg"]
        vision = {**settings["vision_cfg"], "patch_dropout": dropout}
        quick = settings.get("quick_gelu", False)
        return CustomTextCLIP(settings["embed_dim"], vision, settings["text_cfg"], quick_gelu=quick)
