"""What the sections `teacher` and `teachers` may say."""

from collections.abc import Sequence

from w2s.config.rules import is_name
from w2s.config.sections import Config
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
    for name in names:
        if not is_name(name):
            raise ConfigError(f"teachers: name={name} must be letters, digits, _ and -: use another")
        if names.count(name) > 1:
            raise ConfigError(f"teachers: two are called {name}: give each a name of its own")
    _check_draw(config)
    for each in config.teacher_losses:
        if each.teacher.target_norm == "phi_s" and each.loss == "cosine":
            raise ConfigError(
                f"{'teachers: ' if names else ''}{each.teacher.name} has target_norm=phi_s, a rotation and a scale, "
                "which cancel under the cosine loss: use mse, smooth_l1, or another target_norm"
            )


def _check_draw(config: Config) -> None:
    one, entries = config.teachers.draw == "one", config.teachers.of
    for entry in entries:
        if entry.share != 1 and not one:
            raise ConfigError(
                f"teachers.{entry.name}.share={entry.share:g} does nothing with teachers.draw=all: leave it out, or "
                "use teachers.draw=one"
            )
    cause = "draw=one" if one else next((f"{entry.name}.sources" for entry in entries if entry.sources), "")
    if cause and config.teacher.sharded:
        raise ConfigError(
            f"teacher.sharded=true with teachers.{cause}: ranks that hold a teacher together must run it on as many "
            "images each, and some samples have other teachers: use teacher.sharded=false"
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
