"""A rank whose linears are Transformer Engine's, beside the same with Megatron's own; prints what it found as JSON.

    python -m tests.megatron.fp8.transformer_engine_on_cpu.engine_steps FOLDER TENSOR

FOLDER holds an unpacked release; under torchrun's environment variables it is one of TENSOR ranks.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from tests.megatron.fp8.transformer_engine_on_cpu import stub

stub.install(Path(sys.argv[1]))

import torch.distributed as dist  # noqa: E402

from w2s.config.sections import HardwareConfig, OptimConfig, ParallelConfig, PrecisionConfig, VisionConfig  # noqa: E402
from w2s.config.teacher_losses import Target  # noqa: E402
from w2s.megatron.checkpoint import state  # noqa: E402
from w2s.megatron.fp8 import fp8_emulation, transformer_engine  # noqa: E402
from w2s.megatron.fp8.fp8_formats import FORWARD, block_scale  # noqa: E402
from w2s.megatron.fp8.linears import Linears  # noqa: E402
from w2s.megatron.model.initialize import init_parameters  # noqa: E402
from w2s.megatron.parallel import process_groups  # noqa: E402
from w2s.megatron.parallel.optimizer import Optimizer  # noqa: E402
from w2s.megatron.parallel.pipeline_schedule import forward_backward  # noqa: E402
from w2s.megatron.parallel.sharded import ShardedTower, data_parallel, shard  # noqa: E402
from w2s.towers.initial import vision_rule  # noqa: E402
from w2s.towers.masked_student import MaskedStudent  # noqa: E402

SHAPE = VisionConfig(image_size=64, patch_size=8, layers=3, width=256, heads=4, mlp_width=1280, qkv_bias=True)
IMAGES, WIDTH = 16, 64
BF16 = PrecisionConfig(compute="bf16")


class Unfused(Linears):
    """Whose products leave it to others to add gradients up."""

    def settings(self) -> dict[str, Any]:
        """As they are, but for that."""
        return {**super().settings(), "gradient_accumulation_fusion": False}


def tower(linears: Linears, parallel: ParallelConfig) -> ShardedTower[MaskedStudent]:
    def chunk(number: int) -> MaskedStudent:
        student = MaskedStudent(SHAPE, [Target(WIDTH)], parallel, torch.bfloat16, number, linears)
        init_parameters(student, vision_rule(SHAPE, post_norm=0.5), 1)
        return student

    return data_parallel(shard(chunk, parallel, torch.device("cpu")), parallel, linears.precision)


def passes(trained: ShardedTower[MaskedStudent]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, SHAPE.image_size, SHAPE.image_size, generator=generator)
    targets = torch.randn(IMAGES, SHAPE.patches, WIDTH, generator=generator)
    masks = torch.zeros(IMAGES, SHAPE.patches, dtype=torch.bool)
    masks[:, ::3] = True
    places = torch.arange(SHAPE.patches).expand(IMAGES, -1)

    def forward(part: MaskedStudent, batch: Any) -> Any:
        def loss(patches: torch.Tensor) -> Any:
            value = (patches.float() - targets).square().mean()
            return value, {"loss": value.detach()}

        return part(*batch)[0], loss

    batches = [(images, masks, places)] * 2
    reported = forward_backward(trained, batches, forward, IMAGES * (1 + SHAPE.patches))
    return float(reported[0]["loss"]), {name: p.main_grad.clone() for name, p in trained.chunks[0].named_parameters()}


class Blocks(torch.autograd.Function):
    """Products as the blockwise recipe makes them: 128 numbers along the sum share a scale, of a weight 128 x 128."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, linear: Any) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return (blocks(rows, 1) @ blocks(weight, 128).t()).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (rows, weight), (gradient,) = ctx.saved_tensors, gradients
        by_rows = blocks(gradient, 1) @ blocks(weight, 128)
        by_weight = blocks(gradient.t(), 1) @ blocks(rows.t(), 1).t()
        return by_rows.to(rows.dtype), by_weight.to(weight.dtype), None


