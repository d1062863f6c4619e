"""Learning rates by tower and layer, weight decay by kind."""

import pytest
import torch
from torch import nn

from w2s.config.load import load
from w2s.config.sections import OptimConfig
from w2s.optim.parameter_groups import frozen_steps, has_trust_ratio, is_decayed, layer_id, parameter_groups, peak_lr

OPTIM = OptimConfig(
    lr=5e-4, vision_lr=4e-4, text_lr=4e-5, vision_layer_decay=0.9, text_layer_decay=0.75, weight_decay=0.1
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("patch_embed.weight", 0),
        ("cls_token", 0),
        ("token_embedding", 0),
        ("blocks.0.mlp.linear_fc1.weight", 1),
        ("blocks.47.mlp_bda.norm.weight", 48),
        ("norm.weight", 49),
        ("head.weight", 49),
        ("text_projection", 49),
    ],
)
def test_layer_ids(name: str, expected: int) -> None:
    assert layer_id(name, layers=48) == expected


def test_learning_rates_of_eva_18b() -> None:
    # eva_clip's own numbers: 0.9^49 of 4e-4 for the vision embeddings, 0.75^33 of 4e-5 for the text ones.
    assert peak_lr("vision", "pos_embed", 48, OPTIM) == pytest.approx(4e-4 * 0.9**49)
    assert peak_lr("vision", "head.weight", 48, OPTIM) == pytest.approx(4e-4)
    assert peak_lr("text", "token_embedding", 32, OPTIM) == pytest.approx(4e-5 * 0.75**33)
    assert peak_lr("text", "logit_scale", 32, OPTIM) == pytest.approx(5e-4)


@pytest.mark.parametrize(("lowest", "frozen"), [(0, 1), (1, 2), (2, 3), (None, 4)])
def test_the_lowest_layers_are_frozen_with_the_embeddings(lowest: int | None, frozen: int) -> None:
    optim = OptimConfig(text_frozen_steps=7, text_frozen_layers=lowest)
    upwards = ["token_embedding", "blocks.0.mlp.linear_fc1.weight", "blocks.1.input_layernorm.bias", "ln_final.weight"]
    steps = [frozen_steps("text", name, 2, optim) for name in [*upwards, "logit_scale"]]
    assert steps == [7] * frozen + [0] * (5 - frozen), "the logit scale always moves"
    assert frozen_steps("vision", "pos_embed", 2, optim) == 0


def test_a_tower_without_a_rate_of_its_own_takes_the_common_one() -> None:
    assert peak_lr("vision", "head.weight", 2, OptimConfig(lr=1e-3)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("blocks.0.mlp.linear_fc1.weight", (4, 4), True),
        ("mask_token", (1, 1, 4), True),
        ("head.latent", (1, 1, 4), False),
        ("head.kv.weight", (8, 4), True),
        ("blocks.0.mlp.linear_fc1.bias", (4,), False),
        ("norm.weight", (4,), False),
        ("pos_embed", (1, 5, 4), False),
        ("cls_token", (1, 1, 4), False),
        ("positional_embedding", (7, 4), False),
        ("logit_scale", (), False),
    ],
)
def test_weight_decay(name: str, shape: tuple[int, ...], decayed: bool) -> None:
    assert is_decayed(name, nn.Parameter(torch.zeros(shape))) is decayed


@pytest.mark.parametrize(
    ("trust_1d", "tower", "shape", "rescaled"),
    [
        ("auto", "text", (4,), False),
        ("auto", "vision", (4,), True),
        ("auto", "text", (), True),  # logit_scale, which starts above zero
        ("auto", "text", (7, 4), True),
        ("always", "text", (4,), True),
        ("never", "vision", (4,), False),
        ("never", "vision", (1, 1, 4), True),
    ],
)
def test_trust_ratio(trust_1d: str, tower: str, shape: tuple[int, ...], rescaled: bool) -> None:
    scratch = load("clip", ["init.vision=weights.safetensors"]).init.scratch
    assert has_trust_ratio(tower, nn.Parameter(torch.zeros(shape)), trust_1d, scratch) is rescaled


def test_groups_hold_every_trained_parameter_once() -> None:
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    parameters = [
        ("vision", "head.weight", 2, nn.Parameter(torch.zeros(2, 2))),
        ("vision", "norm.weight", 2, nn.Parameter(torch.zeros(2))),
        ("vision", "blocks.1.mlp.linear_fc1.weight", 2, nn.Parameter(torch.zeros(2, 2))),
        ("text", "logit_scale", 2, frozen),
    ]
    groups = parameter_groups(parameters, OPTIM, lambda kinds: kinds | {(0.0, True, False, 0)})
    assert [(group["peak_lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.0, 0.1, 0),  # what only another pipeline stage has
        (pytest.approx(4e-4 * 0.9), 0.1, 1),
        (4e-4, 0.0, 1),
        (4e-4, 0.1, 1),
    ]
