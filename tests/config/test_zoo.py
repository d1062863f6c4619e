"""The models of configs/model: parameters and forward cost of each, built on the meta device."""

from importlib.resources import files

import open_clip
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from w2s.config.load import STAGES, load
from w2s.config.sections import ModelConfig, ParallelConfig
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.clip import ImageTower, TextTower

ZOO = sorted(path.name.removesuffix(".yaml") for path in (files("w2s.configs") / "model").iterdir())

# Parameters of the released models, counted on the released code: vision tower, text tower, and with the logit scale.
PARAMETERS = {
    "eva_18b": (17_630_494_720, 694_987_520, 18_325_482_241),
    "eva_8b": (7_526_088_704, 694_659_840, 8_220_748_545),
    "eva_8b_448": (7_529_234_432, 694_659_840, 8_223_894_273),
    "eva02_e_plus": (4_350_556_928, 694_332_160, 5_044_889_089),
    "eva02_e": (4_350_556_928, 354_032_640, 4_704_589_569),
    "eva01_g_plus": (1_012_588_928, 354_032_640, 1_366_621_569),
    "eva01_g": (1_012_588_928, 123_846_912, 1_136_435_841),
}
OPEN_CLIP = {
    "vit_b_32": "ViT-B-32", "vit_b_16": "ViT-B-16", "vit_l_14": "ViT-L-14", "vit_h_14": "ViT-H-14",
    "vit_bigg_14": "ViT-bigG-14",
}  # fmt: skip
# Billions of multiply-adds for an image and for a caption of 77 tokens, as counted there.
COST = {
    "eva_18b": (4560.6, 48.93),
    "eva_8b": (1949.6, 48.93),
    "eva_8b_448": (7982.0, 48.93),
    "eva02_e_plus": (1132.2, 48.93),
    "eva02_e": (1132.2, 23.55),
    "eva01_g_plus": (267.0, 23.55),
    "eva01_g": (267.0, 6.65),
}
SIGLIPS = {"vit_b_16_siglip": "vit_base_patch16_siglip_224", "vit_so400m_14_siglip": "vit_so400m_patch14_siglip_224"}
"""timm's names of SigLIP's towers."""


def towers(model: ModelConfig) -> tuple[ImageTower, TextTower]:
    with torch.device("meta"):
        vision = ImageTower(model.vision, model.embed_dim, ParallelConfig(), torch.float32)
        text = TextTower(model.text, model.embed_dim, ParallelConfig(), torch.float32)
    return vision.requires_grad_(False), text.requires_grad_(False)


def count(tower: torch.nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in tower.named_parameters() if name != "logit_scale")


def multiply_adds(tower: torch.nn.Module, inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        tower(inputs)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("vit_") and name not in SIGLIPS])
def test_open_clips_own_models_have_its_parameters(alone: Ranks, name: str) -> None:
    model = load("clip", [f"model={name}"]).model
    theirs = open_clip.get_model_config(OPEN_CLIP[name.removesuffix("_quickgelu")])
    with torch.device("meta"):
        peer = open_clip.CLIP(**theirs)
    vision, text = towers(model)
    assert count(vision) == sum(parameter.numel() for parameter in peer.visual.parameters())
    assert count(vision) + count(text) + 1 == sum(parameter.numel() for parameter in peer.parameters())
    assert model.vision.heads == peer.visual.transformer.resblocks[0].attn.num_heads
    assert model.text.heads == peer.transformer.resblocks[0].attn.num_heads


@pytest.mark.parametrize("name", SIGLIPS)
def test_siglips_towers_have_its_parameters(alone: Ranks, name: str) -> None:
    model = load("clip", [f"model={name}"]).model
    with torch.device("meta"):
        peer = timm.create_model(SIGLIPS[name])
    assert count(towers(model)[0]) == sum(parameter.numel() for parameter in peer.parameters())
    assert model.vision.heads == peer.blocks[0].attn.num_heads == peer.attn_pool.num_heads


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_the_released_parameters(alone: Ranks, name: str) -> None:
    vision, text = towers(load("clip", [f"model={name}"]).model)
    assert (count(vision), count(text), count(vision) + count(text) + 1) == PARAMETERS[name]


def test_drop_path_is_evas() -> None:
    rates = {(name, stage): load(stage, [f"model={name}"]).model.vision.drop_path for name in ZOO for stage in STAGES}
    used = {key: rate for key, rate in rates.items() if rate}
    assert used == {("eva01_g", "mim"): 0.1, ("eva01_g_plus", "mim"): 0.1, ("eva01_g", "clip"): 0.4}


@pytest.mark.parametrize("name", COST)
def test_published_models_cost_what_the_released_ones_do(alone: Ranks, name: str) -> None:
    model = load("clip", [f"model={name}"]).model
    vision, text = towers(model)
    size = model.vision.image_size
    image = multiply_adds(vision, torch.empty(1, 3, size, size, device="meta"))
    caption = multiply_adds(text, torch.zeros(1, 77, dtype=torch.int64, device="meta"))
    expected_image, expected_caption = COST[name]
    assert image == pytest.approx(expected_image, abs=0.051)
    assert caption == pytest.approx(expected_caption, abs=0.0051)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_start_as_the_released_ones(name: str) -> None:
    """The masked stage as EVA-01's code starts (0.015 for g, 0.02 else), the text tower as EVA-CLIP's does."""
    clip = load("clip", [f"model={name}"])
    assert (clip.init.std, clip.init.truncated, clip.init.text_mlp_bias) == (0.02, False, "uniform")
    if name != "eva_8b_448":  # fine-tuned, without a masked stage
        mim = load("mim", [f"model={name}"])
        assert (mim.init.std, mim.init.truncated) == (0.015 if name.startswith("eva01") else 0.02, True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_the_released_moments(name: str) -> None:
    """The released commands of EVA-01 and EVA-02 name none and get the code's own; the paper of EVA-18B has its own."""
    optim = load("clip", [f"model={name}"]).optim
    code = name.startswith(("eva01", "eva02"))
    assert (optim.betas, optim.eps) == (((0.9, 0.999), 1e-8) if code else ((0.9, 0.95), 1e-6))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("stage", STAGES)
def test_every_model_makes_a_configuration_of_every_stage(name: str, stage: str) -> None:
    config = load(stage, [f"model={name}"])
    assert config.model.name == name
    assert 0 < config.mim.masked_patches < config.model.vision.patches
    # EVA masks 105 of 256; the smallest grid here has 16 patches
    assert config.mim.masked_patches / config.model.vision.patches == pytest.approx(0.4, abs=0.03)
