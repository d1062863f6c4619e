"""Text towers of teachers: captions in, embeddings beside those of the teacher's images out.

The network is open_clip's text transformer, a plain module that every rank holds whole. It reads the tokens of CLIP's
byte-pair encoding, which are the student's.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from w2s.checkpoint.export.formats.open_clip import text_config
from w2s.checkpoint.export.formats.plain_text import SMALLEST_VISION_TOWER
from w2s.checkpoint.find import find, find_any
from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.own.verifying import verify
from w2s.checkpoint.starts.of_teacher import choose, teachers_of
from w2s.checkpoint.weights.released import Released, open_released, rename
from w2s.checkpoint.weights.tensor_files import open_weights
from w2s.config.load import model_from, named_model
from w2s.config.sections import ClipConfig, Config, ModelConfig, TeacherConfig, TextConfig, Weights
from w2s.errors import ConfigError
from w2s.teachers.base import Precision
from w2s.teachers.networks.open_clip_names import described
from w2s.teachers.networks.teacher_weights import (
    check_tensors,
    check_weights,
    name_and_weights,
    other_model,
    weights_file,
)

logger = logging.getLogger(__name__)


class TextTeacher(nn.Module):
    """A frozen text tower with the scale that its CLIP multiplies cosines by.

    It stays in evaluation mode and has no gradients.

    Attributes:
        width: channels of an embedding, d.
        logit_scale: inverse temperature, a scalar.
    """

    logit_scale: Tensor

    def __init__(
        self, tower: TextTransformer, logit_scale: Tensor, *, context_length: int, precision: Precision = "fp32"
    ) -> None:
        """Freeze a tower.

        Args:
            tower: the tower.
            logit_scale: the inverse temperature itself, not its logarithm.
            context_length: tokens of the captions that it will read.
            precision: what it computes in.
        """
        super().__init__()
        self.tower, self.precision, self.width = tower, precision, tower.output_dim
        self.context_length = tower.context_length
        if tower.attn_mask is not None and context_length < self.context_length:
            # A causal tower sees nothing after the end token: shorter captions need no padding.
            self.context_length = context_length
            tower.attn_mask = tower.attn_mask[:context_length, :context_length].clone()
        self.register_buffer("logit_scale", logit_scale)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "TextTeacher":
        """Stay in evaluation mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings of captions: int64 [n, any context] to float32 [n, d], not normalised."""
        tokens = fit_context(tokens, self.context_length)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            embeddings: Tensor = self.tower(tokens)
        return embeddings.float()


def fit_context(tokens: Tensor, length: int) -> Tensor:
    """Cut or fill up captions as the tokenizer would for another context length.

    Args:
        tokens: int64 [n, context]; the end token has the highest number, and zeros follow it.
        length: the other context length.

    Returns:
        int64 [n, length].
    """
    if tokens.shape[1] <= length:
        return F.pad(tokens, (0, length - tokens.shape[1]))
    cut, ends = tokens[:, :length].clone(), tokens.amax(1)
    cut[:, -1] = torch.where(cut.amax(1) < ends, ends, cut[:, -1])
    return cut


def build_text_teacher(
    config: TeacherConfig, *, context_length: int, device: torch.device | str, root: str | Path = "runs"
) -> TextTeacher:
    """The text tower of the teacher of `config`, on `device`.

    It will read captions of the student's `context_length`. Random weights are the same on every rank and leave the
    global generator as it was.

    Raises:
        ConfigError: the teacher has no text tower, or one that reads other tokens.
        CheckpointError: the weights are missing, damaged, or another model's.
    """
    described = _described(config, Path(root).expanduser())
    if described.released is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tower, scale = described.build(), torch.tensor(ClipConfig().drawn_logit_scale)
    else:
        verify(described.released.path)
        tower, scale = _loaded(described, described.released)
    teacher = TextTeacher(tower, scale, context_length=context_length, precision=config.precision)
    return teacher.to(device)


def text_shape(config: TeacherConfig, root: str | Path = "runs") -> tuple[TextConfig, int]:
    """The shape of the text tower of a teacher, and the width of its embeddings; no weights are read.

    Raises:
        ConfigError, CheckpointError: as `build_text_teacher`.
    """
    described = _described(config, Path(root).expanduser())
    return _shape(described), described.embed_dim


def _shape(described: "_Described") -> TextConfig:
    with torch.device("meta"):
        tower = described.build()
    return TextConfig(
        context_length=tower.context_length,
        vocab_size=tower.vocab_size,
        layers=tower.transformer.layers,
        width=tower.width,
        heads=tower.heads,
        mlp_width=tower.transformer.resblocks[0].mlp.c_fc.out_features,
    )


def text_weights(config: Config) -> tuple[Path, Weights]:
    """What holds the text tower that `init.text=teacher` means: a checkpoint, or a file of other people's weights.

    Beside its path, which of its weights the teacher has.

    The teacher is that of the masked run which `init.vision` names (of several, the one that `init.teacher` names), or
    without one that of `teacher.source`.

    Raises:
        ConfigError: the teacher has no text tower, or one with another number of heads than `model.text`.
        CheckpointError: the weights are missing.
    """
    teacher, root = _teacher_of(config)
    try:
        described = _described(teacher, root)
    except ConfigError as error:
        raise ConfigError(f"init.text=teacher: {error}; init.text=none starts the tower afresh") from error
    if described.released is None:
        raise ConfigError(
            f"init.text=teacher: the weights of teacher.source={teacher.source} are random, give its file"
        )
    shape = _shape(described)
    if config.init.grow_width == "none" and shape.heads != config.model.text.heads:
        raise ConfigError(
            f"init.text=teacher: the text tower of teacher.source={teacher.source} has {shape.heads} heads, "
            f"use model.text.heads={shape.heads}"
        )
    if described.quick_gelu and config.model.text.activation != "quick_gelu":
        logger.warning(
            "the text tower of teacher.source=%s was trained with QuickGELU and computes GELU here: its embeddings "
            "differ a little until it has trained on; model.text.activation=quick_gelu keeps them", teacher.source
        )  # fmt: skip
    return described.released.path, teacher.weights


def _teacher_of(config: Config) -> tuple[TeacherConfig, Path]:
    """The teacher of the masked run that `init.vision` names, or the configured one, and the folder of its runs."""
    root = Path(config.run.root).expanduser()
    start = find(config.init.vision, root, key="init.vision", stage="mim")
    if start is not None and (start / "meta.json").is_file():
        meta = read_meta(start)
        if meta.trained == "mim":
            teacher = teachers_of(meta)[choose(meta, config.init.teacher, "init.teacher")]
            return teacher, Path(meta.setting("run", "root")).expanduser()
    return config.teacher, root


@dataclass(frozen=True)
class _Described:
    """A text tower in open_clip's words, and its weights."""

    embed_dim: int
    text: dict[str, Any]
    quick_gelu: bool
    released: Released | None
    """None for random weights."""

    def build(self) -> TextTransformer:
        """The tower with random weights, on torch's current device."""
        return open_clip.CustomTextCLIP(self.embed_dim, SMALLEST_VISION_TOWER, self.text, self.quick_gelu).text


