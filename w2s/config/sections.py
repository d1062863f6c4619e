"""The configuration: one typed dataclass per section, a line of documentation under each field."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from w2s.errors import ConfigError

Resize = Literal["crop", "squash"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(section: object, prefix: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value >= 1, f"{prefix}.{name}={value} must be at least 1")


def _require_scale(scale: tuple[float, float], key: str) -> None:
    low, high = scale
    _require(0 < low <= high <= 1, f"{key}=[{low}, {high}] must be two rising numbers in (0, 1]")


def _require_probabilities(weights: list[float], key: str) -> None:
    total = sum(weights)
    if weights and (min(weights) <= 0 or abs(total - 1) > 1e-3):
        fix = [round(weight / total, 4) for weight in weights] if min(weights) > 0 else "only numbers above 0"
        raise ConfigError(f"{key}={weights} are no probabilities that sum to 1: use {fix}")


@dataclass(kw_only=True)
class RunConfig:
    """Where a run lives and what it is called."""

    root: str = "runs"
    """Folder that holds all runs."""
    name: str = "auto"
    """Folder of this run below `root`; `auto` makes stage-model-digest and so finds an interrupted run again."""
    seed: int = 0
    """Seed of the weights, the sample order, the crops and the masks."""
    group: str = ""
    """Name of the `w2s run` that this stage belongs to; set by `w2s run`."""

    def __post_init__(self) -> None:
        _require(
            self.name not in ("", ".", "..") and "/" not in self.name,
            f"run.name={self.name} is no folder name: use one without slashes, and run.root for the folder above it",
        )


@dataclass(kw_only=True)
class VisionConfig:
    """Shape of the vision tower (an EVA vision transformer)."""

    image_size: int = 64
    """Side of the square input in pixels."""
    patch_size: int = 16
    """Side of a square patch in pixels."""
    layers: int = 6
    """Transformer layers."""
    width: int = 192
    """Width of the residual stream."""
    heads: int = 6
    """Attention heads."""
    mlp_width: int = 960
    """Hidden width of the MLP (EVA-18B: 5 x width)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of norm, with eps 1e-6."""
    norm_placement: Literal["post", "pre"] = "post"
    """`post` norms the branch output before it is added (EVA-18B, EVA02-E), `pre` norms the branch input (EVA-8B)."""
    qkv_bias: bool = False
    """Bias on Q and V (never on K) and on the projection head."""
    drop_path: float = 0.0
    """Probability that training leaves out a branch of the last layer, rising linearly from 0 in the first (EVA-01)."""

    def __post_init__(self) -> None:
        _require_positive(self, "model.vision", ("image_size", "patch_size", "layers", "width", "heads", "mlp_width"))
        _require(0 <= self.drop_path < 1, f"model.vision.drop_path={self.drop_path} must be in [0, 1)")
        _require(
            self.image_size % self.patch_size == 0,
            f"model.vision.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: "
            f"use {self.image_size // self.patch_size * self.patch_size or self.patch_size}",
        )
        _require(
            self.width % self.heads == 0,
            f"model.vision.width={self.width} is not divisible by heads={self.heads}: change one of them",
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches in an image."""
        return self.grid**2


@dataclass(kw_only=True)
class TextConfig:
    """Shape of the text tower (CLIP's causal pre-norm transformer)."""

    context_length: int = 16
    """Tokens of a caption, start and end tokens included."""
    vocab_size: int = 49408
    """Vocabulary of the tokenizer (CLIP's BPE)."""
    layers: int = 4
    """Transformer layers."""
    width: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads."""
    mlp_width: int = 512
    """Hidden width of the MLP (CLIP: 4 x width)."""

    def __post_init__(self) -> None:
        _require_positive(self, "model.text", ("context_length", "vocab_size", "layers", "width", "heads", "mlp_width"))
        _require(
            self.width % self.heads == 0,
            f"model.text.width={self.width} is not divisible by heads={self.heads}: change one of them",
        )


@dataclass(kw_only=True)
class ModelConfig:
    """The CLIP that is grown: a vision tower, a text tower and the width that they share."""

    name: str = "custom"
    """Name of the shape, as in configs/model/NAME.yaml."""
    embed_dim: int = 128
    """Width of the shared image-text space."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision tower."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""


