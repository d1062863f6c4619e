"""Training runs of the released EVA code, and w2s's stages over the same batches from the same weights."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkpoint.eva_weights import from_eva
from tests.distributed import means
from tests.megatron.layer_weights import load_tensors
from tests.megatron.pieces import Pieces, axis_of, join_pieces
from w2s.checkpoint.weights.eva_format import VISION_NAMES, is_fused, released_name, separate
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.samples.batch import Batch
from w2s.megatron.model.initialize import global_name
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.optim.lr_schedule import lr_factor
from w2s.stages.clip import ContrastiveStage
from w2s.stages.mim import MaskedStage
from w2s.teachers.base import Features, PatchNetwork, Teacher
from w2s.teachers.distillation import masked_teacher
from w2s.training.stage import train_step


@dataclass
class Trajectory:
    """What a run did: names are the released ones."""

    losses: Tensor
    """Loss of every step: float64 [steps]."""
    norms: Tensor
    """Gradient norm of every step before clipping: float64 [steps]."""
    rates: list[dict[str, float]]
    """Learning rate of each weight, step by step."""
    decays: dict[str, float]
    """Weight decay of each weight."""
    weights: dict[str, Tensor]
    """The weights after the last step."""


@dataclass
class Reference:
    """A file: the released code's run, what it began with, and how far another order of samples would have moved it."""

    stage: str
    """`clip` or `mim`."""
    settings: dict[str, Any]
    start: dict[str, Tensor]
    """The weights before the first step."""
    batches: dict[str, Tensor]
    """What a step takes: [batches, samples, ...]; step s has batch s modulo their number."""
    run: Trajectory
    noise: dict[str, float]
    """Of each final weight, as a share of its path."""
    loss_noise: float
    norm_noise: float
    """Relative."""

    def of_step(self, step: int, local: slice) -> dict[str, Tensor]:
        """Some of the samples of a step."""
        return {name: values[step % len(values)][local] for name, values in self.batches.items()}

    @classmethod
    def read(cls, path: Path) -> "Reference":
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names, noise = json.loads(meta["names"]), json.loads(meta["noise"])

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}

        def by_name(values: Tensor) -> dict[str, float]:
            return dict(zip(names, values.tolist(), strict=True))

        run = Trajectory(
            losses=tensors["steps/loss"],
            norms=tensors["steps/grad_norm"],
            rates=[by_name(row) for row in tensors["steps/rates"]],
            decays=by_name(tensors["decay"]),
            weights=part("final/"),
        )
        return cls(
            stage=path.name.partition("_")[0],
            settings=json.loads(meta["settings"]),
            start=part("start/"),
            batches=part("batch/"),
            run=run,
            noise=by_name(tensors["noise"]),
            loss_noise=noise[0],
            norm_noise=noise[1],
        )


def options(reference: Reference) -> list[str]:
    """The file's settings as options of `w2s stage`."""
    count = reference.batches["images"].shape[1]
    return [
        *(_clip_options if reference.stage == "clip" else _mim_options)(reference.settings),
        f"train.steps={reference.settings['steps']}",
        f"train.global_batch={count}",
        f"train.micro_batch={count}",
        f"optim.warmup={reference.settings['warmup']}",
        f"optim.clip_grad={reference.settings['clip_grad']}",
        f"optim.eps={reference.settings['eps']}",
        "hardware=cpu",
        "data.builtin=none",
        "eval.shards=",
        "eval.knn_shards=",
    ]


