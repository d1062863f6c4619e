"""Bytes on a rank at the fullest moment of a step, by part.

States are exact and activations within 10 % (tests/planning); what the loss, the teacher and the buffers need are the
sums of their largest tensors. All of it is beside what the rehearsal counts (docs/plan.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from w2s.config.precision import bf16_layers
from w2s.config.sections import Config
from w2s.planning.memory.activations import Types, kept_going_back, peak
from w2s.planning.memory.fully_sharded_costs import Whole, whole
from w2s.planning.memory.planned_stage import PlannedStage
from w2s.planning.memory.states import States
from w2s.planning.model.flops import frames_per_sample, patch_width
from w2s.planning.model.teacher import PlannedTeacher
from w2s.planning.model.towers import PlannedTower

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights."""
    teacher: int
    """Its weights, and what its forward pass needs while it runs."""
    batch: int
    """Samples, and what the teacher says of them."""
    activations: int = 0
    """Kept for the backward pass."""
    loss: int = 0
    """Features, their gradients and logits of the contrastive loss; predictions of the masked loss in float32."""
    buffers: int = 0
    """Temporaries of the backward pass or of the optimizer."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(vars(self).values())


def rank_memory(stage: PlannedStage, states: States, pipeline_rank: int) -> Memory:
    """Return the bytes on a rank with some states, at its place in the pipeline, in bfloat16 on a GPU."""
    config, towers, samples = stage.config, stage.towers, stage.micro_batch
    standing = Memory(
        weights=states.weights + sum(_fp8_weights(config, tower, pipeline_rank) for tower in towers),
        gradients=states.gradients,
        optimizer=states.optimizer,
        average=states.average,
        teacher=sum(_teacher_weights(config, each) for each in stage.teachers),
        batch=stage.replica_samples * sample_bytes(stage),
    )
    kept = [
        peak(
            tower,
            config.parallel,
            on_gpu(config, tower),
            samples=samples,
            micro_batches=stage.micro_batches,
            stage=pipeline_rank,
        )
        for tower in towers
    ]
    is_last = pipeline_rank == config.parallel.pipeline - 1
    has_loss = config.stage == "clip" and is_last
    activations = max(kept) if stage.two_pass else sum(kept)
    features = _features(config, stage.replica_samples) if has_loss else 0
    back = replace(
        standing,
        activations=activations,
        loss=features,
        buffers=max(_temporaries(config, tower, samples) for tower in towers),
    )
    wholes = [whole(tower, config.precision, stage.gpus) for tower in towers] if stage.fully_sharded else []
    beginning = replace(standing, weights=standing.weights + sum(each.weights for each in wholes))
    moments = [
        _with_teacher(beginning, stage),
        replace(beginning, batch=(1 if stage.model_size == 1 else 3) * standing.batch),
        *(_sharded_backward(back, stage, wholes) if wholes else [back]),
        replace(standing, buffers=_update(config, states)),
    ]
    if config.stage == "mim" and is_last:
        moments.append(replace(back, buffers=0, loss=samples * _masked_losses(stage)))
    if has_loss:
        loss = features + _tiles(stage)
        moments.append(replace(standing, activations=0 if stage.two_pass else activations, loss=loss))
    return max(moments, key=lambda moment: moment.total)


def _sharded_backward(forward: Memory, stage: PlannedStage, wholes: Sequence[Whole]) -> Iterator[Memory]:
    """The backward passes of towers that are fully sharded.

    Activations go layer by layer, while gradients of the layers before wait to be reduced. Where both towers are in one
    pass, the last one goes back first, and its last gradients wait until the pass has ended.
    """
    config, towers, one_pass = stage.config, stage.towers, not stage.two_pass
    samples, hidden = config.train.micro_batch, 2 if config.parallel.recompute == "selective" else 1

    def kept(tower: PlannedTower, done: int) -> int:
        return kept_going_back(tower, config.parallel, on_gpu(config, tower), samples=samples, done=done)

    for index, (tower, gathered) in enumerate(zip(towers, wholes, strict=True)):
        others = sum(kept(each, 0) for each in towers[:index]) if one_pass else 0
        waiting = sum(each.waiting * each.gradients for each in wholes[index + 1 :]) if one_pass else 0
        for done in range(gathered.waiting):
            yield replace(
                forward,
                weights=forward.weights + gathered.weights,
                gradients=forward.gradients + waiting + (done + 1) * gathered.gradients,
                activations=others + kept(tower, done),
                buffers=_temporaries(config, tower, samples, hidden),
            )


def on_gpu(config: Config, tower: PlannedTower) -> Types:
    """Bytes of an element in bfloat16, with norms that are one kernel, and how much of a tower is in FP8."""
    return Types(value=_BF16, rms=_BF16, fp8=fp8_share(config, tower))


def fp8_share(config: Config, tower: PlannedTower) -> float:
    """Fraction of a tower's layers that multiply in FP8."""
    if config.precision.fp8 == "none":
        return 0.0
    return 1 - len(bf16_layers(config.precision, tower.name, tower.layers)) / tower.layers