@dataclass(kw_only=True)
class TeacherConfig:
    """The frozen teacher of the masked stage."""

    name: str = "custom"
    """Name of the teacher, as in configs/teacher/NAME.yaml."""
    source: str = "efficientnet_lite0"
    """`efficientnet_lite0` or `efficientnet_lite2` (weights from packages), `timm:MODEL[@FILE]`,
    `open_clip:MODEL[@FILE]`, `hf:FOLDER` (transformers), `eva:MODEL[@FILE]` (a model of configs/model, in the released
    names) or `w2s:RUN`.

    Without a file the weights are random.
    """
    image_size: int = 0
    """Side of the teacher's input in pixels; 0 is its own, and for a convolutional net a feature per student patch."""
    target_norm: Literal["none", "standardize", "layernorm"] = "none"
    """`none` (the paper's, for CLIP teachers), per-channel standardisation with running statistics (CNN teachers), or
    layer norm of each feature vector, without weights (data2vec)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the teacher's forward pass."""
    compile: bool = False
    """Put the teacher through torch.compile."""
    sharded: bool = False
    """Split a `w2s:RUN` that is too big for one GPU over the tensor-parallel ranks; else every rank holds it whole."""
    batch_size: int = 64
    """Images of one teacher forward in evaluation."""


@dataclass(kw_only=True)
class PhaseConfig:
    """A part of the training samples; what is empty or null is as in the sections above."""

    samples: int = 0
    """Samples of the phase, a multiple of train.global_batch; 0 in the last phase lasts to the end of the run."""
    train: str = ""
    """Training shards, as data.train; a source that another phase reads too goes on where that one left it."""
    weights: list[float] = field(default_factory=list)
    """Probability of each source, as data.weights."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest area of the random crop, as a fraction of the image."""
    patch_dropout: float | None = None
    """Fraction of patches that the contrastive stage does not see."""

    def __post_init__(self) -> None:
        _require(self.samples >= 0, f"data.phases: samples={self.samples} must be at least 0")
        _require_probabilities(self.weights, "data.phases: weights")
        if self.crop_scale is not None:
            _require_scale(self.crop_scale, "data.phases: crop_scale")
        if self.patch_dropout is not None:
            _require(0 <= self.patch_dropout < 1, f"data.phases: patch_dropout={self.patch_dropout} must be in [0, 1)")


