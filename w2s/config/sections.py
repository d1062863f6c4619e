"""The configuration: one typed dataclass per section, a line of documentation under each field.

The sections of the model, the data and the training are in files beside this one, and imported from here.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal

from w2s.config.data_sections import DataConfig, PhaseConfig
from w2s.config.model_sections import (
    ModelConfig,
    TeacherConfig,
    TeacherEntry,
    TeachersConfig,
    TextConfig,
    VisionConfig,
    Weights,
)
from w2s.config.rules import (
    FolderName,
    NonNegativeInt,
    OnlyFor,
    PositiveFloat,
    PositiveInt,
    Range,
    Section,
    UselessWith,
    is_name,
    require,
)
from w2s.config.teacher_losses import TeacherLoss
from w2s.config.training_sections import ClipConfig, DistillConfig, LayerPairConfig, MimConfig, OptimConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "HardwareConfig",
    "InitConfig",
    "LayerPairConfig",
    "MimConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PhaseConfig",
    "PrecisionConfig",
    "Resize",
    "RunConfig",
    "TeacherConfig",
    "TeacherEntry",
    "TeachersConfig",
    "TextConfig",
    "TrackingConfig",
    "TrainConfig",
    "VisionConfig",
    "Weights",
]

Resize = Literal["crop", "squash"]

_WITHOUT_A_PIPELINE = UselessWith("parallel.pipeline", 1)
_WITHOUT_FP8 = UselessWith("precision.fp8", "none")
_DELAYED_ALONE = UselessWith("precision.fp8", "none", "tensorwise", "blockwise", "emulated")
_AFTER_TRAINING = OnlyFor("eval", why="training is measured on eval.shards alone")
_MAKES_A_CLIP = OnlyFor("clip", "eval", why="the masked stage makes no CLIP")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section, prefix="run."):
    """Where a run lives and what it is called."""

    root: str = "runs"
    """Folder that holds all runs."""
    name: Annotated[str, FolderName("use one without slashes, and run.root for the folder above it")] = "auto"
    """Folder of this run below `root`; `auto` makes stage-model-digest and so finds an interrupted run again."""
    seed: int = 0
    """Seed of the weights, the sample order, the crops and the masks."""
    group: Annotated[str, FolderName("`w2s run` sets it, leave it out", optional=True)] = ""
    """Name of the `w2s run` that this stage belongs to; set by `w2s run`."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section, prefix="parallel."):
    """How the model is split over ranks; data parallelism is what is left."""

    tensor: PositiveInt = 1
    """Tensor-parallel size."""
    sequence: Annotated[bool, UselessWith("parallel.tensor", 1)] = False
    """Sequence parallelism within the tensor-parallel group."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size."""
    virtual_pipeline: Annotated[PositiveInt, _WITHOUT_A_PIPELINE] = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    micro_batch_group: Annotated[int, UselessWith("parallel.virtual_pipeline", 1)] = 0
    """Micro-batches that go through a chunk before it is the next one's turn (virtual pipeline); 0 takes `pipeline`.
    More give messages time to arrive, for as many more micro-batches in flight."""
    vision_split: Annotated[tuple[int, ...], _WITHOUT_A_PIPELINE] = ()
    """Layers of the vision tower on each of the pipeline x virtual_pipeline stages, in order.

    Empty balances their work; that of the embedding counts on the first stage, that of norm and head on the last.
    """
    text_split: Annotated[tuple[int, ...], _WITHOUT_A_PIPELINE] = ()
    """The same for the text tower."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none, the MLPs' after their GELU, or those of whole layers."""
    recompute_layers: Annotated[NonNegativeInt, UselessWith("parallel.recompute", "none", "selective")] = 0
    """With `recompute=full`, how many layers of each model chunk are recomputed; 0 takes all."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights over data-parallel ranks while the next forward pass already runs."""
    shard: Literal["optimizer", "full"] = "optimizer"
    """What data-parallel ranks share out: optimizer states, or weights and gradients too (Megatron-Core's FSDP), which
    layers gather while they compute. Data parallelism alone."""
    cuda_graphs: bool = False
    """Replay the layers from CUDA graphs, which small layers on a fast GPU gain from; data parallelism alone."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Section, prefix="precision."):
    """Arithmetic; master weights and optimizer states are always float32."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights and activations in the forward and backward pass."""
    gradients: Annotated[Literal["fp32", "bf16"], UselessWith("precision.compute", "fp32")] = "fp32"
    """Type in which gradients are accumulated over micro-batches and reduced over ranks."""
    linear: Literal["auto", "local", "te"] = "auto"
    """Linear layers: Megatron's own (`local`) or Transformer Engine's (`te`); `auto` takes Transformer Engine on Hopper
    and newer cards where it is installed, otherwise local."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "emulated"] = "none"
    """FP8 in the layers' matrix products while training: a recipe of Transformer Engine, or `emulated`, a rehearsal of
    `tensorwise` on any machine. Evaluation is always without."""
    fp8_format: Annotated[Literal["auto", "hybrid", "e4m3"], _WITHOUT_FP8] = "auto"
    """`hybrid` is E4M3 forward and E5M2 for gradients, `e4m3` is E4M3 for both; `auto` is e4m3 with the blockwise
    recipe, otherwise hybrid."""
    fp8_history: Annotated[PositiveInt, _DELAYED_ALONE] = 16
    """Micro-batches over which the delayed recipe takes the largest magnitude."""
    fp8_margin: Annotated[NonNegativeInt, _DELAYED_ALONE] = 0
    """Powers of two that the delayed recipe leaves free below the format's largest number."""
    fp8_bf16_first: Annotated[NonNegativeInt, _WITHOUT_FP8] = 0
    """First layers of each tower that stay without FP8."""
    fp8_bf16_last: Annotated[NonNegativeInt, _WITHOUT_FP8] = 0
    """Last layers of each tower that stay without FP8."""
    fp8_bf16_layers: Annotated[list[str], _WITHOUT_FP8] = field(default_factory=list)
    """Further layers that stay without FP8, as the metrics name them: `vision.7`, `text.0`; counted from 0."""
    fp8_primary_weights: Annotated[bool, _WITHOUT_FP8] = False
    """Keep the layers' weights in FP8 alone and gather them so; the float32 master weights are the optimizer's."""


