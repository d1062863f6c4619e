"""The towers of a checkpoint of ours, for comparison with a peer's."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.checkpoint.peers import captions, images
from w2s.checkpoint.weights.released import open_released
from w2s.config.sections import HardwareConfig, ModelConfig, ParallelConfig
from w2s.megatron.checkpoint import state
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.towers.clip import ImageTower, TextTower


class Features(NamedTuple):
    """What the towers of a CLIP give for the images and the captions of `peers`."""

    images: Tensor
    texts: Tensor
    logit_scale: Tensor


def features(checkpoint: Path, model: ModelConfig, towers: Sequence[str] = ("vision", "text")) -> Features:
    """Load those towers of a checkpoint that are named, and run both."""
    with process_groups.init_distributed(ParallelConfig(), HardwareConfig(device="cpu")), torch.no_grad():
        vision = ImageTower(model.vision, model.embed_dim, ParallelConfig(), torch.float32)
        text = TextTower(model.text, model.embed_dim, ParallelConfig(), torch.float32)
        both = {name: ShardedTower([tower], [tower]) for name, tower in (("vision", vision), ("text", text))}
        loaded = {name: both[name] for name in towers}
        state.load_weights(checkpoint, loaded, list(state.tower_shapes(loaded)))
        return Features(vision(images(model)), text(captions(model)), text.logit_scale)


def assert_holds(checkpoint: Path, expected: dict[str, Tensor]) -> None:
    """A checkpoint has these tensors by their released names, to the bit, and no others."""
    found = open_released(checkpoint)
    assert found.meta.keys() == expected.keys()
    for name, value in expected.items():
        assert found.read(name).dtype == value.dtype
        assert torch.equal(found.read(name), value), name