@dataclass(kw_only=True)
class DataConfig:
    """Training images and captions: webdataset shards, drawn in lanes."""

    name: str = "custom"
    """Name of the data set, as in configs/data/NAME.yaml."""
    builtin: Literal["none", "emoji", "showcase"] = "none"
    """Data set that w2s builds from packages below `cache` when it is not there yet."""
    cache: str = "${oc.env:W2S_CACHE,'~/.cache/w2s'}"
    """Folder for built-in data sets; the environment variable W2S_CACHE changes it."""
    train: str = ""
    """Training shards: a folder, a glob, a brace pattern, a URL or a .txt file that lists them.

    `,` joins several to one source; `::` or `;` separate sources.
    """
    weights: list[float] = field(default_factory=list)
    """Probability that a sample comes from each source; empty makes one pool of all sources' shards."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts of the training with sources, crops or patch dropout of their own, one after the other."""
    index: str = "${run.root}/index"
    """Folder of the sizes that `w2s data index` has counted."""
    allow_pipe: bool = False
    """Let sources be `pipe:COMMAND`, which runs a shell command and reads its output."""
    lanes: int = 8
    """Streams that the sample order is made of; the number of reading ranks must divide it."""
    shuffle: int = 256
    """Samples that a lane shuffles together, shared among its sources by their weights."""
    replacement: bool = False
    """Draw shards with replacement instead of going through all of them in every epoch."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the random crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest aspect ratio of the random crop."""
    flip: bool = True
    """Flip half of the images left to right."""
    half_scale: bool = False
    """Decode a JPEG at exactly half its size where the crop is at least twice the view: faster, slightly different."""
    image_key: str = "jpg;jpeg;png;webp;bmp;gif;tif;tiff"
    """Extensions of the image in a sample; the first that is there is taken."""
    caption_key: str = "txt"
    """Where the caption is: an extension, or `json.KEY` for a key of the JSON file; several separated by `;`."""
    caption_weights: list[float] = field(default_factory=list)
    """Probability of each caption of `caption_key`; empty takes the first that is there."""
    workers: int = 1
    """Reading processes per rank; 0 reads in the training process."""
    max_bad_fraction: float = 0.05
    """Stop when more than this fraction of the last 1,000 samples of a reading process could not be read."""

    def __post_init__(self) -> None:
        for name, least in (("lanes", 1), ("shuffle", 1), ("workers", 0)):
            value = getattr(self, name)
            _require(value >= least, f"data.{name}={value} must be at least {least}")
        _require_scale(self.crop_scale, "data.crop_scale")
        low, high = self.crop_ratio
        _require(0 < low <= high, f"data.crop_ratio=[{low}, {high}] must be two rising numbers above 0")
        _require(
            0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction} must be between 0 and 1"
        )
        _require_probabilities(self.weights, "data.weights")
        _require_probabilities(self.caption_weights, "data.caption_weights")
        keys = self.caption_key.split(";")
        _require(
            len(self.caption_weights) in (0, len(keys)),
            f"data.caption_weights={self.caption_weights} are not one for each of data.caption_key={self.caption_key}: "
            f"give {len(keys)}",
        )


