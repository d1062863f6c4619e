"""`w2s export`: a checkpoint of ours as a folder that other programs load with their own calls."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from w2s.checkpoint.export.card import write_card
from w2s.checkpoint.export.cast import cast
from w2s.checkpoint.export.formats import eva, graphs, open_clip, safetensors, timm, transformers
from w2s.checkpoint.export.formats.base import Export, Guide, Snippet, Write
from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.own.verifying import verify
from w2s.checkpoint.starts.of_teacher import choose, in_teachers_space, of_teacher
from w2s.checkpoint.weights.eva_format import HEAD
from w2s.checkpoint.weights.released import Released, open_released
from w2s.config.load import model_from
from w2s.config.sections import ModelConfig, Weights
from w2s.errors import CheckpointError, ConfigError
from w2s.files import new_folder

FORMATS: Mapping[str, Write] = {
    "eva": eva.write,
    "open_clip": open_clip.write,
    "timm": timm.write,
    "safetensors": safetensors.write,
    "transformers": transformers.write,
    "onnx": graphs.write_onnx,
    "torch_export": graphs.write_torch_export,
}
"""What writes each format."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
BACK = Snippet(
    "w2s, also after a peer has trained it on",
    "w2s import FOLDER --model FOLDER/model.yaml --out runs/NAME",
    "bash",
)


@dataclass(frozen=True)
class Exported:
    """A folder that was written."""

    files: Mapping[str, int]
    """Bytes by name."""
    guide: Guide
    """How to load it."""


def export_checkpoint(
    checkpoint: Path,
    format: str,
    out: Path,
    *,
    weights: Weights = "last",
    head: str = "",
    precision: str = "",
    hub: str = "",
    licence: str = "unknown",
) -> Exported:
    """Write a checkpoint in another program's format, with its shape as model.yaml and a card as README.md.

    No more than one tensor is in memory at a time; `onnx` and `torch_export` take the towers as a whole.

    Args:
        checkpoint: a folder with meta.json.
        format: one of `FORMATS`.
        out: the new folder.
        weights: the last ones, or their moving average.
        head: the teacher of a masked run whose head is written: the projection then leads into that teacher's space.
        precision: `fp32`, `fp16` or `bf16`; empty leaves the types of numbers what they are.
        hub: OWNER/NAME that it will have on a hub.
        licence: the licence of the weights, as the hub calls it.

    Raises:
        ConfigError: there is no such format, precision or teacher, `hub` is not OWNER/NAME, or `licence` not an
            identifier.
        CheckpointError: the checkpoint is damaged or has no moving average, or the format cannot hold it.
        MissingPackageError: the format needs a package that is not installed.
        UserError: `out` exists already.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format} does not exist: use {', '.join(FORMATS)}")
    if hub and not HUB_NAME.fullmatch(hub):
        raise ConfigError(f"--hub {hub} is not a name of a hub: use OWNER/NAME, of letters, digits, ., _ and -")
    if not LICENCE.fullmatch(licence):
        raise ConfigError(
            f"--license {licence} is not a licence as a hub calls it: use apache-2.0, cc-by-4.0, other, ..."
        )
    if not (checkpoint / "meta.json").is_file():
        raise CheckpointError(f"{checkpoint} is not a checkpoint of w2s: make one of it with `w2s import`")
    verify(checkpoint)
    model, released = _with_head(checkpoint, head, weights)
    if precision:
        released = cast(released, precision)
    export, title = Export(released, model, hub), hub or f"{model.name}, {format}"
    with new_folder(out) as folder:
        guide = FORMATS[format](export, folder)
        if guide.comes_back:
            guide = replace(guide, snippets=[*guide.snippets, BACK])
        (folder / "model.yaml").write_text(yaml.safe_dump({"model": asdict(model)}, sort_keys=False), encoding="utf-8")
        write_card(folder, export, guide, checkpoint, weights, title=title, licence=licence)
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return Exported(files, guide)


def _with_head(checkpoint: Path, head: str, weights: Weights) -> tuple[ModelConfig, Released]:
    """A checkpoint's model and tensors; those of a masked run with the heads for one teacher alone.

    Raises:
        ConfigError: the run had no such teacher, has learned no summary of it, or has no projection for it.
    """
    meta, released = read_meta(checkpoint), open_released(checkpoint, weights)
    model = model_from(meta.config)
    if meta.trained == "mim":
        released = of_teacher(released, meta, choose(meta, head, "--head"), alone=True)
    elif head:
        choose(meta, head, "--head")
    if not head:
        return model, released
    if not released.embeds_images:
        raise ConfigError(f"--head {head}: the run learnt no summary of this teacher (summary_weight), leave it out")
    released = in_teachers_space(released)
    if HEAD not in released.meta:  # SigLIP's pool, whose output is as wide as the tower
        return model, released
    return replace(model, embed_dim=released.meta[HEAD].shape[0]), released
