"""From the configuration to a teacher.

timm and open_clip take longer to import than all of w2s: each is, where a teacher needs it.
"""

import difflib
import logging
from contextlib import nullcontext
from pathlib import Path

import torch

from w2s.checkpoint.find import find_any
from w2s.checkpoint.own.verifying import verify
from w2s.config.imported import imported_class
from w2s.config.sections import ParallelConfig, TeacherConfig
from w2s.errors import ConfigError
from w2s.teachers.base import PatchNetwork, Teacher
from w2s.teachers.networks.efficientnet import SIZES, EfficientNetLite
from w2s.teachers.networks.sharded_run import ShardedRun
from w2s.teachers.networks.teacher_weights import check_weights, name_and_weights, weights_file

logger = logging.getLogger(__name__)

FORMS = {
    **{name: name for name in SIZES},
    "timm": "timm:MODEL[@FILE]",
    "open_clip": "open_clip:MODEL[@FILE]",
    "eva": "eva:MODEL[@FILE]",
    "hf": "hf:FOLDER",
    "python": "python:MODULE:CLASS",
    "w2s": "w2s:RUN",
}


def build_teacher(
    config: TeacherConfig,
    *,
    grid: int,
    device: torch.device | str,
    root: str | Path = "runs",
    parallel: ParallelConfig | None = None,
) -> Teacher:
    """The frozen teacher of `config` for a student of `grid` x `grid` patches, on `device`.

    Random weights are the same on every rank and leave the global generator as it was.

    Args:
        config: the teacher's section.
        grid: the student's patches along one side.
        device: where it lives.
        root: folder of the runs, for a run that is given by its name.
        parallel: how the ranks are split, for a teacher that is split with them.

    Raises:
        ConfigError: the source or the model is unknown, or the image size does not fit.
        CheckpointError: the weights are missing, damaged, or another model's.
        MissingPackageError: the package that carries the weights, or that reads them, is not installed.
    """
    check_weights(config)
    kind, _, run = config.source.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "w2s" and run:
            network = _run(config, run, Path(root).expanduser(), parallel or ParallelConfig())
        else:
            network = _network(config, grid, on_meta=False)
    return Teacher(network, grid=grid, precision=config.precision, compiled=config.compile).to(device)


def without_weights(config: TeacherConfig, *, grid: int) -> PatchNetwork:
    """The network of `build_teacher` on the meta device, in evaluation mode, for every source but `w2s:RUN`.

    Raises:
        ConfigError: the source or the model is unknown, or the source is a run.
        CheckpointError: a folder of transformers that does not exist.
    """
    return _network(config, grid, on_meta=True).to("meta").eval().requires_grad_(False)


def _network(config: TeacherConfig, grid: int, *, on_meta: bool) -> PatchNetwork:
    """The network of every source but `w2s:RUN`; on the meta device no file of EVA, timm or open_clip is looked for."""
    size = config.image_size
    if config.source in SIZES:
        return EfficientNetLite(config.source, image_size=size, grid=grid)
    kind, _, rest = config.source.partition(":")
    if kind == "hf" and rest:
        from w2s.teachers.networks.hugging_face import hugging_face_model

        return hugging_face_model(Path(rest).expanduser(), image_size=size, precision=config.precision)
    if kind == "python" and rest:
        with torch.device("meta") if on_meta else nullcontext():
            network: PatchNetwork = imported_class("teacher.source", rest, PatchNetwork, ["image_size"])(
                image_size=size
            )
        return network
    name, path = name_and_weights(rest)
    if kind not in ("eva", "open_clip", "timm") or not name:
        raise _no_teacher(config.source, kind)
    file = None if on_meta else weights_file(path, kind, name)
    with torch.device("meta") if on_meta else nullcontext():
        if kind == "eva":
            from w2s.teachers.networks.eva_vit import eva_vit

            network = eva_vit(name, file, image_size=size, precision=config.precision)
        elif kind == "timm":
            from w2s.teachers.networks.timm_vit import timm_model

            network = timm_model(name, file, image_size=size)
        else:
            from w2s.teachers.networks.open_clip_vit import open_clip_model

            network = open_clip_model(name, file, image_size=size)
    if file is None and not on_meta:
        logger.warning("the teacher's weights are random: give a file with teacher.source=%s@FILE", config.source)
    return network


def _run(config: TeacherConfig, name: str, root: Path, parallel: ParallelConfig) -> PatchNetwork:
    """The vision tower of a run: whole on every rank, or split over the tensor-parallel ones."""
    if name in ("latest", "none"):
        raise ConfigError(f"teacher.source={config.source} may be another one tomorrow: give the run's name")
    checkpoint = find_any(name, root, key="teacher.source")
    verify(checkpoint)
    if config.sharded:
        return ShardedRun(
            checkpoint, parallel, image_size=config.image_size, precision=config.precision, weights=config.weights
        )
    from w2s.teachers.networks.eva_vit import w2s_run

    return w2s_run(checkpoint, image_size=config.image_size, precision=config.precision, weights=config.weights)


def _no_teacher(source: str, kind: str) -> ConfigError:
    near = difflib.get_close_matches(kind, FORMS, n=1) or FORMS
    return ConfigError(f"teacher.source={source} is not a teacher: use {' or '.join(FORMS[key] for key in near)}")
