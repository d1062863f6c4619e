"""Our towers against timm's `Eva` and open_clip's text transformer, at EVA-18B's shape ratios."""

from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer
from timm.layers import RmsNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.checkpoint.eva_weights import from_eva, to_eva
from tests.megatron.layer_weights import load_tensors
from w2s.checkpoint.weights.eva_format import TEXT_NAMES, VISION_NAMES
from w2s.checkpoint.weights.released import rename
from w2s.checkpoint.weights.tensor_files import InMemory
from w2s.config.sections import ParallelConfig, TextConfig, VisionConfig
from w2s.kernels.gelu import bias_gelu
from w2s.megatron.model.initialize import global_name, init_parameters
from w2s.megatron.model.tower import Tower
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.attention_pool import AttentionPool
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.initial import text_rule, vision_rule

TOLERANCE = 1e-5
"""Relative to the largest value: float32 sums of up to 1280 products, a few layers deep."""
EMBED = 48


def names_of(tower: Tower) -> list[str]:
    return [global_name(tower, name) for name, _ in tower.named_parameters()]


def copy_from(tower: Tower, peer: nn.Module, names: dict[str, str], **given: Tensor) -> None:
    """Give `tower` the peer's weights."""
    wanted = [name for name in names_of(tower) if name not in given]
    tensors = from_eva(peer.state_dict(), wanted, names, tower.config.num_attention_heads)
    load_tensors(tower, {**tensors, **given})


def gradients(tower: Tower, names: dict[str, str]) -> dict[str, Tensor]:
    gradients = {global_name(tower, n): p.grad for n, p in tower.named_parameters() if p.grad is not None}
    return to_eva(gradients, names, tower.config.num_attention_heads)


def assert_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


def assert_same(tower: Tower, ours: Tensor, peer: nn.Module, theirs: Tensor, names: dict[str, str]) -> None:
    assert_close("output", ours, theirs)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    got = gradients(tower, names)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, got[name], gradient)


def image_tower(shape: VisionConfig) -> ImageTower:
    tower = ImageTower(shape, EMBED, ParallelConfig(), torch.float32)
    init_parameters(tower, vision_rule(shape, post_norm=1.0), seed=0)
    return tower