def blocks(matrix: Tensor, height: int) -> Tensor:
    """A matrix rounded to E4M3 in blocks of so many rows and 128 columns, in float32."""
    scale = block_scale(matrix, FORWARD, rows=height)
    return (matrix.float() * scale).to(FORWARD).float() / scale


def float8(parallel: ParallelConfig) -> dict[str, float]:
    """How far current scales and blocks are from emulations of them, and from BF16 what else is made of FP8.

    That is delayed scales, in their second step and with a middle layer that stays without FP8.
    """

    def precision(recipe: Literal["tensorwise", "emulated", "delayed", "blockwise"]) -> PrecisionConfig:
        return replace(BF16, fp8=recipe)

    current = passes(tower(Linears("te", precision("tensorwise")), parallel))
    emulated = passes(tower(Linears("local", precision("emulated")), parallel))
    # Sequence parallelism would take rows in whole blocks from each rank.
    apart = replace(parallel, sequence=False)
    blockwise = passes(tower(Linears("te", precision("blockwise")), apart))
    with mock.patch.object(fp8_emulation.Product, "apply", Blocks.apply):
        by_blocks = passes(tower(Linears("local", precision("emulated")), apart))
    later = tower(Linears("te", precision("delayed"), bf16_layers=frozenset({1})), parallel)
    passes(later)
    later.wrapped[0].zero_grad_buffer()
    delayed, plain = passes(later), passes(tower(Linears("local", BF16), parallel))
    return {
        "loss": abs(current[0] / emulated[0] - 1),
        "gradients": worst(current[1], emulated[1]),
        "blockwise loss": abs(blockwise[0] / by_blocks[0] - 1),
        "blockwise gradients": worst(blockwise[1], by_blocks[1]),
        "delayed loss": abs(delayed[0] / plain[0] - 1),
        "delayed gradients": worst(delayed[1], plain[1]),
    }


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a gradient."""
    return max(float((ours[name] - each).norm() / each.norm()) for name, each in theirs.items())


def compare(parallel: ParallelConfig) -> dict[str, float]:
    """How far its linears are from Megatron's own, and whether those take over a checkpoint."""
    loss, gradients = passes(tower(Linears("local", BF16), parallel))
    trained = tower(Linears("te", BF16), parallel)
    stub.CALLS.update(accumulated=0)
    found_loss, found = passes(trained)
    fused = stub.CALLS["accumulated"]
    _, apart = passes(tower(Unfused("te", BF16), parallel))

    return {
        "loss": abs(found_loss / loss - 1),
        "gradients": worst(found, gradients),
        "fused": worst(found, apart),
        "accumulated": fused,
        "checkpoint": float(_same_after_a_checkpoint(trained, parallel)),
    }


def _same_after_a_checkpoint(trained: ShardedTower[MaskedStudent], parallel: ParallelConfig) -> bool:
    """Whether local linears take over what Transformer Engine's have learnt in a step."""
    optimizer = Optimizer({"vision": trained}, OptimConfig(lr=1e-3), torch.bfloat16)
    optimizer.step(1.0)
    names = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names, src=0)
    state.save(Path(names[0]), {"vision": trained}, optimizer, {}).finish()
    other = tower(Linears("local", BF16), parallel)
    state.load(Path(names[0]), {"vision": other}, Optimizer({"vision": other}, OptimConfig(), torch.bfloat16), step=1)
    pairs = zip(other.chunks[0].parameters(), trained.chunks[0].parameters(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def main(tensor: int) -> None:
    assert transformer_engine.load_error() is None, transformer_engine.load_error()
    layout = ParallelConfig(tensor=tensor, sequence=tensor > 1)
    with process_groups.init_distributed(layout, HardwareConfig(device="cpu")) as ranks:
        modes = ("none", "selective", "full")
        found = {mode: compare(replace(layout, recompute=mode)) for mode in modes}  # type: ignore[arg-type]
        found["float8"] = float8(layout)
        if ranks.main:
            Path(os.environ["FOUND"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[2]))
