"""The sections of what a stage of training does."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from w2s.config.model_sections import MaskedLoss
from w2s.config.rules import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    OnlyFor,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Rising,
    Section,
    UselessWith,
    require,
)

_NO_TEXT_TOWER = OnlyFor("clip", why="the masked stage has no text tower")
_TRAINS = OnlyFor("mim", "clip", why="an evaluation takes no steps")
_WITHOUT_A_TEACHER = UselessWith("clip.distill.source", "none")
_LAMB_ALONE = UselessWith("optim.name", "adamw")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section, prefix="train."):
    """Length and batch of a training stage."""

    steps: PositiveInt = 100
    """Optimizer steps."""
    global_batch: PositiveInt = 64
    """Samples of one optimizer step over all ranks."""
    micro_batch: PositiveInt = 64
    """Most samples of one forward pass on one data-parallel rank."""
    log_every: PositiveInt = 10
    """Steps between log lines."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations while training; 0 evaluates only at the end."""
    bad_steps: PositiveInt = 10
    """After so many skipped steps in a row (see `optim.spike_deviations`) the run rolls back to its last checkpoint
    and skips the samples that led there; noticed when a log line is due."""
    rollbacks: NonNegativeInt = 2
    """Most times that a run rolls back; then it ends."""
    deterministic: bool = False
    """On a GPU, give the same bits for the same samples every time, by algorithms that may be slower; a CPU does so."""
    check_replicas: NonNegativeInt = 1000
    """Steps between comparisons of the data-parallel replicas' weights: what differs is named and taken from the
    majority; without one the run rolls back to its last checkpoint. 0 never compares."""
    callbacks: Annotated[list[str], _TRAINS] = field(default_factory=list)
    """Classes of your own that follow the run: [my_package.module:Class], each a `w2s.training.callbacks.Callback`."""
    profile: Annotated[str, _TRAINS] = ""
    """Steps to profile, the first and the last: 10-15 writes a trace, time and memory by operator, and on a GPU a
    snapshot of its memory into `profile/` of the run folder and to MLflow. Empty profiles none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = re.fullmatch(r"(\d+)-(\d+)", self.profile)
        ordered = steps is not None and 1 <= int(steps[1]) <= int(steps[2])
        require(
            not self.profile or ordered, f"train.profile={self.profile} is not FIRST-LAST, steps counted from 1: 10-15"
        )
        require(
            not self.profile or self.profiled[0] <= self.steps,
            f"train.profile={self.profile} begins after train.steps={self.steps}: name earlier steps",
        )

    @property
    def profiled(self) -> range:
        """The steps of `profile`; none where it is empty."""
        first, _, last = self.profile.partition("-")
        return range(int(first), int(last) + 1) if self.profile else range(0)


@dataclass(frozen=True, kw_only=True)
class LayerPairConfig(Section, prefix="mim.layers: "):
    """A layer of the student that learns the patch tokens after a layer of the teacher; both are counted from 0."""

    student: int = -1
    """Layer of the student."""
    teacher: int = -1
    """Layer of the teacher."""
    weight: PositiveFloat = 1.0
    """Weight of its loss among those of all pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("student", "teacher"):
            value = getattr(self, name)
            require(value >= 0, f"mim.layers: {name}={value} is not a layer: give one, counted from 0")