def tower_and_peer(placement: Any, norm: Any, drop_path: float = 0.0) -> tuple[ImageTower, Eva]:
    """Our tower and timm's, with the same weights."""
    # EVA-18B: heads of 128, MLP of 5 x width, patches of 14; EVA02-E's bias on Q and V goes with the layer norm.
    bias = norm == "layernorm"
    shape = VisionConfig(
        image_size=56, patch_size=14, layers=3, width=256, heads=2, mlp_width=1280,
        norm=norm, norm_placement=placement, qkv_bias=bias,
    )  # fmt: skip
    peer = Eva(
        img_size=56, patch_size=14, embed_dim=256, depth=3, num_heads=2, mlp_ratio=5, qkv_bias=bias,
        use_post_norm=placement == "post", norm_layer=partial(RmsNorm if norm == "rmsnorm" else nn.LayerNorm, eps=1e-6),
        num_classes=EMBED, global_pool="token", use_abs_pos_emb=True, drop_path_rate=drop_path,
    )  # fmt: skip
    if not bias:
        peer.head.bias = None
    with torch.no_grad():
        for index, parameter in enumerate(peer.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    tower = image_tower(shape)
    copy_from(tower, peer, VISION_NAMES)
    return tower, peer


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_vision_tower_is_timms_eva(alone: Ranks, placement: Any, norm: Any) -> None:
    tower, peer = tower_and_peer(placement, norm)
    images = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    assert_same(tower, tower(images), peer, peer.eval()(images), VISION_NAMES)


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_drop_path_is_timms(alone: Ranks, placement: Any) -> None:
    """timm draws, and ours scales its branches as timm's layers are seen to do."""
    tower, peer = tower_and_peer(placement, "rmsnorm", drop_path=0.6)
    branches = torch.ones(8, 3, 2)

    def note(place: tuple[int, int], inputs: Tensor, output: Tensor) -> None:
        branches[:, *place] = (output * inputs).sum((1, 2)) / inputs.square().sum((1, 2))

    for layer, block in enumerate(peer.blocks[1:], 1):  # the first has a probability of 0
        for branch, dropping in enumerate((block.drop_path1, block.drop_path2)):
            dropping.register_forward_hook(
                lambda _, inputs, output, place=(layer, branch): note(place, inputs[0].detach(), output.detach())
            )
    images = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    theirs = peer.train()(images)
    assert {round(scale, 4) for scale in branches.flatten().tolist()} == {0, 1, round(1 / 0.7, 4), round(1 / 0.4, 4)}
    branches = torch.where(branches > 0.5, 1 / (1 - torch.linspace(0, 0.6, 3)[:, None]), 0)
    assert_same(tower, tower(images, branch_scales=branches), peer, theirs, VISION_NAMES)
    assert_close("without", tower(images), peer.eval()(images))


@pytest.mark.parametrize("quick", [False, True])
def test_a_clips_own_towers_are_open_clips(alone: Ranks, quick: bool) -> None:
    """A norm before the layers, biases on Q, K and V, and in OpenAI's weights QuickGELU."""
    sizes = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 256}
    activation: Any = "quick_gelu" if quick else "gelu"
    peer = open_clip.CLIP(
        EMBED,
        {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16},
        {"context_length": 12, "vocab_size": 60, "width": 64, "heads": 4, "layers": 2},
        quick_gelu=quick,
    )
    with torch.no_grad():
        for index, parameter in enumerate(peer.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    shape = VisionConfig(
        kind="clip", image_size=32, patch_size=8, norm="layernorm", norm_placement="pre", qkv_bias=True,
        activation=activation, **sizes,
    )  # fmt: skip
    tower = image_tower(shape)
    load_tensors(tower, from_eva(_released(peer.state_dict()), names_of(tower), VISION_NAMES, 4))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ours, theirs = tower(images), peer.encode_image(images)
    assert_close("image features", ours, theirs)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = _released({name: p.grad for name, p in peer.named_parameters() if p.grad is not None})
    got = gradients(tower, VISION_NAMES)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, got[name], gradient)
    text = TextTower(
        TextConfig(context_length=12, vocab_size=60, activation=activation, **sizes),
        EMBED,
        ParallelConfig(),
        torch.float32,
    )
    copy_from(text, peer, TEXT_NAMES, logit_scale=torch.tensor(0.0))
    captions = torch.randint(1, 58, (5, 12), generator=torch.Generator().manual_seed(0))
    captions[:, 7] = 59
    assert_close("text features", text(captions), peer.encode_text(captions))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_a_siglips_tower_is_timms(alone: Ranks, activation: Any) -> None:
    """No class token, a bias in every linear, and attention pooling."""
    shape = VisionConfig(
        kind="siglip", image_size=32, patch_size=8, layers=2, width=48, heads=4, mlp_width=160,
        norm="layernorm", norm_placement="pre", qkv_bias=True, activation=activation,
    )  # fmt: skip
    peer = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, mlp_ratio=160.5 / 48, act_layer=activation,
        class_token=False, global_pool="map", num_classes=0,
    )  # fmt: skip
    with torch.no_grad():
        for index, parameter in enumerate(peer.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    tower = image_tower(shape)
    copy_from(tower, peer, VISION_NAMES)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert_close("patch tokens", tower.patch_tokens(images), peer.forward_features(images))
    assert_same(tower, tower(images), peer, peer(images), VISION_NAMES)


def test_the_pools_weights_are_those_of_its_attention(alone: Ranks) -> None:
    """One head, whose values give back a token: what it gathers is the weighted mean."""
    pool = AttentionPool(6, 1, 12, bias_gelu, 1e-6, torch.float32)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(len(parameter)))
        pool.kv.weight[6:], pool.kv.bias[6:] = torch.eye(6), 0.0
        pool.proj.weight.copy_(torch.eye(6)), pool.proj.bias.zero_()
        pool.mlp.fc2.weight.zero_(), pool.mlp.fc2.bias.zero_()
        tokens = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))
        weights = pool.weights(tokens)
        assert weights.std(1).min() > 1e-2
        torch.testing.assert_close(torch.einsum("nt,ntd->nd", weights, tokens), pool(tokens))