@dataclass(kw_only=True)
class TrainConfig:
    """Length and batch of a training stage."""

    steps: int = 100
    """Optimizer steps."""
    global_batch: int = 64
    """Samples of one optimizer step over all ranks."""
    micro_batch: int = 64
    """Most samples of one forward pass on one data-parallel rank."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 0
    """Steps between evaluations while training; 0 evaluates only at the end."""

    def __post_init__(self) -> None:
        _require_positive(self, "train", ("steps", "global_batch", "micro_batch", "log_every"))


@dataclass(kw_only=True)
class LayerPairConfig:
    """A layer of the student that learns the patch tokens after a layer of the teacher; both are counted from 0."""

    student: int = -1
    """Layer of the student."""
    teacher: int = -1
    """Layer of the teacher."""
    weight: float = 1.0
    """Weight of its loss among those of all pairs."""

    def __post_init__(self) -> None:
        for name in ("student", "teacher"):
            value = getattr(self, name)
            _require(value >= 0, f"mim.layers: {name}={value} is no layer: give one, counted from 0")
        _require(self.weight > 0, f"mim.layers: weight={self.weight} must be above 0")


@dataclass(kw_only=True)
class MimConfig:
    """The masked stage."""

    masked_patches: int = 6
    """Patches masked in every image, exactly (EVA: 105 of 256); 0 masks nothing, and all patches are predicted."""
    predict: Literal["masked", "visible", "all"] = "masked"
    """Patches that the loss is on: the masked ones (EVA); the visible ones, and then the masked ones do not go through
    the student at all; or all."""
    loss: Literal["cosine", "smooth_l1", "mse"] = "cosine"
    """Between a prediction and its target: minus the cosine (EVA), or the mean over the channels of smooth L1
    (data2vec) or of the squared error."""
    mask: Literal["block", "uniform"] = "block"
    """Patches are masked in blocks (EVA), or each independently of its neighbours."""
    min_block: int = 2
    """Smallest masked block in patches (EVA: 16)."""
    block_aspect: float = 0.3
    """Blocks have an aspect ratio between this and its inverse (EVA: 0.3)."""
    layers: list[LayerPairConfig] = field(default_factory=list)
    """Layers of the student that learn from layers of the teacher too, each by a head of its own that later stages
    drop: [{student: 2, teacher: 11}]."""
    layers_weight: float = 0.1
    """Weight of the sum of the losses of `layers` beside that of the last layer (LET: about 0.1)."""
    layers_until: float | None = 1.0
    """Fraction of the steps at which `layers_weight` has fallen to 0, linearly (LET); null does not let it fall."""

    summary_weight: float = 0.0
    """Weight of a second loss: minus the cosine of the student's class token, through the projection that its CLIP will
    have, and the teacher's summary of the image. 0 leaves both out."""
    summary: Literal["cls", "pooled"] = "cls"
    """The teacher's summary: its own image embedding (class token or pooled feature of what is no CLIP), or the mean of
    its patch features."""

    def summary_width(self, width: int, embedding: int) -> int:
        """Return the channels of the summary target, 0 without one.

        Args:
            width: channels of the teacher's patch features.
            embedding: channels of its own image embedding.
        """
        return (embedding if self.summary == "cls" else width) if self.summary_weight else 0

    def seen(self, patches: int) -> int:
        """Return how many of an image's patches go through the student, masked or not."""
        return patches - self.masked_patches if self.predict == "visible" else patches

    def predicted(self, patches: int) -> int:
        """Return on how many of an image's patches the loss is."""
        return (self.masked_patches or patches) if self.predict == "masked" else self.seen(patches)


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation inside the contrastive stage: for some of the steps a finished CLIP teaches the one in training."""

    source: str = "none"
    """`none`, `teacher` (what `teacher.source` names) or another teacher in the same words, such as `w2s:RUN`.

    Its image size, precision and the rest are those of the section `teacher`.
    """
    kind: Literal["feature", "affinity", "both"] = "affinity"
    """`feature`: embeddings onto the teacher's, which are as wide; `affinity`: the similarities of the batch's images
    and captions onto the teacher's, of any width."""
    towers: Literal["image", "text", "both"] = "both"
    """The student's towers that learn from the teacher; `feature` for one of them needs no other tower of it."""
    weight: float = 1.0
    """Factor on the loss of distillation beside the contrastive loss (CLIP-KD: 1 for affinity, about 4 for feature)."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the weight goes down to 0 over the steps of `until`."""
    until: float = 1.0
    """Share of the steps after which the teacher is let go."""
    until_better: bool = False
    """Let the teacher go also when the student passes it on `eval.shards`, as seen every `train.eval_every` steps.

    By the mean of both recalls at 10, or without captions by zero-shot top-1. The shards are then no test set any more.
    """

    @property
    def sides(self) -> tuple[str, ...]:
        """The student's towers that learn."""
        return ("image", "text") if self.towers == "both" else (self.towers,)

    @property
    def teacher_sides(self) -> tuple[str, ...]:
        """The teacher's towers that are needed; affinities and a comparison need both."""
        return ("image", "text") if self.kind != "feature" or self.until_better else self.sides

    def last_step(self, train: TrainConfig) -> int:
        """Return the step after which the teacher is let go."""
        return max(1, round(self.until * train.steps))


