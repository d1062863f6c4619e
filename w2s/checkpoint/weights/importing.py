"""`w2s import`: other people's weights as a checkpoint of ours, tensor by tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from w2s.checkpoint.own.checkpoint_folders import Meta, seal
from w2s.checkpoint.own.verifying import verify
from w2s.checkpoint.weights.eva_format import HEAD, NORM_PRE, TOWERS, released_name
from w2s.checkpoint.weights.matching import PROJECTIONS, STAGE_ONLY, Fit, fit, refuse_gaps
from w2s.checkpoint.weights.released import Released, open_released
from w2s.config.sections import HardwareConfig, ModelConfig, ParallelConfig
from w2s.config.teacher_losses import Target
from w2s.errors import ConfigError
from w2s.files import new_folder
from w2s.megatron.checkpoint.tensor_store import write_tensors
from w2s.megatron.parallel import process_groups
from w2s.towers.shapes import model_shapes

OWN_HEADS = ("vision.layer_heads.*", "vision.teachers.*")
"""What is of use to the masked run alone that it is from, and is not imported."""


def import_checkpoint(source: Path, model: ModelConfig, out: Path, *, allowed: Sequence[str] = ()) -> Fit:
    """Write the weights of `source` as a checkpoint that every stage can start from; return what became of them.

    A file that holds one tower gives a checkpoint of that tower. No more than one tensor is in memory at a time.

    Args:
        source: a weights file, an index, a folder of one, or a checkpoint of ours.
        model: what the file holds; another image or patch size resizes the weights.
        out: the new folder.
        allowed: patterns of names that may be missing or unexpected.

    Raises:
        CheckpointError: the source is damaged, or holds another model.
        UserError: `out` exists already.
    """
    verify(source)
    released = open_released(source)
    with process_groups.init_distributed(ParallelConfig(), HardwareConfig(device="cpu")):
        target = Target(_channels(released, "lm_head"), _channels(released, "summary_proj"))
        shapes = model_shapes(model, target if target.width else None, logit_bias="logit_bias" in released.meta)
    classifier = _classifier(released, shapes)
    wanted = {name: shape for name, shape in _wanted(released, shapes).items() if released_name(name) not in classifier}
    fitted = fit(released, wanted, {"vision": model.vision.heads, "text": model.text.heads})
    left = [*classifier, *(_of_text(released) if released.has_foreign_text else [])]
    refuse_gaps(fitted, [*allowed, *OWN_HEADS, *map(released.origin, left)], model.name)
    meta = {
        name: torch.empty(shapes[name], dtype=released.meta[released_name(name)].dtype, device="meta")
        for name in fitted.taken
    }
    with new_folder(out) as folder:
        write_tensors(folder, meta, lambda name: fitted.read(name).reshape(shapes[name]))
        seal(folder, _meta(source, model), {})
    return fitted


def with_size(model: ModelConfig, image_size: int | None, patch_size: int | None) -> ModelConfig:
    """Return a model for another image or patch size in pixels; None keeps it.

    Raises:
        ConfigError: the patches do not divide the image.
    """
    vision = model.vision
    new = replace(vision, image_size=image_size or vision.image_size, patch_size=patch_size or vision.patch_size)
    if new.grid < 1:
        raise ConfigError(f"--image-size {image_size} is smaller than a patch of {new.patch_size} pixels: use more")
    return replace(model, vision=new)


def _wanted(released: Released, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of the towers that the source has; projections are needed only where there are both towers."""
    foreign = _foreign(released, shapes)
    held = [tower for tower, (prefix, _) in TOWERS.items() if released.has(prefix)]
    towers = tuple(f"{tower}." for tower in held if tower not in foreign)
    whole = len(held) == len(TOWERS) and "text" not in foreign
    return {
        name: shape
        for name, shape in shapes.items()
        if name.startswith(towers)
        and (whole or not name.startswith(PROJECTIONS) or released.holds(name))
        and (not name.startswith(STAGE_ONLY) or released.holds(name))
    }


def _foreign(released: Released, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Towers of the source that nothing is taken of: of another kind than the model's, or than all of w2s's.

    Nothing of a vision tower with a norm before the layers goes into one without.
    """
    vision = NORM_PRE in released.meta and "vision.norm_pre.weight" not in shapes
    return {tower for tower, is_foreign in (("vision", vision), ("text", released.has_foreign_text)) if is_foreign}


def _of_text(released: Released) -> list[str]:
    """Released names of the text tower's tensors, and of the loss's scalars, which belong to it."""
    return [name for name in released.meta if name.startswith(("text.", "logit_scale", "logit_bias"))]


def _classifier(released: Released, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Released names of a vision tower's head that gives classes: a peer has put it in the place of the projection."""
    head, projection = released.meta.get(HEAD), shapes.get("vision.head.weight")
    if head is None or released.has("text") or (projection is not None and head.shape[0] == projection[0]):
        return []
    return [name for name in released.meta if name.startswith("visual.head.")]


def _channels(released: Released, linear: str) -> int:
    """Channels that a linear of the masked stage gives, 0 where there is none."""
    weight = released.meta.get(f"visual.{linear}.weight")
    return 0 if weight is None else weight.shape[0]


def _meta(source: Path, model: ModelConfig) -> Meta:
    return Meta(
        stage="import",
        step=0,
        samples=0,
        config={"model": asdict(model)},
        data={},
        parent=str(source),
        mlflow_run_id=None,
        versions={"w2s": version("w2s"), "torch": version("torch")},
    )
