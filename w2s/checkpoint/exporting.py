"""`w2s export`: a checkpoint of ours as a folder that other programs load with their own calls."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from w2s.checkpoint.fit import MASKED_STAGE
from w2s.checkpoint.folder import new_folder
from w2s.checkpoint.formats import (
    eva_config,
    named_tower,
    open_clip_config,
    open_clip_name,
    timm_config,
    timm_name,
)
from w2s.checkpoint.released import Released, open_released
from w2s.checkpoint.store import read_meta
from w2s.checkpoint.verifying import verify
from w2s.checkpoint.writing import write_pt, write_safetensors
from w2s.config.load import model_from
from w2s.config.sections import ModelConfig
from w2s.errors import CheckpointError, ConfigError

Format = Literal["eva", "open_clip", "timm", "safetensors"]
HEAD_BIAS = "visual.head.bias"


def export_checkpoint(checkpoint: Path, format: str, out: Path) -> dict[str, int]:
    """Write a checkpoint in another program's format; return the files with their sizes in bytes.

    Types of numbers stay what they are. No more than one tensor is in memory at a time.

    Args:
        checkpoint: a folder with meta.json.
        format: `eva` (a .pt with the released names, and the released code's model configuration), `open_clip`,
            `timm` (the vision tower), or `safetensors` (the released names).
        out: the new folder.

    Raises:
        ConfigError: there is no such format.
        CheckpointError: the checkpoint is damaged, or the format cannot hold it.
        UserError: `out` exists already.
    """
    if format not in get_args(Format):
        raise ConfigError(f"--format {format} does not exist: use {', '.join(get_args(Format))}")
    if not (checkpoint / "meta.json").is_file():
        raise CheckpointError(f"{checkpoint} is no checkpoint of w2s: make one of it with `w2s import`")
    verify(checkpoint)
    model, released = model_from(read_meta(checkpoint).config), open_released(checkpoint)
    write: Callable[[Released, ModelConfig, Path, Path], None] = {
        "eva": _write_eva, "open_clip": _write_open_clip, "timm": _write_timm, "safetensors": _write_released
    }[format]  # fmt: skip
    with new_folder(out) as folder:
        write(released, model, folder, out.resolve())
    return {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}


def _write_eva(released: Released, model: ModelConfig, folder: Path, final: Path) -> None:
    if "logit_bias" in released.meta:
        raise CheckpointError(
            f"{released.path} was trained with the sigmoid loss, whose bias EVA-CLIP's code does not have: "
            "use --format open_clip"
        )
    names = {name: tensor for name, tensor in released.meta.items() if not name.startswith("visual.layer_heads.")}
    write_pt(folder / f"{model.name}.pt", names, released.read)
    _write_json(folder / f"{model.name}.json", eva_config(model))


def _write_released(released: Released, model: ModelConfig, folder: Path, final: Path) -> None:
    write_safetensors(folder / "model.safetensors", released.meta, released.read, {"model": model.name})


def _write_timm(released: Released, model: ModelConfig, folder: Path, final: Path) -> None:
    names = [name for name in released.meta if name.startswith("visual.") and not name.startswith(MASKED_STAGE)]
    if not names:
        raise CheckpointError(f"{released.path} holds no vision tower, which is all that timm has: use another format")
    features = model.embed_dim if "visual.head.weight" in released.meta else 0
    _write_json(folder / "config.json", timm_config(model.vision, features))
    _write_renamed(folder / "model.safetensors", released, model, names, timm_name)


def _write_open_clip(released: Released, model: ModelConfig, folder: Path, final: Path) -> None:
    if not (released.has("text") and "visual.head.weight" in released.meta):
        raise CheckpointError(
            f"{released.path} is not a whole CLIP, which is all that open_clip has: "
            "export a clip run, or use --format timm"
        )
    names = [name for name in released.meta if not name.startswith(MASKED_STAGE)]
    has_bias = "logit_bias" in released.meta
    _write_json(folder / "open_clip_config.json", open_clip_config(model, final / "timm", has_bias))
    if named_tower(model.vision) is None:
        (folder / "timm").mkdir()
        _write_json(folder / "timm" / "config.json", timm_config(model.vision, model.embed_dim))
    _write_renamed(folder / "open_clip_model.safetensors", released, model, names, open_clip_name)


def _write_renamed(
    path: Path, released: Released, model: ModelConfig, names: list[str], rename: Callable[[str], str]
) -> None:
    """Write tensors under other names, with the bias that timm's heads always have."""
    meta = {rename(name): released.meta[name] for name in names}
    origins = {rename(name): name for name in names}
    if "visual.head.weight" in names and HEAD_BIAS not in names:
        head = released.meta["visual.head.weight"]
        meta[rename(HEAD_BIAS)] = torch.empty(head.shape[0], dtype=head.dtype, device="meta")

    def read(name: str) -> Tensor:
        return released.read(origins[name]) if name in origins else torch.zeros_like(meta[name], device="cpu")

    write_safetensors(path, meta, read, {"model": model.name})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