@dataclass(kw_only=True)
class ClipConfig:
    """The contrastive stage."""

    patch_dropout: float = 0.5
    """Fraction of patches that the vision tower does not see while training; CLS is always kept."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's softmax over the batch, or SigLIP's sigmoid of every pair (which begins at scale 10 and bias -10)."""
    logit_bias: float = -10.0
    """Initial bias of the logits of the sigmoid loss; the softmax loss has none."""
    equal_captions: Literal["negatives", "positives"] = "negatives"
    """Whether two samples of a batch with the same caption repel each other or count as positives."""
    logit_scale: float = 1 / 0.07
    """Initial scale of the logits (inverse temperature)."""
    logit_scale_max: float = 100.0
    """The scale is clamped to at most this after each step."""
    learn_logit_scale: bool = True
    """Train the scale; `false` keeps it fixed (the paper's text: constant 100)."""
    tile: int = 1024
    """Rows and columns of the logits that are in memory at a time."""
    two_pass: Literal["auto", "always"] = "auto"
    """`auto` takes one forward pass where the batch of a rank is one micro-batch; `always` takes the two-pass way."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation from a finished CLIP beside the contrastive loss."""


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer, learning rates and schedule."""

    name: Literal["adamw", "lamb"] = "adamw"
    """AdamW or LAMB (trust ratio on every tensor that is not all zero, at weight decay 0 too; but see `trust_1d`)."""
    lr: float = 1e-3
    """Peak learning rate of what belongs to no tower (logit scale), and of a tower whose own rate is null."""
    vision_lr: float | None = None
    """Peak learning rate of the vision tower; null takes `lr`."""
    text_lr: float | None = None
    """Peak learning rate of the text tower; null takes `lr`."""
    vision_layer_decay: float = 1.0
    """Factor on the learning rate per layer down from the vision tower's head."""
    text_layer_decay: float = 1.0
    """Factor on the learning rate per layer down from the text tower's projection."""
    vision_frozen_steps: int = 0
    """First steps in which the vision tower does not move, as far as `vision_frozen_layers` says."""
    vision_frozen_layers: int | None = None
    """How many of the lowest layers are frozen, with the embeddings below them: 0 for these alone, null for all."""
    text_frozen_steps: int = 0
    """First steps in which the text tower does not move; the logit scale does."""
    text_frozen_layers: int | None = None
    """As `vision_frozen_layers`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine down to `min_lr`, or the peak rate up to a cool-down, so that runs of several lengths
    can share their first part."""
    cooldown: float = 0.2
    """With `schedule=constant`, the last part of train.steps in which the rate falls to `min_lr`, as a fraction."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule, as a fraction of the peak."""
    warmup: int = 10
    """Steps of linear warm-up."""
    warmup_from: Literal["zero", "step"] = "step"
    """The first rate: one step's share of the peak (EVA-CLIP: step i from 0 has (i + 1) / warmup of it), or zero (EVA's
    masked stage: i / (warmup - 1))."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and second moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.05
    """Decoupled weight decay; none on 1-D tensors, positions, CLS and the logit scale."""
    trust_ratio: tuple[float, float] | None = None
    """LAMB: bounds of the trust ratio (DeepSpeed: [0.01, 10]); null leaves it free."""
    trust_1d: Literal["auto", "always", "never"] = "auto"
    """LAMB: whether the trust ratio acts on 1-D tensors (biases, norms); what starts at zero hardly moves with it.

    `auto` leaves them out of it in a tower that starts from scratch (init.vision or init.text is none).
    """
    clip_grad: float = 3.0
    """Largest global gradient norm; 0 does not clip."""

    def cooldown_start(self, steps: int) -> int:
        """Return the step of `steps` from which a constant rate falls: up to there it is that of any longer run."""
        return steps - round(self.cooldown * steps)


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is split over ranks; data parallelism is what is left."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallelism within the tensor-parallel group."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    vision_split: tuple[int, ...] = ()
    """Layers of the vision tower on each of the pipeline x virtual_pipeline stages, in order.

    Empty balances their work; that of the embedding counts on the first stage, that of norm and head on the last.
    """
    text_split: tuple[int, ...] = ()
    """The same for the text tower."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none, the MLPs' after their GELU, or those of whole layers."""
    recompute_layers: int = 0
    """With `recompute=full`, how many layers of each model chunk are computed again; 0 takes all."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights over data-parallel ranks while the next forward pass already runs."""
    cuda_graphs: bool = False
    """Replay the layers from CUDA graphs, which small layers on a fast GPU gain from; data parallelism alone."""


