"""The sections of what is trained and of its teacher."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from w2s.config.rules import (
    FolderName,
    FractionBelowOne,
    NameOrImport,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    require,
)

Weights = Literal["last", "ema"]
"""Which of a checkpoint's weights: those after its last step, or their moving average."""
MaskedLoss = Annotated[str, NameOrImport("cosine", "smooth_l1", "mse")]
"""A loss of `w2s.objectives.masked_loss.LOSSES`, or one of your own."""
ACTIVATIONS = {"eva": ("gelu",), "clip": ("gelu", "quick_gelu"), "siglip": ("gelu", "gelu_tanh")}
"""Of the MLPs, by kind of vision tower."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Section, prefix="model.vision."):
    """Shape of the vision tower: an EVA vision transformer, a CLIP's own, or a SigLIP's."""

    kind: Literal["eva", "clip", "siglip"] = "eva"
    """`eva`; `clip`, the vision transformer of OpenAI and open_clip: a norm of the embedded patches before the layers,
    a bias on Q, K and V, none on the patch embedding and the projection head; or `siglip`: no class token, a bias on
    every linear, and attention pooling in the place of the projection, so that model.embed_dim is the width. The last
    two have norm=layernorm, norm_placement=pre and qkv_bias=true."""
    image_size: PositiveInt = 64
    """Side of the square input in pixels."""
    patch_size: PositiveInt = 16
    """Side of a square patch in pixels."""
    layers: PositiveInt = 6
    """Transformer layers."""
    width: PositiveInt = 192
    """Width of the residual stream."""
    heads: PositiveInt = 6
    """Attention heads."""
    mlp_width: PositiveInt = 960
    """Hidden width of the MLP (EVA-18B: 5 x width)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of norm, with eps 1e-6 (kind=clip: 1e-5)."""
    norm_placement: Literal["post", "pre"] = "post"
    """`post` norms the branch output before it is added (EVA-18B, EVA02-E), `pre` norms the branch input (EVA-8B)."""
    qkv_bias: bool = False
    """Bias on Q and V (on K too with kind=clip and siglip) and on the projection head (with kind=eva alone)."""
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    """Of the MLPs: the exact GELU; x sigmoid(1.702 x), which OpenAI's weights want (kind=clip); or the GELU by tanh,
    with which SigLIPs were trained (kind=siglip)."""
    drop_path: FractionBelowOne = 0.0
    """Probability that training leaves out a branch of the last layer, rising linearly from 0 in the first (EVA-01)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.image_size % self.patch_size == 0,
            f"model.vision.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: "
            f"use {self.image_size // self.patch_size * self.patch_size or self.patch_size}",
        )
        require(
            self.width % self.heads == 0,
            f"model.vision.width={self.width} is not divisible by heads={self.heads}: change one of them",
        )
        require(
            self.kind == "eva" or (self.norm, self.norm_placement, self.qkv_bias) == ("layernorm", "pre", True),
            f"model.vision.kind={self.kind} has norm=layernorm, norm_placement=pre and qkv_bias=true: set all three",
        )
        known = ACTIVATIONS[self.kind]
        require(
            self.activation in known,
            f"model.vision.activation={self.activation} is not of model.vision.kind={self.kind}: use "
            f"{' or '.join(known)}, or another kind",
        )

    @property
    def biases(self) -> Literal["none", "qv", "qkv"]:
        """Which of Q, K and V have a bias."""
        if not self.qkv_bias:
            return "none"
        return "qv" if self.kind == "eva" else "qkv"

    @property
    def patch_bias(self) -> bool:
        """Whether the patch embedding has a bias."""
        return self.kind != "clip"

    @property
    def norm_pre(self) -> bool:
        """Whether there is a norm before the layers."""
        return self.kind == "clip"

    @property
    def head_bias(self) -> bool:
        """Whether the projection head has a bias."""
        return self.qkv_bias and self.kind == "eva"

    @property
    def norm_eps(self) -> float:
        """What norms add to the variance."""
        return 1e-5 if self.kind == "clip" else 1e-6

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches in an image."""
        return self.grid**2

    @property
    def class_tokens(self) -> int:
        """Tokens before those of the patches: the class token, or none."""
        return 0 if self.kind == "siglip" else 1

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.class_tokens + self.patches


@dataclass(frozen=True, kw_only=True)
class TextConfig(Section, prefix="model.text."):
    """Shape of the text tower (CLIP's causal pre-norm transformer)."""

    context_length: PositiveInt = 16
    """Tokens of a caption, start and end tokens included."""
    vocab_size: PositiveInt = 49408
    """Vocabulary of the tokenizer (CLIP's BPE)."""
    layers: PositiveInt = 4
    """Transformer layers."""
    width: PositiveInt = 128
    """Width of the residual stream."""
    heads: PositiveInt = 4
    """Attention heads."""
    mlp_width: PositiveInt = 512
    """Hidden width of the MLP (CLIP: 4 x width)."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Of the MLPs: the exact GELU, or x sigmoid(1.702 x), which OpenAI's weights want."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.width % self.heads == 0,
            f"model.text.width={self.width} is not divisible by heads={self.heads}: change one of them",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, prefix="model."):
    """The CLIP that is grown: a vision tower, a text tower and the width that they share."""

    name: Annotated[str, FolderName("runs and exports are called by it")] = "custom"
    """Name of the shape, as in configs/model/NAME.yaml."""
    embed_dim: int = 128
    """Width of the shared image-text space."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision tower."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.vision.kind != "siglip" or self.embed_dim == self.vision.width,
            f"model.embed_dim={self.embed_dim} is not model.vision.width={self.vision.width}: model.vision.kind=siglip "
            "pools without a projection, set both to one number",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Section, prefix="teacher."):
    """The frozen teacher of the masked stage."""

    name: str = "custom"
    """Name of the teacher, as in configs/teacher/NAME.yaml."""
    source: str = "efficientnet_lite0"
    """`efficientnet_lite0` or `efficientnet_lite2` (weights from packages), `timm:MODEL[@FILE]`,
    `open_clip:MODEL[@FILE]`, `timm:local-dir:FOLDER`, `open_clip:local-dir:FOLDER`, `hf:FOLDER` (transformers),
    `eva:MODEL[@FILE]` (a model of configs/model, in the released names), `python:MODULE:CLASS` (a
    `w2s.teachers.base.PatchNetwork` of your own) or `w2s:RUN`.

    FILE may be the folder that it is in. Without a file the weights are random.
    """
    weights: Weights = "last"
    """Of `w2s:RUN`, the last weights or the moving average (`optim.ema`)."""
    image_size: NonNegativeInt = 0
    """Side of the teacher's input in pixels; 0 is its own, and for a convolutional net a feature per student patch."""
    target_norm: Literal["none", "standardize", "layernorm", "phi_s"] = "none"
    """`none` (the paper's, for CLIP teachers), per-channel standardisation with running statistics (CNN teachers),
    layer norm of each feature vector, without weights (data2vec), or a rotation and one scale after which all channels
    vary alike (PHI-S of RADIO), found in the first batch; not for the cosine loss."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the teacher's forward pass."""
    compile: bool = False
    """Put the teacher through torch.compile."""
    sharded: bool = False
    """Split a `w2s:RUN` that is too big for one GPU over the tensor-parallel ranks; else every rank holds it whole."""
    batch_size: PositiveInt = 64
    """Images of one teacher forward in evaluation."""


