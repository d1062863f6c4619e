"""Our towers against reference tensors of the released EVA code: outputs, losses and gradients.

Every file of the folder W2S_FIXTURES is read; towers are built from its metadata alone.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tests.checkpoint.eva_weights import from_eva, to_eva
from tests.distributed import run_ranks
from tests.megatron.layer_weights import load_tensors
from tests.megatron.pieces import Pieces, axis_of, join_pieces
from w2s.checkpoint.weights.eva_format import TEXT_NAMES, VISION_NAMES
from w2s.config.sections import ParallelConfig, PrecisionConfig, TextConfig, VisionConfig
from w2s.config.teacher_losses import Target
from w2s.megatron.model.initialize import global_name
from w2s.megatron.model.tower import Tower
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.pipeline_schedule import forward_backward, infer
from w2s.megatron.parallel.sharded import ShardedTower, data_parallel, shard
from w2s.objectives.contrastive import contrastive_loss
from w2s.objectives.masked_loss import masked_cosine_loss
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.masked_student import MaskedStudent

FOLDER = Path(os.environ.get("W2S_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))
FILES = sorted(FOLDER.glob("*.safetensors"))
TOLERANCE = 1e-5
"""Relative to the largest value of a tensor: sums of a few hundred float32 products differ by a few 1e-7 a layer."""

# A folder that was named must hold some; the default one may be missing.
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir() and "W2S_FIXTURES" not in os.environ, reason=f"there is no {FOLDER}"
)


def test_there_are_reference_tensors() -> None:
    assert FILES, f"no .safetensors in {FOLDER}"


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def vision_shape(metadata: dict[str, str]) -> VisionConfig:
    cfg: dict[str, Any] = json.loads(metadata["vision_cfg"])
    return VisionConfig(
        image_size=cfg["image_size"],
        patch_size=cfg["patch_size"],
        layers=cfg["layers"],
        width=cfg["width"],
        heads=cfg["width"] // cfg["head_width"],
        mlp_width=int(cfg["width"] * cfg["mlp_ratio"]),
        norm="rmsnorm" if cfg["use_rms_norm"] else "layernorm",
        norm_placement="post" if cfg["postnorm"] else "pre",
        qkv_bias=cfg["qkv_bias"],
    )


def text_shape(metadata: dict[str, str]) -> TextConfig:
    cfg: dict[str, Any] = json.loads(metadata["text_cfg"])
    return TextConfig(
        context_length=cfg["context_length"],
        vocab_size=cfg["vocab_size"],
        layers=cfg["layers"],
        width=cfg["width"],
        heads=cfg["heads"],
        mlp_width=4 * cfg["width"],
    )


def names_of(tower: Tower) -> list[str]:
    return [global_name(tower, name) for name, _ in tower.named_parameters()]


def fill_from(tower: Tower, released: dict[str, Tensor], names: dict[str, str]) -> None:
    local_names = [name for name in names_of(tower) if name != "logit_scale"]
    tensors = from_eva(released, local_names, names, tower.config.num_attention_heads)
    load_tensors(tower, {**tensors, "logit_scale": released.get("logit_scale", torch.empty(0))})


def sharded(
    build: Callable[[int], Any], released: dict[str, Tensor], names: dict[str, str], parallel: ParallelConfig
) -> Any:
    """A tower with the released weights, split and ready for a backward pass."""

    def chunk(index: int) -> Any:
        tower = build(index)
        fill_from(tower, released, names)
        return tower

    return data_parallel(shard(chunk, parallel, torch.device("cpu")), parallel, PrecisionConfig())


def send_back(
    tower: ShardedTower[Any], inputs: Sequence[Tensor], tokens: int, gradient: Tensor, **scalars: Tensor
) -> Pieces:
    """Gradients of the weights, given those by the output and by scalars of the tower."""
    for part in tower.wrapped:
        part.zero_grad_buffer()

    def forward(chunk: Any, inputs: Sequence[Tensor]) -> Any:
        def loss(output: Tensor) -> Any:
            grad_logit_parameters = [by * getattr(chunk, name) for name, by in scalars.items()]
            return (output * gradient).sum() + sum(grad_logit_parameters), {}

        return call(chunk, *inputs), loss

    forward_backward(tower, [inputs], forward, len(inputs[0]) * tokens)
    return {
        global_name(part, name): (parameter.main_grad, axis_of(parameter))
        for part in tower.chunks
        for name, parameter in part.named_parameters()
    }


def call(chunk: Any, *inputs: Tensor) -> Tensor:
    output = chunk(*inputs)
    return output[0] if isinstance(output, tuple) else output


def patch_targets(chunk: Any, images: Tensor) -> Tensor:
    tokens = chunk.encode(images)
    return chunk.head(tokens)[:, 1:] if chunk.last else tokens


def clip_numbers(path: Path, parallel: ParallelConfig) -> tuple[dict[str, Tensor], dict[str, Pieces]]:
    metadata, tensors = read(path)
    state, images, texts = part(tensors, "state/"), tensors["in/image"], tensors["in/text"]
    embed_dim, dtype = int(metadata["embed_dim"]), torch.float32
    seen, spoken = vision_shape(metadata), text_shape(metadata)
    vision = sharded(
        lambda chunk: ImageTower(seen, embed_dim, parallel, dtype, chunk),
        part(state, "visual."),
        VISION_NAMES,
        parallel,
    )
    words = {**part(state, "text."), "logit_scale": state["logit_scale"]}
    text = sharded(lambda chunk: TextTower(spoken, embed_dim, parallel, dtype, chunk), words, TEXT_NAMES, parallel)

    out = {
        "image_features": infer(vision, (images,), call, 1 + seen.patches),
        "text_features": infer(text, (texts,), call, spoken.context_length),
        "patch_targets": infer(vision, (images,), patch_targets, 1 + seen.patches),
    }
    leaves = [x.clone().requires_grad_() for x in (out["image_features"], out["text_features"], state["logit_scale"])]
    units = (F.normalize(leaf, dim=-1) for leaf in leaves[:2])
    out["clip_loss"] = contrastive_loss(*units, leaves[2].exp(), tile=4)
    grad_images, grad_texts, grad_scale = torch.autograd.grad(out["clip_loss"], leaves)
    grads = {
        "visual.": send_back(vision, (images,), 1 + seen.patches, grad_images),
        "text.": send_back(text, (texts,), spoken.context_length, grad_texts, logit_scale=grad_scale),
    }
    return {name: value.detach() for name, value in out.items()}, grads


def masked_numbers(path: Path, parallel: ParallelConfig) -> tuple[dict[str, Tensor], dict[str, Pieces]]:
    metadata, tensors = read(path)
    shape, images, masks = vision_shape(metadata), tensors["in/image"], tensors["in/mask"]
    width = int(metadata["teacher_dim"])
    student = sharded(
        lambda chunk: MaskedStudent(shape, [Target(width)], parallel, torch.float32, chunk),
        part(tensors, "state/"),
        VISION_NAMES,
        parallel,
    )
    # Images may have different numbers of masked patches: predict everywhere, and look at the masked ones.
    inputs = images, masks, torch.arange(shape.patches).expand(len(images), -1)
    predictions = infer(student, inputs, call, 1 + shape.patches).requires_grad_()
    loss = masked_cosine_loss(predictions[masks], tensors["in/targets"][masks])
    loss.backward()
    out = {"pred_masked": predictions[masks].detach(), "mim_loss": loss.detach()}
    return out, {"": send_back(student, inputs, 1 + shape.patches, predictions.grad)}


def outputs_of_rank(paths: list[Path], parallel: ParallelConfig) -> dict[str, Any]:
    """What a rank of a layout has to say about every file."""
    with process_groups.initialize_groups(parallel, torch.device("cpu")):
        return {
            path.name: (clip_numbers if path.name.startswith("clip") else masked_numbers)(path, parallel)
            for path in paths
        }


LAYOUTS = {
    "one process": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "TP2 + SP": ParallelConfig(tensor=2, sequence=True),
    "PP2": ParallelConfig(pipeline=2),
    "TP2 x PP2": ParallelConfig(tensor=2, pipeline=2),
}


@functools.cache
def everyone(layout: str) -> list[dict[str, Any]]:
    """The numbers of all ranks of a layout."""
    parallel = LAYOUTS[layout]
    return run_ranks(outputs_of_rank, parallel.tensor * parallel.pipeline, FILES, parallel)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_released_numbers(path: Path, layout: str) -> None:
    metadata, tensors = read(path)
    outputs, gradients = zip(*(rank[path.name] for rank in everyone(layout)), strict=True)
    for name, theirs in part(tensors, "out/").items():
        for ours in outputs:
            assert_close(name, ours[name], theirs)
    found: dict[str, Tensor] = {}
    for prefix in gradients[0]:
        whole = join_pieces([rank[prefix] for rank in gradients])
        names, heads = (
            (TEXT_NAMES, text_shape(metadata).heads)
            if prefix == "text."
            else (VISION_NAMES, vision_shape(metadata).heads)
        )
        for name, value in to_eva(whole, names, heads).items():
            found[name if name == "logit_scale" else f"{prefix}{name}"] = value
    assert_gradients(found, part(tensors, "grad/"))


def assert_close(name: str, ours: Tensor, theirs: Tensor, floor: float = 0.0) -> None:
    error = (ours.float() - theirs).abs().max() / max(float(theirs.abs().max()), floor)
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


def assert_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    # K's bias has no effect, so what the reference has for it is rounding noise: compare on the scale of all of them.
    scale = 1e-3 * max(float(value.abs().max()) for value in theirs.values())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_close(name, ours[name], value, floor=scale)