@dataclass(frozen=True, kw_only=True)
class MimConfig(Section, prefix="mim."):
    """The masked stage."""

    masked_patches: int = 6
    """Patches masked in every image, exactly (EVA: 105 of 256); 0 masks nothing, and all patches are predicted."""
    predict: Literal["masked", "visible", "all"] = "masked"
    """Patches that the loss is on: the masked ones (EVA); the visible ones, and then the masked ones do not go through
    the student at all; or all."""
    loss: MaskedLoss = "cosine"
    """Between a prediction and its target: minus the cosine (EVA), or the mean over the channels of smooth L1
    (data2vec) or of the squared error; or a function of your own, module:function."""
    mask: Literal["block", "uniform"] = "block"
    """Patches are masked in blocks (EVA), or each independently of its neighbours."""
    min_block: PositiveInt = 2
    """Smallest masked block in patches (EVA: 16)."""
    block_aspect: PositiveFraction = 0.3
    """Blocks have an aspect ratio between this and its inverse (EVA: 0.3)."""
    layers: list[LayerPairConfig] = field(default_factory=list)
    """Layers of the student that learn from layers of the teacher too (of several, of the first), each by a head of its
    own that later stages drop: [{student: 2, teacher: 11}]."""
    layers_weight: Annotated[PositiveFloat, UselessWith("mim.layers", [])] = 0.1
    """Weight of the sum of the losses of `layers` beside that of the last layer (LET: about 0.1)."""
    layers_until: Annotated[PositiveFraction | None, UselessWith("mim.layers", [])] = 1.0
    """Fraction of the steps at which `layers_weight` has fallen to 0, linearly (LET); null does not let it fall."""

    summary_weight: NonNegativeFloat = 0.0
    """Weight of a second loss: minus the cosine of the student's class token, through the projection that its CLIP will
    have, and the teacher's summary of the image. 0 leaves both out."""
    summary: Annotated[Literal["cls", "pooled"], UselessWith("mim.summary_weight", 0)] = "cls"
    """The teacher's summary: its own image embedding (class token or pooled feature if it is not a CLIP), or the mean
    of its patch features."""

    def num_visible(self, patches: int) -> int:
        """Return how many of an image's patches go through the student, masked or not."""
        return patches - self.masked_patches if self.predict == "visible" else patches

    def predicted(self, patches: int) -> int:
        """Return on how many of an image's patches the loss is."""
        return (self.masked_patches or patches) if self.predict == "masked" else self.num_visible(patches)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section, prefix="clip.distill."):
    """Distillation inside the contrastive stage: for some of the steps a finished CLIP teaches the one in training."""

    source: str = "none"
    """`none`, `teacher` (what `teacher.source` names) or another teacher in the same words, such as `w2s:RUN`.

    Its image size, precision and the rest are those of the section `teacher`.
    """
    kind: Annotated[Literal["feature", "affinity", "both"], _WITHOUT_A_TEACHER] = "affinity"
    """`feature`: embeddings onto the teacher's, which are as wide; `affinity`: the similarities of the batch's images
    and captions onto the teacher's, of any width."""
    towers: Annotated[Literal["image", "text", "both"], _WITHOUT_A_TEACHER] = "both"
    """The student's towers that learn from the teacher; `feature` for one of them needs no other tower of it."""
    weight: Annotated[PositiveFloat, _WITHOUT_A_TEACHER] = 1.0
    """Factor on the loss of distillation beside the contrastive loss (CLIP-KD: 1 for affinity, about 4 for feature)."""
    decay: Annotated[Literal["none", "linear", "cosine"], _WITHOUT_A_TEACHER] = "none"
    """How the weight goes down to 0 over the steps of `until`."""
    until: Annotated[PositiveFraction, _WITHOUT_A_TEACHER] = 1.0
    """Share of the steps after which the teacher is let go."""
    until_better: Annotated[bool, _WITHOUT_A_TEACHER] = False
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


