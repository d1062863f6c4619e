"""`w2s encode`: features of images and texts from any checkpoint, the work split over the ranks."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.own.verifying import verify
from w2s.checkpoint.starts.handover import hand_over
from w2s.checkpoint.weights.inspecting import known_models
from w2s.checkpoint.weights.released import open_released
from w2s.config.layout_checks import check_ranks, check_towers
from w2s.config.load import load, model_from, named_model
from w2s.config.precision import compute_dtype
from w2s.config.sections import Config
from w2s.config.teacher_losses import Target
from w2s.data.samples.tokens import tokenize
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import EXTENSIONS, list_shards, shard_name
from w2s.data.shards.raw_sample import BadSample, find_images
from w2s.errors import CheckpointError, ConfigError, DataError, UserError
from w2s.evaluation.batched_features import TensorItems, encode_all, over_frames
from w2s.evaluation.images import view
from w2s.evaluation.tower_features import patch_features, tower_outputs
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.pipeline_schedule import infer
from w2s.megatron.parallel.process_groups import Ranks
from w2s.processes.liveness.heartbeat_sender import watched
from w2s.processes.stopping import stop_at_once
from w2s.towers.build import build_clip, build_student
from w2s.towers.clip import ImageTower, TextTower

Encode = Callable[[Tensor], Tensor]
"""Takes a batch [n, ...], the same on every rank of a model-parallel group; returns features [n, d]."""


@dataclass(frozen=True)
class EncodeJob:
    """What to encode, and with what.

    Attributes:
        checkpoint: a folder with meta.json, or other people's weights of `config.model`.
        config: model, layout, precision, hardware and the shards' keys.
        images: image files or shards: a glob, a brace pattern, or a folder of shards; empty for none.
        texts: file with a text a line, if there are texts.
        out: the safetensors file to write.
        batch_size: images or texts of one forward pass.
    """

    checkpoint: Path
    config: Config
    images: str
    texts: Path | None
    out: Path
    batch_size: int


def configured(checkpoint: Path, model: str | None, overrides: Sequence[str], ranks: int) -> Config:
    """Return the configuration to encode with a checkpoint of ours, or with other people's weights of `model`.

    Raises:
        ConfigError: other people's weights without a model, two ways of resizing, or a layout that does not work.
    """
    config = load("eval", overrides)
    if len(config.eval.resizes) > 1:
        raise ConfigError(f"eval.resize={config.eval.resize}: an image has one feature, use crop or squash")
    if model is not None:
        config = replace(config, model=named_model(model))
    elif (checkpoint / "meta.json").is_file():
        config = replace(config, model=model_from(read_meta(checkpoint).config))
    else:
        known = known_models(open_released(checkpoint))
        raise ConfigError(f"{checkpoint} does not say what it is: give --model {' or '.join(known) or 'NAME'}")
    check_ranks(config, ranks)
    check_towers(config)
    return config


def run(job: EncodeJob) -> None:
    """Write `image_features` [n, d] and `text_features` [m, d] in float32, as the model gives them, not normalised.

    Names of the images and the texts are JSON lists in the file's metadata, in the order of the rows.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model, or has no tower for what is asked.
        DataError: an image or the file of texts cannot be read.
        UserError: `job.out` cannot be written.
    """
    _check_out(job.out)
    parallel, hardware = job.config.parallel, job.config.hardware
    with (
        stop_at_once(),
        process_groups.init_distributed(parallel, hardware) as ranks,
        watched(hardware, ranks) as heartbeat,
    ):
        heartbeat.at("encoding", long=True)
        vision, text, kind = _encoders(job, ranks)
        features: dict[str, Tensor] = {}
        about = {"checkpoint": str(job.checkpoint), "model": job.config.model.name}
        if job.images:
            names, features["image_features"] = _all_images(job, vision, ranks)
            about |= {"image_names": json.dumps(names), "image_features": kind}
        if job.texts is not None and text is not None:
            texts = _lines(job.texts)
            features["text_features"] = _all_texts(job, texts, text, ranks)
            about["texts"] = json.dumps(texts)
        if ranks.main:
            _save(job.out, features, about)
            print(f"{', '.join(f'{name} {list(value.shape)}' for name, value in features.items())}: {job.out}")


def _encoders(job: EncodeJob, ranks: Ranks) -> tuple[Encode, Encode | None, str]:
    """The two towers as functions (a masked run has no text tower), and in words what the features of an image are."""
    config, dtype, weights = job.config, compute_dtype(job.config.precision), job.config.eval.weights
    verify(job.checkpoint)
    source = open_released(job.checkpoint, weights)
    if not source.has("visual"):
        raise CheckpointError(f"{job.checkpoint} is a text tower alone: encode with a whole CLIP")
    if job.texts is not None and not source.has("text"):
        raise CheckpointError(f"{job.checkpoint} has no text tower: leave --texts out, or encode with a clip run")
    if not source.embeds_images:
        student = build_student(config, [Target(1)], dtype, ranks.device)
        hand_over(student, "vision", job.checkpoint, weights=weights)
        return lambda images: patch_features(student, images).mean(1), None, "mean of the normed patch tokens"
    vision, text = build_clip(config, dtype, ranks.device)
    if job.images:
        hand_over(vision, "vision", job.checkpoint, weights=weights)
    if job.texts is not None:
        hand_over(text, "text", job.checkpoint, weights=weights)

    def encode_image(images: Tensor) -> Tensor:
        return tower_outputs(vision, images, ImageTower.__call__)

    def encode_text(captions: Tensor) -> Tensor:
        return infer(text, (captions.to(ranks.device),), TextTower.__call__, captions.shape[1])

    return (
        encode_image,
        encode_text,
        "projected class token" if config.model.vision.class_tokens else "tokens pooled by attention",
    )


def _all_images(job: EncodeJob, encode: Encode, ranks: Ranks) -> tuple[list[str], Tensor]:
    """Names and features of all images; a rank decodes only those that it encodes."""
    source = _image_files(job.images, job.config.data.image_key)
    names: list[str] = []
    features: list[Tensor] = []
    while files := list(islice(source, job.batch_size * ranks.data_size)):
        names += [name for name, _ in files]

        def encode_image(indices: Tensor, files: list[tuple[str, list[bytes]]] = files) -> Tensor:
            views = [_view(name, images, job.config) for name, images in (files[index] for index in indices.tolist())]
            return over_frames(encode)(torch.stack(views)).float()

        indices = torch.arange(len(files))
        features.append(encode_all(encode_image, TensorItems(indices), job.batch_size, ranks.data_group).cpu())
    return names, torch.cat(features)


def _all_texts(job: EncodeJob, texts: list[str], encode: Encode, ranks: Ranks) -> Tensor:
    tokens = tokenize(texts, job.config.model.text.context_length)
    return encode_all(lambda part: encode(part).float(), TensorItems(tokens), job.batch_size, ranks.data_group).cpu()


def _image_files(source: str, image_key: str) -> Iterator[tuple[str, list[bytes]]]:
    """Names and contents of the images that `source` names, in order; a clip can have several."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(path.suffix in EXTENSIONS for path in folder.iterdir()):
        raise DataError(f"--images {source} is a folder without shards: for its pictures give '{folder}/*.jpg'")
    for path in list_shards(source, "--images"):
        if not path.endswith(EXTENSIONS):
            yield path, [Path(path).read_bytes()]
            continue
        for sample in read_shard(path):
            images = find_images(sample.files, image_key)
            if not images:
                reason = sample.damage or f"no image .{image_key}"
                raise DataError(f"--images: {path}: {sample.key}: {reason}, repair the shard")
            yield f"{shard_name(path)}/{sample.key}", images


def _view(name: str, images: list[bytes], config: Config) -> Tensor:
    """An image or a clip after CLIP's test transform."""
    try:
        (pixels,) = view(images, config.data.frames, [config.model.vision.image_size], config.eval.resizes[0])
        return pixels
    except BadSample as error:
        raise DataError(f"--images: {name}: {error}, leave it out") from error


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--texts {path} cannot be read as UTF-8 text: {error}") from error
    if not lines:
        raise DataError(f"--texts {path} is empty: write a text a line")
    return lines


def _check_out(path: Path) -> None:
    """Refuse a file that cannot be written before the work is done."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from error


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, about)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {path} cannot be written: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