@dataclass(frozen=True, kw_only=True)
class TeacherEntry(Section, prefix="teachers.{name}."):
    """One of several teachers of the masked stage, and how the student learns from it.

    `compile`, `sharded` and `batch_size` are those of the section `teacher`.
    """

    name: str = "custom"
    """Its name in metrics, checkpoints and other keys: letters, digits, _ and -."""
    source: str = "efficientnet_lite0"
    """As `teacher.source`."""
    weights: Weights = "last"
    """As `teacher.weights`."""
    image_size: NonNegativeInt = 0
    """As `teacher.image_size`."""
    target_norm: Literal["none", "standardize", "layernorm", "phi_s"] = "none"
    """As `teacher.target_norm`."""
    precision: Literal["fp32", "bf16"] | None = None
    """Arithmetic of its forward pass; null takes `teacher.precision`."""
    weight: PositiveFloat = 1.0
    """Factor on its losses, of patches and of the summary, in the sum over the teachers."""
    loss: MaskedLoss | None = None
    """Loss of its patches; null takes `mim.loss`."""
    summary: Literal["cls", "pooled"] | None = None
    """What its summary is; null takes `mim.summary`."""
    summary_weight: NonNegativeFloat | None = None
    """Weight of its summary's loss beside that of its patches; null takes `mim.summary_weight`."""
    share: PositiveFloat = 1.0
    """With `teachers.draw=one`, how often it is drawn, relative to the shares of the others that a sample may have."""
    sources: list[str] = field(default_factory=list)
    """Names of the data sources whose samples it teaches, as in the metrics `source/NAME/...`; empty for all."""


@dataclass(frozen=True, kw_only=True)
class TeachersConfig:
    """Several teachers of the masked stage, in the place of the section `teacher`."""

    of: list[TeacherEntry] = field(default_factory=list)
    """The teachers: sections, or names of configs/teacher. `teachers=[...]` sets it, and `teachers.NAME.KEY=...` a key
    of one of them (or `teachers.NUMBER.KEY`, from 0). Empty leaves the stage to `teacher`."""
    draw: Literal["all", "one"] = "all"
    """Which of the teachers of its source a sample has: all of them, or one that is drawn by `share`."""
