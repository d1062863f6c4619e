"""From the configuration to a teacher."""

import difflib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from w2s.config.sections import TeacherConfig
from w2s.errors import CheckpointError, ConfigError
from w2s.teachers.base import PatchNetwork, Teacher
from w2s.teachers.efficientnet import EfficientNetLite0
from w2s.teachers.open_clip_vit import open_clip_vit
from w2s.teachers.timm_vit import timm_vit

logger = logging.getLogger(__name__)

LIBRARIES: dict[str, Callable[..., PatchNetwork]] = {"timm": timm_vit, "open_clip": open_clip_vit}
FORMS = {
    "efficientnet_lite0": "efficientnet_lite0",
    "timm": "timm:MODEL[@FILE]",
    "open_clip": "open_clip:MODEL[@FILE]",
}


def build_teacher(config: TeacherConfig, *, grid: int, device: torch.device | str) -> Teacher:
    """The frozen teacher of `config` for a student of `grid` x `grid` patches, on `device`.

    Random weights are the same on every rank and leave the global generator as it was.

    Raises:
        ConfigError: the source or the model is unknown, or the image size does not fit.
        CheckpointError: the weights are missing, damaged, or another model's.
        MissingPackageError: the package that carries the weights is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _network(config, grid)
    return Teacher(network, grid=grid, precision=config.precision).to(device)


def _network(config: TeacherConfig, grid: int) -> PatchNetwork:
    if config.source == "efficientnet_lite0":
        return EfficientNetLite0(image_size=config.image_size, grid=grid)
    library, _, rest = config.source.partition(":")
    name, _, path = rest.partition("@")
    if library not in LIBRARIES or not name:
        near = difflib.get_close_matches(library, FORMS, n=1) or FORMS
        raise ConfigError(
            f"teacher.source={config.source} is no teacher: use {' or '.join(FORMS[key] for key in near)}"
        )
    file = Path(path).expanduser() if path else None
    if file is not None and not file.is_file():
        raise CheckpointError(
            f"teacher weights {path} do not exist (from {Path.cwd()}): download them and give their path with "
            f"teacher.source={library}:{name}@FILE"
        )
    network = LIBRARIES[library](name, file, image_size=config.image_size, grid=grid)
    if file is None:
        logger.warning("the teacher's weights are random: give a file with teacher.source=%s@FILE", config.source)
    return network
