"""What selective recompute forgets, and that it gives the gradients of the plain MLP."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.spawn import SHAPE
from w2s.config.sections import ParallelConfig
from w2s.config.teacher_losses import Target
from w2s.kernels.gelu import Recompute, bias_gelu
from w2s.megatron.model.initialize import init_parameters
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.initial import vision_rule
from w2s.towers.masked_student import MaskedStudent
from w2s.towers.vision import VisionTower


def run(recompute: Any) -> tuple[int, dict[str, Tensor]]:
    """How many GELU outputs live between forward and backward, and the gradients."""
    tower = VisionTower(SHAPE, 1, ParallelConfig(recompute=recompute), torch.float32)
    init_parameters(tower, vision_rule(SHAPE, post_norm=0.5), seed=1)
    outputs: list[weakref.ref[torch.UntypedStorage]] = []

    def gelu(hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Recompute]:
        output, again = bias_gelu(hidden, bias)
        outputs.append(weakref.ref(output.untyped_storage()))
        return output, again

    images = torch.randn(2, 3, SHAPE.image_size, SHAPE.image_size, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        for module in tower.modules():
            if hasattr(module, "activation_func"):
                patch.setattr(module, "activation_func", gelu)
        loss = tower.encode(images).square().sum()
    gc.collect()
    alive = sum(output() is not None for output in outputs)
    assert len(outputs) == SHAPE.layers
    loss.backward()
    return alive, {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}


def test_selective_recompute_keeps_no_gelu_outputs(alone: Ranks) -> None:
    kept, plain = run("none")
    forgotten, recompute_activation = run("selective")
    assert (kept, forgotten) == (SHAPE.layers, 0)
    assert plain.keys() == recompute_activation.keys()
    for name, gradient in plain.items():
        assert torch.equal(recompute_activation[name], gradient), name


def test_a_pass_without_gradients_keeps_nothing(alone: Ranks) -> None:
    """The forward pass of recomputed layers, and the first of two of the contrastive stage."""
    tower = VisionTower(SHAPE, 1, ParallelConfig(), torch.float32)
    init_parameters(tower, vision_rule(SHAPE, post_norm=0.5), seed=1)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    images = torch.randn(2, 3, SHAPE.image_size, SHAPE.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tower.encode(images)
    assert not saved


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_every_module_with_weights_is_called(alone: Ranks, norm: Any, placement: Any) -> None:
    """Megatron waits for weights that are still being gathered in hooks of the modules that have them."""
    shape = replace(SHAPE, norm=norm, norm_placement=placement, qkv_bias=True)
    tower = MaskedStudent(shape, [Target(8)], ParallelConfig(), torch.float32)
    called: set[str] = set()
    owners = {name: module for name, module in tower.named_modules() if [*module.parameters(recurse=False)]}
    for name, module in owners.items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.add(name))
    places = torch.tensor([[3, 9]])
    masks = torch.zeros(1, shape.patches, dtype=torch.bool).scatter(1, places, True)
    tower(torch.zeros(1, 3, shape.image_size, shape.image_size), masks, places)
    assert called == owners.keys()