def _clip_options(settings: dict[str, Any]) -> list[str]:
    vision, text, args = settings["vision"], settings["text"], settings["args"]
    return [
        f"model.embed_dim={settings['embed_dim']}",
        f"model.vision.image_size={vision['image_size']}",
        f"model.vision.patch_size={vision['patch_size']}",
        f"model.vision.layers={vision['layers']}",
        f"model.vision.width={vision['width']}",
        f"model.vision.heads={vision['width'] // vision['head_width']}",
        f"model.vision.mlp_width={int(vision['width'] * vision['mlp_ratio'])}",
        f"model.vision.norm={'rmsnorm' if vision['use_rms_norm'] else 'layernorm'}",
        f"model.vision.norm_placement={'post' if vision['postnorm'] else 'pre'}",
        f"model.vision.qkv_bias={json.dumps(vision['qkv_bias'])}",
        *(f"model.text.{key}={text[key]}" for key in ("context_length", "vocab_size", "layers", "width", "heads")),
        f"model.text.mlp_width={4 * text['width']}",
        f"clip.patch_dropout={settings['dropout']}",
        "clip.equal_captions=negatives",
        f"optim.name={'adamw' if settings['optimizer'] == 'adamw' else 'lamb'}",
        f"optim.trust_ratio={'[0.01,10]' if settings['optimizer'] == 'bounded' else 'null'}",
        f"optim.lr={args['lr']}",
        f"optim.vision_lr={args['visual_lr']}",
        f"optim.text_lr={args['text_lr']}",
        f"optim.vision_layer_decay={args['visual_ld']}",
        f"optim.text_layer_decay={args['text_ld']}",
        f"optim.betas=[{args['beta1']},{args['beta2']}]",
        f"optim.weight_decay={args['wd']}",
    ]


def _mim_options(settings: dict[str, Any]) -> list[str]:
    model = settings["model"]
    return [
        f"model.vision.image_size={model['img_size']}",
        f"model.vision.patch_size={model['patch_size']}",
        f"model.vision.layers={model['depth']}",
        f"model.vision.width={model['embed_dim']}",
        f"model.vision.heads={model['num_heads']}",
        f"model.vision.mlp_width={int(model['embed_dim'] * model['mlp_ratio'])}",
        f"model.vision.norm={settings['norm']}",
        f"model.vision.norm_placement={'post' if settings['postnorm'] else 'pre'}",
        f"model.vision.qkv_bias={json.dumps(settings['qkv_bias'])}",
        f"mim.masked_patches={settings['masked']}",
        "teacher.target_norm=none",
        f"optim.lr={settings['lr']}",
        f"optim.min_lr={settings['min_lr'] / settings['lr']}",
        f"optim.betas={settings['betas']}",
        f"optim.weight_decay={settings['weight_decay']}",
    ]


class _FixedNetwork(PatchNetwork):
    """Stands for the teacher: gives the features it was told, image by image, however they are cut into batches."""

    def __init__(self, settings: dict[str, Any]) -> None:
        size, width = settings["model"]["img_size"], settings["teacher"]
        grid = size // settings["model"]["patch_size"]
        super().__init__(width=width, summary_width=width, grid=grid, image_size=size, mean=(0, 0, 0), std=(1, 1, 1))
        self.device_of = nn.Parameter(torch.empty(0))
        self.coming = torch.empty(0)

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        part, self.coming = self.coming[: len(images)], self.coming[len(images) :]
        return Features(part, part.mean(1))