@dataclass(frozen=True, kw_only=True)
class HardwareConfig(Section, prefix="hardware."):
    """The machine."""

    name: str = "custom"
    """Name of the setting, as in configs/hardware/NAME.yaml."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    timeout: Annotated[int, Range("[5, inf)")] = 600
    """Seconds without a sign of life of a rank, a reading process or a checkpoint writer after which the run ends."""
    slow_timeout: Annotated[int, Range("[5, inf)")] = 1800
    """The same where one call may take long: at the start, in the first step, while measuring, saving and finishing."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section, prefix="checkpoint."):
    """Saving."""

    every: PositiveInt = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_at: list[PositiveInt] = field(default_factory=list)
    """Steps that are saved, and kept whatever comes after: where other runs continue from (`init.checkpoint`)."""
    async_save: bool = False
    """Write in the background while training continues; `latest` moves when all ranks have written."""
    memory: bool = False
    """Keep the newest one in the memory of the hosts too, each rank's also on the next host: ranks that are started
    again (--restarts) need no disk."""
    failures: PositiveInt = 3
    """Saves in a row that the system may refuse (disk full, quota) before the run ends: it trains on meanwhile."""
    strict: bool = False
    """Stop where the newest checkpoint is damaged, instead of continuing from the newest whole one."""