@dataclass(kw_only=True)
class PrecisionConfig:
    """Arithmetic; master weights and optimizer states are always float32."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights and activations in the forward and backward pass."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are accumulated over micro-batches and reduced over ranks."""
    linear: Literal["auto", "local", "te"] = "auto"
    """Linear layers: Megatron's own (`local`) or Transformer Engine's (`te`); `auto` takes Transformer Engine on Hopper
    and newer cards where it is installed, else local."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "emulated"] = "none"
    """FP8 in the layers' matrix products while training: a recipe of Transformer Engine, or `emulated`, a rehearsal of
    `tensorwise` on any machine. Evaluation is always without."""
    fp8_format: Literal["auto", "hybrid", "e4m3"] = "auto"
    """`hybrid` is E4M3 forward and E5M2 for gradients, `e4m3` is E4M3 for both; `auto` is e4m3 with the blockwise
    recipe, else hybrid."""
    fp8_history: int = 16
    """Micro-batches over which the delayed recipe takes the largest magnitude."""
    fp8_margin: int = 0
    """Powers of two that the delayed recipe leaves free below the format's largest number."""
    fp8_bf16_first: int = 0
    """First layers of each tower that stay without FP8."""
    fp8_bf16_last: int = 0
    """Last layers of each tower that stay without FP8."""
    fp8_bf16_layers: list[str] = field(default_factory=list)
    """Further layers that stay without FP8, as the metrics name them: `vision.7`, `text.0`; counted from 0."""
    fp8_primary_weights: bool = False
    """Keep the layers' weights in FP8 alone and gather them so; the float32 master weights are the optimizer's."""

    def __post_init__(self) -> None:
        _require_positive(self, "precision", ("fp8_history",))
        for name in ("fp8_margin", "fp8_bf16_first", "fp8_bf16_last"):
            value = getattr(self, name)
            _require(value >= 0, f"precision.{name}={value} must be at least 0")


@dataclass(kw_only=True)
class HardwareConfig:
    """The machine."""

    name: str = "custom"
    """Name of the setting, as in configs/hardware/NAME.yaml."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    timeout: int = 600
    """Seconds after which a rank that waits for another gives up."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_at: list[int] = field(default_factory=list)
    """Steps that are saved, and kept whatever comes after: where other runs go on from (`init.checkpoint`)."""
    async_save: bool = False
    """Write in the background while training goes on; `latest` moves when all ranks have written."""

    def __post_init__(self) -> None:
        _require_positive(self, "checkpoint", ("every", "keep"))
        _require(min(self.keep_at, default=1) >= 1, f"checkpoint.keep_at={self.keep_at} must be steps, counted from 1")


@dataclass(kw_only=True)
class InitConfig:
    """Where the weights come from when the run has no checkpoint of its own."""

    vision: str = "none"
    """Vision tower: a run's path, its name, its MLflow run id, `latest` (newest finished mim run), a weights file of
    EVA-CLIP, open_clip or timm, or `none`."""
    text: str = "none"
    """Text tower of the contrastive stage, named as in `vision`; `latest` is the newest finished clip run.

    `teacher` takes that of the teacher of the masked run in `vision`, or without one that of teacher.source.
    """
    grow: Literal["none", "stack", "interleave"] = "none"
    """How towers that are named above become deeper: the whole tower repeated, or each layer in its place."""
    grow_width: Literal["none", "copy", "split"] = "none"
    """How they become wider: by copies that share their readers' weights evenly, or unevenly, so that they part."""
    projections: Literal["keep", "fresh"] = "keep"
    """`keep` takes heads and logit scale along where they fit, `fresh` draws them anew (as EVA's released code)."""
    checkpoint: str = "none"
    """A run's path, its name, its MLflow run id, `latest` (the newest finished one), or the path of one of its
    checkpoints: the model to evaluate, or the state that a training goes on from (weights, optimizer, step, data)."""
    post_norm: float = 1.0
    """Initial weight of the branch norms of a post-norm tower that starts from scratch (0 in EVA-01's masked stage)."""
    std: float = 0.02
    """Standard deviation of the normal that a vision tower's weights are drawn from."""
    truncated: bool = False
    """Cut that normal at one standard deviation, and draw the patch embedding from it too (EVA-01's masked stage)."""
    text_mlp_bias: Literal["zero", "uniform"] = "zero"
    """Biases of a text tower's MLPs: zero, or uniform in 1 / sqrt(inputs) on both sides of it (EVA-CLIP)."""

    @property
    def scratch(self) -> set[str]:
        """Towers whose weights are drawn from the seed."""
        return {tower for tower in ("vision", "text") if getattr(self, tower) == "none"}