def follow(path: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Train as a file did, as one rank of a process group; `changes` are further options of w2s."""
    reference = Reference.read(path)
    config = load(reference.stage, [*options(reference), *changes])
    with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
        return (_follow_clip if reference.stage == "clip" else _follow_mim)(reference, config, ranks)


def _follow_clip(reference: Reference, config: Config, ranks: Ranks) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        save_file(reference.start, file.name)
        start = replace(config.init, vision=file.name, text=file.name)
        stage = ContrastiveStage(replace(config, init=start), ranks)
        stage.begin()
    stage.optimizer.copy_model_to_master()

    def batch(step: int, local: slice) -> Batch:
        given = reference.of_step(step, local)
        kept = given["kept"].sort(dim=1).values if "kept" in given else None
        count, pairs = len(given["images"]), torch.arange(config.train.global_batch)[local]
        return Batch(
            images=given["images"],
            tokens=given["tokens"],
            kept=kept,
            caption_hashes=pairs,
            keys=[""] * count,
            indices=pairs,
        )

    return _train(stage, config, ranks, batch)


def _follow_mim(reference: Reference, config: Config, ranks: Ranks) -> dict[str, Any]:
    network = _FixedNetwork(reference.settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            masked_teacher,
            "build_teacher",
            lambda *_, **__: Teacher(network, grid=network.grid),
        )
        stage = MaskedStage(config, ranks)
    for part in stage.student.chunks:
        names = [global_name(part, name) for name, _ in part.named_parameters()]
        load_tensors(part, from_eva(reference.start, names, VISION_NAMES, config.model.vision.heads))
    stage.optimizer.copy_model_to_master()

    def batch(step: int, local: slice) -> Batch:
        given = reference.of_step(step, local)
        images, network.coming = given["images"], given["features"]
        indices = torch.arange(config.train.global_batch)[local]
        return Batch(
            images=images, teacher_images=(images,), masks=given["masks"], keys=[""] * len(images), indices=indices
        )

    return _train(stage, config, ranks, batch)


def _train(stage: Any, config: Config, ranks: Ranks, batch: Callable[[int, slice], Batch]) -> dict[str, Any]:
    share = config.train.global_batch // ranks.world_size
    local, logs, rates = slice(ranks.data_reader_rank * share, (ranks.data_reader_rank + 1) * share), [], []
    for step in range(config.train.steps):
        factor = lr_factor(step, config.train.steps, config.optim)
        logs.append(means(ranks, train_step(stage, batch(step, local), factor)))
        rates.append(_of_groups(stage, "lr"))
    pieces: Pieces = {
        f"{tower}.{global_name(part, name)}": (parameter.detach().clone(), axis_of(parameter))
        for tower, sharded in stage.towers.items()
        for part in sharded.chunks
        for name, parameter in part.named_parameters()
    }
    return {"logs": logs, "rates": rates, "decays": _of_groups(stage, "weight_decay"), "weights": pieces}


def _of_groups(stage: Any, key: str) -> dict[str, float]:
    """A setting of the optimizer's groups, for each weight of which this rank updates a part."""
    optimizer = stage.optimizer.sharded
    return {
        f"{tower}.{global_name(part, name)}": float(optimizer.param_groups[place[0]][key])
        for tower, sharded in stage.towers.items()
        for part in sharded.chunks
        for name, parameter in part.named_parameters()
        if (place := optimizer.model_param_group_index_map.get(parameter))
    }


def join(reference: Reference, everyone: Sequence[dict[str, Any]]) -> Trajectory:
    """One run out of what `follow` returned on every rank."""
    logs = everyone[0]["logs"]
    assert all(rank["logs"] == logs for rank in everyone), "every rank logs the same"

    def merged(parts: Sequence[dict[str, float]]) -> dict[str, float]:
        return {_released(name, reference.stage): value for part in parts for name, value in part.items()}

    return Trajectory(
        losses=torch.tensor([log["loss"] for log in logs], dtype=torch.float64),
        norms=torch.tensor([log["grad_norm"] for log in logs], dtype=torch.float64),
        rates=[merged(parts) for parts in zip(*(rank["rates"] for rank in everyone), strict=True)],
        decays=merged([rank["decays"] for rank in everyone]),
        weights=_released_weights(reference, join_pieces([rank["weights"] for rank in everyone])),
    )


def _released_weights(reference: Reference, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    model = load(reference.stage, options(reference)).model
    heads = {"vision": model.vision.heads, "text": model.text.heads}
    return {
        _released(name, reference.stage): separate(value, heads[name.partition(".")[0]]) if is_fused(name) else value
        for name, value in weights.items()
    }


def _released(name: str, stage: str) -> str:
    """The masked stage's names have no tower in front."""
    return released_name(name).removeprefix("visual." if stage == "mim" else "")