@dataclass(frozen=True, kw_only=True)
class ClipConfig(Section, prefix="clip."):
    """The contrastive stage."""

    patch_dropout: FractionBelowOne = 0.5
    """Fraction of patches that the vision tower does not see while training; CLS is always kept."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's softmax over the batch, or SigLIP's sigmoid of every pair (which begins at scale 10 and bias -10)."""
    logit_bias: Annotated[float, UselessWith("clip.loss", "softmax")] = -10.0
    """Initial bias of the logits of the sigmoid loss; the softmax loss has none."""
    equal_captions: Literal["negatives", "positives"] = "negatives"
    """Whether two samples of a batch with the same caption repel each other or count as positives."""
    logit_scale: PositiveFloat | None = None
    """Initial scale of the logits (inverse temperature); null takes that of `init.text`, and 1 / 0.07 without one."""
    logit_scale_max: float = 100.0
    """The scale is clamped to at most this after each step."""
    learn_logit_scale: bool = True
    """Train the scale; `false` keeps it fixed (the paper's text: constant 100)."""
    tile: PositiveInt = 1024
    """Rows and columns of the logits that are in memory at a time."""
    two_pass: Literal["auto", "always"] = "auto"
    """`auto` takes one forward pass where the batch of a rank is one micro-batch; elsewhere, and with `always`, it
    takes GradCache's two."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation from a finished CLIP beside the contrastive loss."""

    @property
    def drawn_logit_scale(self) -> float:
        """The initial scale of a text tower from scratch."""
        return 1 / 0.07 if self.logit_scale is None else self.logit_scale


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section, prefix="optim."):
    """Optimizer, learning rates and schedule."""

    name: Literal["adamw", "lamb"] = "adamw"
    """AdamW or LAMB (trust ratio on every tensor that is not all zero, at weight decay 0 too; but see `trust_1d`)."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of what belongs to no tower (logit scale), and of a tower whose own rate is null."""
    vision_lr: PositiveFloat | None = None
    """Peak learning rate of the vision tower; null takes `lr`."""
    text_lr: PositiveFloat | None = None
    """Peak learning rate of the text tower; null takes `lr`."""
    vision_layer_decay: PositiveFraction = 1.0
    """Factor on the learning rate per layer down from the vision tower's head."""
    text_layer_decay: PositiveFraction = 1.0
    """Factor on the learning rate per layer down from the text tower's projection."""
    vision_frozen_steps: NonNegativeInt = 0
    """First steps in which the vision tower does not move, as far as `vision_frozen_layers` says."""
    vision_frozen_layers: Annotated[int | None, UselessWith("optim.vision_frozen_steps", 0)] = None
    """How many of the lowest layers are frozen, with the embeddings below them: 0 for these alone, null for all."""
    text_frozen_steps: Annotated[NonNegativeInt, _NO_TEXT_TOWER] = 0
    """First steps in which the text tower does not move; the logit scale does."""
    text_frozen_layers: Annotated[int | None, UselessWith("optim.text_frozen_steps", 0)] = None
    """As `vision_frozen_layers`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine down to `min_lr`, or the peak rate up to a cool-down, so that runs of several lengths
    can share their first part."""
    cooldown: Annotated[Fraction, UselessWith("optim.schedule", "cosine")] = 0.2
    """With `schedule=constant`, the last part of train.steps in which the rate falls to `min_lr`, as a fraction."""
    min_lr: Fraction = 0.0
    """Learning rate at the end of the schedule, as a fraction of the peak."""
    warmup: NonNegativeInt = 10
    """Steps of linear warm-up."""
    warmup_from: Literal["zero", "step"] = "step"
    """The first rate: one step's share of the peak (EVA-CLIP: step i from 0 has (i + 1) / warmup of it), or zero (EVA's
    masked stage: i / (warmup - 1))."""
    betas: Annotated[tuple[float, float], Range("[0, 1)")] = (0.9, 0.98)
    """Decay of the first and second moments."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay; none on 1-D tensors, positions, CLS and the logit scale."""
    trust_ratio: Annotated[tuple[float, float] | None, Rising("(0, inf]"), _LAMB_ALONE] = None
    """LAMB: bounds of the trust ratio (DeepSpeed: [0.01, 10]); null leaves it free."""
    trust_1d: Annotated[Literal["auto", "always", "never"], _LAMB_ALONE] = "auto"
    """LAMB: whether the trust ratio acts on 1-D tensors (biases, norms); what starts at zero hardly moves with it.

    `auto` leaves them out of it in a tower that starts from scratch (init.vision or init.text is none).
    """
    clip_grad: NonNegativeFloat = 3.0
    """Largest global gradient norm; 0 does not clip."""
    spike_deviations: NonNegativeFloat = 20.0
    """A step whose gradient norm exceeds the median of the last `spike_window` ones by more than so many of their
    standard deviations is skipped; 0 skips only those whose norm or loss is not a number."""
    spike_window: PositiveInt = 128
    """Gradient norms that a spike is measured by; nothing is one before half of them are there."""
    ema: FractionBelowOne = 0.0
    """Decay of a moving average of the weights that is kept beside them, such as 0.9999 (docs/starts.md); 0 keeps
    none."""

    def cooldown_start(self, steps: int) -> int:
        """Return the step of `steps` from which a constant rate falls: up to there it is that of any longer run."""
        return steps - round(self.cooldown * steps)