@dataclass(kw_only=True)
class EvalConfig:
    """Zero-shot classification, retrieval and k-NN."""

    shards: str = ""
    """Test shards with images and captions or class labels; empty turns evaluation off."""
    sets: dict[str, str] = field(default_factory=dict)
    """Several test sets for `w2s stage eval`, shards by name, in place of `shards`; metrics are called NAME/METRIC."""
    class_key: str = "cls"
    """Extension of the class number in a sample; `classnames.txt` beside the shards has a name a line."""
    templates: Literal["none", "simple", "openai", "own"] = "none"
    """Prompts around a class name: none, open_clip's short list, its ImageNet list of 80, or each test set's own.

    `own` is the file zeroshot_classification_templates.txt beside classnames.txt: a prompt a line, {c} for the name.
    """
    resize: Resize = "crop"
    """Make a test image square by a centre `crop`, or `squash` the whole of it (the papers, for retrieval)."""
    batch_size: int = 256
    """Images or texts of one forward pass."""
    retrieval: bool = True
    """Measure image-text retrieval (recall at 1, 5 and 10, both ways)."""
    knn_shards: str = ""
    """Labelled shards that k-NN takes its neighbours from; empty leaves k-NN out."""
    knn_k: int = 20
    """Neighbours that vote."""
    baselines: bool = True
    """Measure k-NN of a random student and of the teacher too."""

    def __post_init__(self) -> None:
        for name in self.sets:
            _require(
                re.fullmatch(r"[\w-]+", name, re.ASCII) is not None,
                f"eval.sets: '{name}' is no name of a test set: use letters, digits, _ and -",
            )

    @property
    def by_name(self) -> dict[str, str]:
        """Test shards by the name of their set: `sets`, or `shards` under the empty name; nothing without both."""
        return self.sets or ({"": self.shards} if self.shards else {})

    @property
    def by_key(self) -> dict[str, str]:
        """All shards that an evaluation reads, by the configuration key that names them."""
        single = {"eval.shards": self.shards, "eval.knn_shards": self.knn_shards}
        return {key: shards for key, shards in single.items() if shards} | {
            f"eval.sets.{name}": shards for name, shards in self.sets.items()
        }


@dataclass(kw_only=True)
class TrackingConfig:
    """MLflow, console and pictures."""

    enabled: bool = True
    """Log to MLflow; the console, metrics.jsonl and report.html are always written."""
    uri: str = ""
    """Tracking URI; empty takes MLFLOW_TRACKING_URI, else a sqlite file beside the runs."""
    experiment: str = "w2s"
    """MLflow experiment."""
    parent_run: str = ""
    """MLflow run that this stage is a child of; set by `w2s run`."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use to MLflow."""
    pictures: int = 8
    """Images (masked stage) or classes (evaluation) in the pictures at the end of a stage; 0 draws none."""


@dataclass(kw_only=True)
class Config:
    """Everything that a stage is told."""

    stage: Literal["mim", "clip", "eval"] = "mim"
    """The stage."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mim: MimConfig = field(default_factory=MimConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def taught_by(self) -> TeacherConfig | None:
        """The teacher that the stage learns from; None where it learns from none."""
        if self.stage == "mim":
            return self.teacher
        source = self.clip.distill.source if self.stage == "clip" else "none"
        if source == "none":
            return None
        return self.teacher if source == "teacher" else replace(self.teacher, source=source, name=source)

    @property
    def taught_steps(self) -> int:
        """The steps in which the teacher is heard, unless the student passes it before."""
        if self.taught_by is None:
            return 0
        return self.train.steps if self.stage == "mim" else self.clip.distill.last_step(self.train)
