"""What the sections `teacher` and `teachers` may say."""

import math
import re
from collections.abc import Sequence

from w2s.config.sections import Config
from w2s.config.teacher_losses import TeacherLoss
from w2s.errors import ConfigError


def check_teachers(config: Config) -> None:
    """Refuse teachers that a stage cannot have, or cannot learn from.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    names = [entry.name for entry in config.teachers.of]
    if config.teachers.draw == "one" and len(names) < 2:
        raise ConfigError("teachers.draw=one draws one of several teachers: give teachers=[...] or leave it out")
    if config.stage != "mim":
        if names:
            raise ConfigError(f"teachers={names}: several teach the masked stage alone, the others have teacher=NAME")
        if config.init.teacher and config.init.vision == "none":
            raise ConfigError(
                f"init.teacher={config.init.teacher} does nothing with init.vision=none: name a masked run"
            )
        return
    if config.init.teacher:
        raise ConfigError(f"init.teacher={config.init.teacher} is for the contrastive stage: leave it out")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name, re.ASCII):
            raise ConfigError(f"teachers: name={name} must be letters, digits, _ and -: use another")
        if names.count(name) > 1:
            raise ConfigError(f"teachers: two are called {name}: give each a name of its own")
    _check_draw(config)
    for teacher_loss in config.teacher_losses:
        _check_loss(teacher_loss, "teachers: " if names else "")


def _check_draw(config: Config) -> None:
    one, teacher_losses = config.teachers.draw == "one", config.teacher_losses
    for teacher_loss in teacher_losses:
        name, share = teacher_loss.teacher.name, teacher_loss.share
        if not 0 < share < math.inf:
            raise ConfigError(f"teachers: {name} has share={share:g}, which must be above 0: leave the teacher out")
        if share != 1 and not one:
            raise ConfigError(f"teachers: {name} has share={share:g}, which does nothing with teachers.draw=all")
    cause = "draw=one" if one else next((f"{each.teacher.name}.sources" for each in teacher_losses if each.sources), "")
    if cause and config.teacher.sharded:
        raise ConfigError(
            f"teacher.sharded=true with teachers.{cause}: ranks that hold a teacher together must run it on as many "
            "images each, and some samples have other teachers: use teacher.sharded=false"
        )


def _check_loss(teacher_loss: TeacherLoss, where: str) -> None:
    name = f"{where}{teacher_loss.teacher.name} has "
    if teacher_loss.weight <= 0:
        raise ConfigError(f"{name}weight={teacher_loss.weight:g}, which must be above 0: leave the teacher out")
    if teacher_loss.summary_weight < 0:
        raise ConfigError(f"{name}summary_weight={teacher_loss.summary_weight:g}, which must be at least 0")
    if teacher_loss.teacher.image_size < 0:
        raise ConfigError(f"{name}image_size={teacher_loss.teacher.image_size}, which must be at least 0")
    if teacher_loss.teacher.target_norm == "phi_s" and teacher_loss.loss == "cosine":
        raise ConfigError(
            f"{name}target_norm=phi_s, a rotation and a scale, which cancel under the cosine loss: use mse, smooth_l1, "
            "or another target_norm"
        )


def check_teacher_widths(config: Config, widths: Sequence[int]) -> None:
    """Refuse a teacher of the contrastive stage whose embeddings are to be matched and have other widths.

    Raises:
        ConfigError: they have.
    """
    kind, embed_dim = config.clip.distill.kind, config.model.embed_dim
    if kind != "affinity" and any(width != embed_dim for width in widths):
        raise ConfigError(
            f"clip.distill.kind={kind}: the teacher's embeddings have {widths[0]} channels and "
            f"model.embed_dim={embed_dim}: use clip.distill.kind=affinity, or a student with "
            f"model.embed_dim={widths[0]}"
        )
