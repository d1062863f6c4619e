"""The masked stage with timm's module as the student."""

from dataclasses import replace

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from w2s.bench.marks import Marks
from w2s.bench.peers.base import Peer, forward_flops
from w2s.checkpoint.export.formats.plain_vision import image_tower
from w2s.compat import positioned
from w2s.config.sections import Config, ModelConfig
from w2s.data.samples.batch import Batch, normalize, require
from w2s.objectives.masked_loss import masked_loss
from w2s.stages.mim import sample_spec
from w2s.teachers.build import build_teacher
from w2s.teachers.distillation.targets import target_norm
from w2s.towers.masked_student import gather_patches, patch_indices_to_predict
from w2s.towers.vision import channel_statistics


class TimmStudent(nn.Module):
    """timm's tower with a mask token, or dropping what is masked, and a head on the patches to predict."""

    def __init__(self, model: ModelConfig, target_width: int, device: torch.device, drop_masked: bool = False) -> None:
        super().__init__()
        self.drop_masked = drop_masked
        self.trunk = image_tower(model, has_head=False, device=device)
        if not drop_masked:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, model.vision.width, device=device))
        self.lm_head = nn.Linear(model.vision.width, target_width, device=device)

    def forward(self, images: Tensor, masks: Tensor, patch_indices: Tensor) -> Tensor:
        """Predict the teacher's features at some patches, as `MaskedStudent` does: [n, k, teacher width]."""
        patches = self.trunk.patch_embed(images)
        if not self.drop_masked:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        placed = positioned(self.trunk, patches)
        # Eva's gives rotary positions too, which are none here; the ViT has a norm before the layers.
        tokens = placed[0] if isinstance(self.trunk, Eva) else self.trunk.norm_pre(placed)
        before = self.trunk.num_prefix_tokens
        if self.drop_masked:
            tokens = torch.cat([tokens[:, :before], gather_patches(tokens[:, before:], patch_indices)], dim=1)
        for block in self.trunk.blocks:
            tokens = block(tokens)
        features = self.trunk.norm(tokens)[:, before:]
        predictions: Tensor = self.lm_head(features if self.drop_masked else gather_patches(features, patch_indices))
        return predictions


class TimmMasked(Peer):
    """The masked stage's step; its teacher is built, and its targets are normalised, as ours are; compiled on a GPU."""

    def __init__(self, config: Config, device: torch.device) -> None:
        compiled = replace(config.teacher_losses[0].teacher, compile=device.type == "cuda")
        self.teacher = build_teacher(compiled, grid=config.model.vision.grid, device=device)
        self.target_norm = target_norm(self.teacher.width, compiled.target_norm).to(device)
        student = TimmStudent(config.model, self.teacher.width, device, config.mim.predict == "visible")
        super().__init__(config, student, sample_spec(config, (self.teacher.image_size,)), device)

    def loss(self, micro: Batch, marks: Marks) -> Tensor:
        """Return the loss of the features."""
        masked, patches = self.config.mim.masked_patches, self.config.model.vision.patches
        masks = require(micro.masks) if masked else micro.images.new_zeros(len(micro), patches, dtype=torch.bool)
        patch_indices = patch_indices_to_predict(masks, self.config.mim)
        with marks.part("teacher"):
            normalized = normalize(micro.teacher_images[0], self.teacher.mean, self.teacher.std)
            features = self.target_norm(self.teacher(normalized).patches, update=True)
        images = normalize(micro.images, *channel_statistics(self.config.model.vision))
        with marks.part("forward"), self.autocast():
            predictions = self.model(images, masks, patch_indices)
        return masked_loss(self.config.mim.loss)(predictions, gather_patches(features, patch_indices), None)

    def forward_flops(self) -> float:
        """Count the operations of the student for one image."""
        meta, vision, mim = torch.device("meta"), self.config.model.vision, self.config.mim
        images = torch.empty(1, 3, vision.image_size, vision.image_size, device=meta)
        masks = torch.empty(1, vision.patches, dtype=torch.bool, device=meta)
        patch_indices = torch.empty(1, mim.predicted(vision.patches), dtype=torch.int64, device=meta)
        student = TimmStudent(self.config.model, self.teacher.width, meta, mim.predict == "visible")
        return forward_flops(student, images, masks, patch_indices)