def _described(config: TeacherConfig, root: Path) -> _Described:
    check_weights(config)
    kind, _, rest = config.source.partition(":")
    if kind == "w2s":
        checkpoint = find_any(rest, root, key="teacher.source")
        model = model_from(read_meta(checkpoint).config)
        return _of_model(model, open_released(checkpoint, config.weights), config.source)
    name, path = name_and_weights(rest)
    file = weights_file(path, kind, name)
    released = None if file is None else rename(open_weights(file), file)
    if kind == "eva":
        return _of_model(named_model(name), released, config.source)
    if kind == "open_clip":
        return _of_open_clip(name, released, config.source)
    if kind == "timm" and released is not None:
        return _of_shapes(released, config.source, quick_gelu="quickgelu" in name)
    raise _no_text_tower(config.source)


def _of_model(model: ModelConfig, released: Released | None, source: str) -> _Described:
    _check(released, source)
    quick = model.text.activation == "quick_gelu"
    return _Described(model.embed_dim, text_config(model.text), quick_gelu=quick, released=released)


def _of_open_clip(name: str, released: Released | None, source: str) -> _Described:
    config = described(name).config
    text = config["text_cfg"]
    if text.get("hf_tokenizer_name") or text.get("embed_cls"):
        raise ConfigError(
            f"teacher.source={source}: its text tower does not read CLIP's tokens, as the student's does: use another "
            "teacher, or its images alone"
        )
    _check(released, source)
    return _Described(config["embed_dim"], text, bool(config.get("quick_gelu")), released)


def _of_shapes(released: Released, source: str, quick_gelu: bool) -> _Described:
    """The tower of a CLIP's file whose vision tower timm knows; its heads are 64 wide, as in all CLIPs."""
    _check(released, source)
    shapes = {name.removeprefix("text."): tensor.shape for name, tensor in released.meta.items()}
    (context, width), (vocabulary, _) = shapes["positional_embedding"], shapes["token_embedding.weight"]
    text = {
        "context_length": context,
        "vocab_size": vocabulary,
        "width": width,
        "heads": max(1, width // 64),
        "layers": sum(name.endswith("attn.in_proj_weight") for name in shapes),
        "mlp_ratio": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0] / width,
    }
    return _Described(shapes["text_projection"][1], text, quick_gelu, released)


def _check(released: Released | None, source: str) -> None:
    """Refuse weights without a text tower of CLIP's kind."""
    if released is not None and "text.positional_embedding" not in released.meta:
        raise _no_text_tower(source)


def _no_text_tower(source: str) -> ConfigError:
    return ConfigError(
        f"teacher.source={source} has no text tower: use a CLIP (w2s:RUN of the contrastive stage, eva:MODEL, "
        "open_clip:MODEL, or timm:MODEL with a whole CLIP's file), or its images alone"
    )


def _loaded(described: _Described, released: Released) -> tuple[TextTransformer, Tensor]:
    """The tower with the weights of a checkpoint, and its logit scale."""
    tower = described.build()
    expected = {f"text.{name}": value for name, value in tower.state_dict().items()}
    check_tensors(released, expected)
    if "logit_scale" not in released.meta:
        raise other_model(released, "logit_scale is missing")
    tower.load_state_dict({name.removeprefix("text."): released.read(name).float() for name in expected})
    return tower, released.read("logit_scale").float().exp().reshape(())