def _released(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vision tensors of open_clip's own under released names, without the prefix."""
    found = rename(InMemory(tensors), Path("clip.pt"))
    return {name.removeprefix("visual."): found.read(name) for name in found.meta if name.startswith("visual.")}


def test_text_tower_is_open_clips(alone: Ranks) -> None:
    shape = TextConfig(context_length=20, vocab_size=300, layers=3, width=80, heads=4, mlp_width=320)
    peer = TextTransformer(context_length=20, vocab_size=300, width=80, heads=4, layers=3, output_dim=EMBED)
    tower = TextTower(shape, EMBED, ParallelConfig(), torch.float32)
    copy_from(tower, peer, TEXT_NAMES, logit_scale=torch.tensor(0.0))
    captions = torch.randint(1, 298, (5, 20), generator=torch.Generator().manual_seed(0))
    captions[torch.arange(5), torch.tensor([3, 19, 7, 12, 1])] = 299
    tower.logit_scale.requires_grad_(False)
    assert_same(tower, tower(captions), peer, peer(captions), TEXT_NAMES)


def test_patch_dropout_runs_the_tower_on_the_kept_patches(alone: Ranks) -> None:
    shape = VisionConfig(image_size=32, patch_size=8, layers=2, width=32, heads=2, mlp_width=64)
    tower = image_tower(shape)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(tower(images, everything), tower(images))
    kept = torch.tensor([[0, 5], [3, 4], [14, 15]])
    changed = images.clone()
    changed[0, :, 24:, 24:] = 7.0  # patch 15, which image 0 does not keep
    assert torch.equal(tower(changed, kept)[0], tower(images, kept)[0])
    assert not torch.allclose(tower(changed)[0], tower(images)[0])


def test_weights_start_from_seed_and_name(alone: Ranks) -> None:
    shape = VisionConfig(image_size=32, patch_size=8, layers=2, width=128, heads=2, mlp_width=256)
    first, again, other = (
        ImageTower(shape, EMBED, ParallelConfig(), torch.float32),
        image_tower(shape),
        image_tower(shape),
    )
    init_parameters(first, vision_rule(shape, post_norm=0.1), seed=0)
    init_parameters(other, vision_rule(shape, post_norm=1.0), seed=1)
    weight = "blocks.layers.1.mlp.linear_fc2.weight"
    tensors = [dict(tower.named_parameters())[weight] for tower in (first, again, other)]
    assert torch.equal(tensors[0], tensors[1])
    assert not torch.equal(tensors[0], tensors[2])
    assert float(tensors[0].std()) == pytest.approx(0.02 / 2, rel=0.03)  # second layer: divided by sqrt(2 * 2)
    assert float(first.blocks.layers[0].mlp_bda.norm.weight.mean()) == pytest.approx(0.1)


def test_text_tower_starts_as_clips(alone: Ranks) -> None:
    shape = TextConfig(vocab_size=500, layers=2, width=128, heads=2, mlp_width=512)
    tower = TextTower(shape, EMBED, ParallelConfig(), torch.float32)
    init_parameters(tower, text_rule(shape, logit_scale=1 / 0.07, logit_bias=0.0), seed=0)
    assert float(tower.logit_scale) == pytest.approx(2.6593, abs=1e-4)
    assert float(tower.text_projection.std()) == pytest.approx(128**-0.5, rel=0.03)
    assert float(tower.positional_embedding.std()) == pytest.approx(0.01, rel=0.05)
    assert float(tower.blocks.layers[0].input_layernorm.weight.min()) == 1.0


def test_a_truncated_start_is_eva_01s(alone: Ranks) -> None:
    shape = VisionConfig(image_size=32, patch_size=8, layers=2, width=128, heads=2, mlp_width=256)
    tower = ImageTower(shape, EMBED, ParallelConfig(), torch.float32)
    init_parameters(tower, vision_rule(shape, post_norm=0.0, std=0.015, truncated=True), seed=0)
    weights = dict(tower.named_parameters())
    # A normal cut at one standard deviation has 0.5396 of its own; the second layer is divided by sqrt(2 * 2).
    ends = {"patch_embed.weight": 0.015, "pos_embed": 0.015, "blocks.layers.1.mlp.linear_fc2.weight": 0.0075}
    for name, end in ends.items():
        assert 0.95 * end < float(weights[name].abs().max()) <= end
        assert float(weights[name].std()) == pytest.approx(0.5396 * end, rel=0.03)
    assert not weights["patch_embed.bias"].any()


def test_mlp_biases_of_a_text_tower_start_as_torchs(alone: Ranks) -> None:
    shape = TextConfig(vocab_size=50, layers=1, width=256, heads=2, mlp_width=1024)
    tower = TextTower(shape, EMBED, ParallelConfig(), torch.float32)
    init_parameters(tower, text_rule(shape, logit_scale=1.0, logit_bias=0.0, mlp_bias="uniform"), seed=0)
    layer = tower.blocks.layers[0]
    for bias, width in ((layer.mlp.linear_fc1.bias, 256), (layer.mlp.linear_fc2.bias, 1024)):
        theirs = torch.nn.Linear(width, len(bias)).bias
        assert float(bias.std()) == pytest.approx(float(theirs.std()), rel=0.1)
        assert 0.9 * width**-0.5 < float(bias.abs().max()) <= width**-0.5
    assert not layer.self_attention.linear_qkv.bias.any()


def test_logit_scale_stays_float32_in_a_bfloat16_tower(alone: Ranks) -> None:
    tower = TextTower(TextConfig(vocab_size=50), EMBED, ParallelConfig(), torch.bfloat16)
    assert tower.logit_scale.dtype == torch.float32
    assert tower.text_projection.dtype == torch.bfloat16
