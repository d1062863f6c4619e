"""The teacher's interface: frozen, on the student's grid."""

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from w2s.errors import ConfigError
from w2s.teachers.base import Features, PatchNetwork, Teacher, check_image_size, resample


class Means(PatchNetwork):
    """Mean colours of 4 x 4-pixel patches of an 8-pixel image, scaled by a parameter, with dropout."""

    def __init__(self) -> None:
        super().__init__(
            width=3, summary_width=3, grid=2, image_size=8, mean=[0.5] * 3, std=[0.25] * 3, depth=1, layer_width=3
        )
        self.scale = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        before = nn.functional.avg_pool2d(images, 4).flatten(2).mT
        patches = self.drop(before * self.scale)
        return Features(patches, patches.mean(1), tuple(before for _ in layers))


def test_frozen_and_always_in_evaluation_mode():
    teacher = Teacher(Means(), grid=2)
    nn.ModuleDict({"teacher": teacher}).train()
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    features = teacher(images).patches
    assert not teacher.network.drop.training
    torch.testing.assert_close(features[1, 2], images[1, :, 4:, :4].mean((1, 2)).detach())  # row 1, column 0
    assert not features.requires_grad and not teacher.network.scale.requires_grad
    assert torch.equal(Teacher.pooled(features), features.mean(1))


def test_another_grid_is_resampled_and_said_once(caplog):
    with caplog.at_level(logging.INFO):
        teacher = Teacher(Means(), grid=4)
        features = teacher(torch.ones(1, 3, 8, 8), layers=[0])
        teacher(torch.ones(1, 3, 8, 8))
    assert [record.message for record in caplog.records] == [
        "the teacher sees 8 px: its 2x2 features are resampled onto the student's 4x4 patches"
    ]
    torch.testing.assert_close(features.patches, torch.ones(1, 16, 3))
    torch.testing.assert_close(features.layers[0], torch.ones(1, 16, 3))
    torch.testing.assert_close(features.summary, torch.ones(1, 3))


def test_resampling_keeps_the_direction_of_rows_and_columns():
    column = torch.arange(8.0).repeat(8, 1)
    features = torch.stack([column, column.T], -1).reshape(1, 64, 2)
    small = resample(features, 8, 4).reshape(4, 4, 2)
    # inside, where no border is in reach, antialiased halving of a ramp gives the means of neighbours
    torch.testing.assert_close(small[1:3, 1:3, 0], torch.tensor([[2.5, 4.5]] * 2), atol=0.05, rtol=0)
    torch.testing.assert_close(small[..., 1], small[..., 0].T)


def test_bf16_rounds_and_returns_float32():
    class Linear(Means):
        def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
            features = super().forward(images)
            return Features(features.patches @ torch.eye(3), features.summary @ torch.eye(3))

    images = torch.rand(2, 3, 8, 8)
    exact, rounded = Teacher(Linear(), grid=2)(images), Teacher(Linear(), grid=2, precision="bf16")(images)
    for ours, theirs in zip(rounded[:2], exact[:2], strict=True):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=2**-7)  # two roundings to bfloat16's 8 bits


def test_bf16_holds_its_weights_in_half_the_memory_and_computes_what_autocast_does():
    class Layer(Means):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.norm = nn.LayerNorm(3)

        def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
            patches = self.norm(self.linear(super().forward(images).patches))
            return Features(patches, patches.mean(1))

    torch.manual_seed(0)
    network, images = Layer().eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(images).patches.float()
    teacher = Teacher(network, grid=2, precision="bf16")
    assert network.linear.weight.dtype == torch.bfloat16
    assert network.norm.weight.dtype == torch.float32
    assert torch.equal(teacher(images).patches, expected)


def test_image_size():
    check_image_size(448, 14)
    with pytest.raises(ConfigError, match=r"teacher.image_size=100 .* 14: use 98"):
        check_image_size(100, 14)


@pytest.mark.slow
def test_compiled_features_are_the_same():
    images = torch.rand(2, 3, 8, 8)
    compiled = Teacher(Means(), grid=2, compiled=True)(images)
    torch.testing.assert_close(compiled, Teacher(Means(), grid=2)(images))