def _fp8_weights(config: Config, tower: PlannedTower, pipeline_rank: int) -> int:
    """FP8 copies of the layers' weights, as they are and transposed; primary FP8 weights are these and nothing else."""
    if config.precision.fp8_primary_weights:
        return 0
    layers = tower.layers_of(pipeline_rank, config.parallel.pipeline)
    return int(2 * fp8_share(config, tower) * layers * tower.linear_weights(config.parallel.tensor))


def _temporaries(config: Config, tower: PlannedTower, samples: int, hidden: int = 2) -> int:
    """The largest tensors of a backward pass that nothing keeps.

    Gradients of the MLP's hidden activations before and after the GELU, of its input and output (with all tokens, where
    sequence parallelism gathers them) and of its larger weight matrix. The gradient before the GELU takes the place of
    the GELU's output, if that is kept: then there is one beside what is kept (`hidden`).
    """
    parallel, num_tokens = config.parallel, samples * tower.tokens
    width = tower.mlp_width // parallel.tensor
    backward = hidden * num_tokens * width + 2 * num_tokens * tower.width + tower.width * width
    return _BF16 * backward


def _update(config: Config, states: States) -> int:
    """What the optimizer needs during its update beside its states, 12 bytes a parameter of this rank's share.

    LAMB makes its updates first; gradients in bfloat16 are turned into float32.
    """
    copies = (config.optim.name == "lamb") + (config.precision.gradients == "bf16")
    return copies * _FP32 * states.optimizer // 12


def _with_teacher(standing: Memory, stage: PlannedStage) -> Memory:
    """While the last teacher embeds its images; of the features of all patches some are picked afterwards."""
    if not stage.teachers:
        return standing
    config, samples = stage.config, stage.replica_samples
    patches = config.model.vision.patches if config.stage == "mim" else 0
    features = _target_bytes(stage, patches)
    pixels = 3 * frames_per_sample(config) * sum(side**2 for side in {teacher.image_size for teacher in stage.teachers})
    batch = stage.rank_samples * (features + pixels)
    if stage.draws_teachers:
        # All ranks of the group have all its images, and then all targets.
        gathering = 3 * samples * (3 * config.model.vision.image_size**2 + pixels)
        batch = max(gathering, samples * (pixels + sample_bytes(stage)) + stage.rank_samples * features)
    working = max(teacher.working for teacher in stage.teachers)
    return replace(standing, teacher=standing.teacher + stage.micro_batch * working, batch=batch)


def sample_bytes(stage: PlannedStage) -> int:
    """A sample as the ranks of a model-parallel group exchange it: pixels, and the targets that its teachers give."""
    pixels = 3 * frames_per_sample(stage.config) * stage.config.model.vision.image_size**2
    return pixels + _target_bytes(stage, stage.predicted_features)


def _target_bytes(stage: PlannedStage, features: int) -> int:
    """What teachers give of an image, at so many patches, and of the whole of it."""
    layer_width = stage.teachers[0].layer_width if stage.teachers else 0
    width = patch_width(stage.targets) + len(stage.config.mim.layers) * layer_width
    return _FP32 * (features * width + sum(target.summary_width for target in stage.targets))


def _teacher_weights(config: Config, teacher: PlannedTeacher) -> int:
    """They are whole on every rank, unless `teacher.sharded` splits the vision tower over tensor-parallel ranks."""
    return teacher.weights // (config.parallel.tensor if config.teacher.sharded else 1) + teacher.text_weights


def _features(config: Config, samples: int) -> int:
    """Local features in bfloat16, and four times in float32: as leaves, normalised, and the gradients of both."""
    return 2 * samples * config.model.embed_dim * (_BF16 + 4 * _FP32)


def _masked_losses(stage: PlannedStage) -> int:
    """Bytes of a sample, in float32, as the backward pass begins.

    Predictions are kept, for cosines normalised ones and targets too. Cosines, which are reported beside other losses,
    have four tensors of that size for a while.
    """
    sizes = [_FP32 * stage.predicted_features * target.width for target in stage.targets]
    losses = stage.config.teacher_losses[: len(sizes)]
    kept = [1 + (teacher_loss.loss == "cosine") for teacher_loss in losses]
    return sum(size * times for size, times in zip(sizes, kept, strict=True)) + 4 * max(sizes, default=0)


def _tiles(stage: PlannedStage) -> int:
    """The tensors of w2s/objectives/tiles.py, in float32.

    Captions of all ranks and their gradient, and three tiles of logits. Affinities keep gradients of their own and the
    teacher's captions of all ranks, and have nine tiles at a time.
    """
    config, samples = stage.config, stage.replica_samples
    width, tile, batch = config.model.embed_dim, min(config.clip.tile, samples), config.train.global_batch
    gathered, tiles, affinities = 2 * _FP32 * batch * width, 3, 0
    for teacher in stage.teachers if config.clip.distill.kind != "feature" else ():
        tiles, affinities = 9, _FP32 * (2 * samples * width + batch * (2 * width + teacher.width))
    return gathered + affinities + tiles * _FP32 * tile * config.clip.tile