@dataclass(frozen=True, kw_only=True)
class InitConfig(Section, prefix="init."):
    """Where the weights come from when the run has no checkpoint of its own."""

    vision: str = "none"
    """Vision tower: a run's path, its name, its MLflow run id, `latest` (newest finished mim run), a weights file of
    EVA-CLIP, open_clip or timm, or `none`."""
    text: Annotated[str, OnlyFor("clip", why="the masked stage has no text tower")] = "none"
    """Text tower of the contrastive stage, named as in `vision`; `latest` is the newest finished clip run.

    `teacher` takes that of the teacher of the masked run in `vision`, or without one that of teacher.source.
    """
    teacher: Annotated[str, OnlyFor("clip", why="the masked stage gives none of its heads away")] = ""
    """Which teacher of the masked run in `vision` it is whose head the CLIP takes over, and whose text tower
    `text=teacher` is, where the run had several; empty takes the first."""
    grow: Literal["none", "stack", "interleave"] = "none"
    """How towers that are named above become deeper: the whole tower repeated, or each layer in its place."""
    grow_width: Literal["none", "copy", "split"] = "none"
    """How they become wider: by copies that share their readers' weights evenly, or unevenly, so that they part."""
    weights: Weights = "last"
    """Of the runs that are named above, the last weights or the moving average (`optim.ema`)."""
    projections: Literal["keep", "fresh"] = "keep"
    """`keep` takes heads and logit scale along where they fit, `fresh` draws them anew (as EVA's released code)."""
    checkpoint: str = "none"
    """A run's path, its name, its MLflow run id, `latest` (the newest finished one), or the path of one of its
    checkpoints: the model to evaluate, or the state that a training continues from (weights, optimizer, step, data)."""
    post_norm: float = 1.0
    """Initial weight of the branch norms of a post-norm tower that starts from scratch (0 in EVA-01's masked stage)."""
    std: PositiveFloat = 0.02
    """Standard deviation of the normal that a vision tower's weights are drawn from."""
    truncated: bool = False
    """Cut that normal at one standard deviation, and draw the patch embedding from it too (EVA-01's masked stage)."""
    text_mlp_bias: Literal["zero", "uniform"] = "zero"
    """Biases of a text tower's MLPs: zero, or uniform in 1 / sqrt(inputs) on both sides of it (EVA-CLIP)."""

    @property
    def scratch(self) -> set[str]:
        """Towers whose weights are drawn from the seed."""
        return {tower for tower in ("vision", "text") if getattr(self, tower) == "none"}


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section, prefix="eval."):
    """Zero-shot classification, retrieval and k-NN."""

    shards: str = ""
    """Test shards with images and captions or class labels; empty turns evaluation off."""
    weights: Weights = "last"
    """What is measured, while training too: the last weights or their moving average (`optim.ema`)."""
    sets: Annotated[dict[str, str], _AFTER_TRAINING] = field(default_factory=dict)
    """Several test sets for `w2s stage eval`, shards by name, in place of `shards`; metrics are called NAME/METRIC."""
    suite: Annotated[str, _AFTER_TRAINING] = ""
    """Test sets that are measured together, and the table that they fill, in place of `shards` and `sets`.

    `clip27`, `imagenet_robust`, `retrieval` or `video` of configs/suite, or a path that ends in .yaml. Its file says
    prompts, resizing and metrics.
    """
    root: str = ""
    """Folder with the folders of a suite's sets, in the layout of CLIP_benchmark's webdatasets."""
    class_key: str = "cls"
    """Extension of the class number in a sample; `classnames.txt` beside the shards has a name a line."""
    templates: Literal["none", "simple", "openai", "own"] = "none"
    """Prompts around a class name: none, open_clip's short list, its ImageNet list of 80, or each test set's own.

    `own` is the file zeroshot_classification_templates.txt beside classnames.txt: a prompt a line, {c} for the name.
    """
    resize: Literal["crop", "squash", "better"] = "crop"
    """Make a test image square by a centre `crop`, or `squash` the whole of it (the papers, for retrieval).

    `better`, for `w2s stage eval`, measures both and takes the better for each test set (the papers, for classes).
    """
    batch_size: PositiveInt = 256
    """Images or texts of one forward pass."""
    retrieval: bool = True
    """Measure image-text retrieval (recall at 1, 5 and 10, both ways)."""
    equal_captions: Literal["right", "wrong"] = "right"
    """Whether an image is a right answer to a caption that equals one of its own; CLIP_benchmark says `wrong`."""
    knn_shards: str = ""
    """Labelled shards that k-NN takes its neighbours from; empty leaves k-NN and the linear probe out.

    The sets of a suite have their own, in `train/` beside `test/`.
    """
    knn_k: PositiveInt = 20
    """Neighbours that vote."""
    linear_probe: bool = False
    """Train a linear classifier on the features of those shards too, and measure it on the test sets.

    In a suite it is what turns on k-NN, too.
    """
    baselines: bool = True
    """Measure k-NN of a random student and of the teacher too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.sets:
            require(is_name(name), f"eval.sets: '{name}' is not a name of a test set: use letters, digits, _ and -")

    @property
    def resizes(self) -> tuple[Resize, ...]:
        """How images are made square: in one way, or in all, of which the better counts."""
        return ("crop", "squash") if self.resize == "better" else (self.resize,)

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


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section, prefix="tracking."):
    """MLflow, console and pictures."""

    enabled: bool = True
    """Log to MLflow; the console, metrics.jsonl and report.html are always written."""
    uri: str = ""
    """Tracking URI; empty takes MLFLOW_TRACKING_URI, otherwise a sqlite file beside the runs."""
    experiment: str = "w2s"
    """MLflow experiment."""
    parent_run: str = ""
    """MLflow run that this stage is a child of; set by `w2s run`."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use to MLflow."""
    register: Annotated[str, _MAKES_A_CLIP, UselessWith("tracking.enabled", False)] = ""
    """Model of MLflow's registry that the finished CLIP becomes a new version of: exported, with a signature, for
    `mlflow.pyfunc` to embed images and texts. Empty registers nothing. For the clip and eval stages."""
    pictures: NonNegativeInt = 8
    """Images (masked stage) or classes (evaluation) in the pictures at the end of a stage; 0 draws none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not set(self.register) & set("/:"),
            f"tracking.register={self.register}: the name of a registered model has no / and no :, use another",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a stage is told."""

    stage: Literal["mim", "clip", "eval"] = "mim"
    """The stage."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
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

    @cached_property
    def teacher_losses(self) -> tuple[TeacherLoss, ...]:
        """What the student of the masked stage learns, of each of its teachers."""
        only = TeacherEntry(
            name=self.teacher.name,
            source=self.teacher.source,
            weights=self.teacher.weights,
            image_size=self.teacher.image_size,
            target_norm=self.teacher.target_norm,
        )
        return tuple(TeacherLoss.of(each, self.teacher, self.mim) for each in self.teachers.of or [only])

    @property
    def stage_teachers(self) -> tuple[TeacherConfig, ...]:
        """The teachers that the stage learns from; empty where it learns from none."""
        if self.stage == "mim":
            return tuple(teacher_loss.teacher for teacher_loss in self.teacher_losses)
        source = self.clip.distill.source if self.stage == "clip" else "none"
        if source == "none":
            return ()
        return (self.teacher if source == "teacher" else replace(self.teacher, source=source, name=source),)

    @property
    def teacher_steps(self) -> int:
        """The steps that have a teacher, unless the student passes it before."""
        if not self.stage_teachers:
            return 0
        return self.train.steps if self.stage == "mim" else self.clip.distill.last_step(self.train)
