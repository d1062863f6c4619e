"""The peers' towers are ours: the same outputs with the same weights, parameters and FLOPs."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from tests.checkpoint.eva_weights import from_eva
from tests.checkpoint.peers import KINDS, model_of
from tests.megatron.layer_weights import load_tensors
from w2s.bench.marks import Marks
from w2s.bench.peers.base import peer_optimizer
from w2s.bench.peers.clip import OpenClip, open_clip_model
from w2s.bench.peers.masked import TimmMasked, TimmStudent
from w2s.bench.peers.peer_choice import check_peer
from w2s.bench.report import check_equal
from w2s.bench.step import Measured
from w2s.bench.synthetic import synthetic_batch
from w2s.checkpoint.weights.eva_format import VISION_NAMES
from w2s.config.load import load
from w2s.config.sections import Config, OptimConfig, ParallelConfig
from w2s.config.teacher_losses import Target
from w2s.errors import ConfigError, W2SError
from w2s.megatron.model.initialize import global_name
from w2s.megatron.parallel.process_groups import Ranks
from w2s.optim.lamb import Lamb
from w2s.planning.model.teacher import planned_teachers, predicted
from w2s.towers.build import build_clip, build_student
from w2s.towers.masked_student import MaskedStudent, masked_patch_indices

CPU = torch.device("cpu")


def config_of(stage: str, kind: str) -> Config:
    config = load(stage, ["model=tiny", "hardware=cpu", "teacher.source=timm:test_vit", "teacher.image_size=64"])
    return replace(config, model=model_of(kind))


def found(parameters: int, flops: float) -> Measured:
    return Measured("cpu", False, parameters, flops, [])


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_timms_student_predicts_what_ours_does(alone: Ranks, kind: str, drops: bool) -> None:
    model = model_of(kind)
    ours = MaskedStudent(model.vision, [Target(24)], ParallelConfig(), torch.float32, drop_masked=drops)
    peer = TimmStudent(model, 24, CPU, drops)
    state = {name.removeprefix("trunk."): value for name, value in peer.state_dict().items()}
    names = [global_name(ours, name) for name, _ in ours.named_parameters()]
    load_tensors(ours, from_eva(state, names, VISION_NAMES, model.vision.heads))
    masks = torch.rand(3, model.vision.patches).argsort(dim=1) < 6
    inputs = torch.randn(3, 3, 32, 32), masks, masked_patch_indices(masks, 6)
    # float32, two layers of width 32
    torch.testing.assert_close(peer(*inputs), ours(*inputs)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("predict", ["masked", "visible", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_timm_trains_and_computes_as_much_as_we_do(
    alone: Ranks, kind: str, predict: Literal["masked", "visible", "all"]
) -> None:
    config = config_of("mim", kind)
    config = replace(config, mim=replace(config.mim, predict=predict))
    peer = TimmMasked(config, CPU)
    teachers = planned_teachers(config)
    assert [teacher.width for teacher in teachers] == [peer.teacher.width]
    (ours,) = build_student(config, predicted(config, teachers)["targets"], torch.float32, CPU).chunks
    size = sum(parameter.numel() for parameter in ours.parameters())
    theirs = sum(parameter.numel() for parameter in peer.model.parameters())
    check_equal(config, teachers, found(size, 0.0), found(theirs, peer.forward_flops()))
    for other in (found(theirs + 1, peer.forward_flops()), found(theirs, 1.02 * peer.forward_flops())):
        with pytest.raises(W2SError, match="the peer's towers are not ours"):
            check_equal(config, teachers, found(size, 0.0), other)


def test_timm_predicts_every_patch_where_nothing_is_masked() -> None:
    config = config_of("mim", "18b")
    config = replace(config, mim=replace(config.mim, masked_patches=0))
    peer = TimmMasked(config, CPU)
    batch = synthetic_batch(peer.spec, 4, config.model.text.vocab_size)
    shapes = []
    peer.model.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    before = [parameter.detach().clone() for parameter in peer.model.parameters()]
    peer.step(batch, Marks(CPU))
    assert shapes == [(4, 16, 64)]
    assert not any(torch.equal(old, new) for old, new in zip(before, peer.model.parameters(), strict=True) if old.any())


@pytest.mark.parametrize("kind", KINDS)
def test_open_clip_trains_and_computes_as_much_as_we_do(alone: Ranks, kind: str) -> None:
    config = config_of("clip", kind)
    towers = build_clip(config, torch.float32, CPU)
    size = sum(parameter.numel() for tower in towers for parameter in tower.chunks[0].parameters())
    theirs = sum(parameter.numel() for parameter in open_clip_model(config, CPU).parameters())
    check_equal(config, None, found(size, 0.0), found(theirs, OpenClip(config, CPU).forward_flops()))


@pytest.mark.parametrize(
    ("stage", "peer", "ranks", "overrides", "message"),
    [
        ("mim", "open_clip", 1, [], "--vs open_clip does not run stage mim: use --vs timm"),
        ("mim", "timm", 1, ["mim.layers=[{student: 0, teacher: 1}]"], "leave mim.layers out"),
        ("clip", "open_clip", 2, [], "--vs open_clip runs on one rank, not on --nproc 2"),
        ("clip", "open_clip", 1, ["train.micro_batch=8"], "train.micro_batch=8 is less than train.global_batch=256"),
        ("clip", "open_clip", 1, ["clip.loss=sigmoid"], "not clip.loss=sigmoid"),
    ],
)
def test_what_no_peer_can_do(stage: str, peer: str, ranks: int, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_peer(load(stage, overrides), peer, ranks)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_peers_update_is_ours(name: Literal["adamw", "lamb"]) -> None:
    optim = OptimConfig(name=name, lr=0.02, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator)
    theirs, ours = (torch.nn.Linear(4, 6, bias=False) for _ in range(2))
    kind = Lamb if name == "lamb" else torch.optim.AdamW
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    optimizers = [peer_optimizer(theirs, optim), kind(ours.parameters(), **settings)]
    for linear in (theirs, ours):
        linear.weight.data.copy_(weight)
    for _ in range(3):
        gradient = torch.randn(6, 4, generator=generator)
        for linear, optimizer in zip((theirs, ours), optimizers, strict=True):
            linear.weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(theirs.weight, ours.weight, rtol=1e-5, atol=1e-6)  # other orders of rounding
    assert not torch.allclose(ours.weight, weight, atol=1e-2)
