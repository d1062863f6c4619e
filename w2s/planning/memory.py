"""Bytes on a rank at the fullest moment of a step, by part.

States are exact and activations within 10 % (tests/planning); what the loss, the teacher and the buffers need are the
sums of their largest tensors. All of it is beside what the rehearsal counts (docs/rehearse.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from w2s.config.batching import (
    micro_batch_size,
    model_parallel_size,
    num_micro_batches,
    num_passes,
    samples_per_rank,
    samples_per_replica,
)
from w2s.config.linear_choice import bf16_layers
from w2s.config.sections import Config
from w2s.planning.activations import Types, kept_going_back, peak
from w2s.planning.flops import patch_width, seen_frames
from w2s.planning.fully_sharded_costs import Whole, whole
from w2s.planning.states import States
from w2s.planning.teacher import PlannedTeacher, drawn, predicted
from w2s.planning.towers import PlannedTower

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


def rank_memory(
    config: Config,
    towers: Sequence[PlannedTower],
    teachers: Sequence[PlannedTeacher],
    states: States,
    world_size: int,
    stage: int,
) -> Memory:
    """Return the bytes on a rank of a pipeline stage, in bfloat16 on a GPU.

    Args:
        config: the stage of training.
        towers: its towers.
        teachers: its teachers.
        states: the rank's.
        world_size: ranks in all.
        stage: rank in the pipeline.
    """
    own, samples = samples_per_replica(config, world_size), micro_batch_size(config, world_size)
    count = num_micro_batches(config, world_size)
    standing = Memory(
        weights=states.weights + sum(_fp8_weights(config, tower, stage) for tower in towers),
        gradients=states.gradients,
        optimizer=states.optimizer,
        average=states.average,
        teacher=sum(_teacher_weights(config, each) for each in teachers),
        batch=own * sample_bytes(config, teachers),
    )
    kept = [
        peak(tower, config.parallel, on_gpu(config, tower), samples=samples, micro_batches=count, stage=stage)
        for tower in towers
    ]
    twice, has_loss = num_passes(config, count) == 2, config.stage == "clip" and _is_last(config, stage)
    activations = max(kept) if twice else sum(kept)
    features = _features(config, own) if has_loss else 0
    back = replace(
        standing,
        activations=activations,
        loss=features,
        buffers=max(_temporaries(config, tower, samples) for tower in towers),
    )
    sharded = towers if config.parallel.shard == "full" else ()
    wholes = [whole(tower, config.precision, world_size) for tower in sharded]
    beginning = replace(standing, weights=standing.weights + sum(each.weights for each in wholes))
    moments = [
        _teaching(beginning, config, teachers, samples, world_size),
        replace(beginning, batch=(1 if model_parallel_size(config.parallel) == 1 else 3) * standing.batch),
        *(_going_back(back, config, towers, wholes, one_pass=not twice) if wholes else [back]),
        replace(standing, buffers=_update(config, states)),
    ]
    if config.stage == "mim" and _is_last(config, stage):
        moments.append(replace(back, buffers=0, loss=samples * _masked_losses(config, teachers)))
    if has_loss:
        tiles = _tiles(config, teachers, own)
        moments.append(replace(standing, activations=0 if twice else activations, loss=features + tiles))
    return max(moments, key=lambda moment: moment.total)


def _going_back(
    forward: Memory, config: Config, towers: Sequence[PlannedTower], wholes: Sequence[Whole], one_pass: bool
) -> Iterator[Memory]:
    """The backward passes of towers that are fully sharded.

    Activations go layer by layer, while gradients of the layers before wait to be reduced. Where both towers are in one
    pass, the last one goes back first, and its last gradients wait until the pass has ended.
    """
    samples, hidden = config.train.micro_batch, 2 if config.parallel.recompute == "selective" else 1

    def kept(tower: PlannedTower, done: int) -> int:
        return kept_going_back(tower, config.parallel, on_gpu(config, tower), samples=samples, done=done)

    for number, (tower, own) in enumerate(zip(towers, wholes, strict=True)):
        others = sum(kept(each, 0) for each in towers[:number]) if one_pass else 0
        waiting = sum(each.waiting * each.gradients for each in wholes[number + 1 :]) if one_pass else 0
        for done in range(own.waiting):
            yield replace(
                forward,
                weights=forward.weights + own.weights,
                gradients=forward.gradients + waiting + (done + 1) * own.gradients,
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


def _is_last(config: Config, stage: int) -> bool:
    return stage == config.parallel.pipeline - 1


def _fp8_weights(config: Config, tower: PlannedTower, stage: int) -> int:
    """FP8 copies of the layers' weights, as they are and transposed; primary FP8 weights are these and nothing else."""
    if config.precision.fp8_primary_weights:
        return 0
    layers = tower.layers_of(stage, config.parallel.pipeline)
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


def _teaching(
    standing: Memory, config: Config, teachers: Sequence[PlannedTeacher], samples: int, world_size: int
) -> Memory:
    """While the last teacher sees its images; of the features of all patches some are picked afterwards."""
    if not teachers:
        return standing
    patches = config.model.vision.patches if config.stage == "mim" else 0
    features = _targets(config, teachers, patches)
    pixels = 3 * seen_frames(config) * sum(side**2 for side in {teacher.image_size for teacher in teachers})
    own = samples_per_rank(config, world_size)
    batch = own * (features + pixels)
    if drawn(teachers) and model_parallel_size(config.parallel) > 1:
        # All ranks of the group have all its images, and then all targets.
        group, student_pixels = samples_per_replica(config, world_size), 3 * config.model.vision.image_size**2
        gathering = 3 * group * (student_pixels + pixels)
        batch = max(gathering, group * (pixels + sample_bytes(config, teachers)) + own * features)
    working = max(teacher.working for teacher in teachers)
    return replace(standing, teacher=standing.teacher + samples * working, batch=batch)


def sample_bytes(config: Config, teachers: Sequence[PlannedTeacher]) -> int:
    """A sample as the ranks of a model-parallel group exchange it: pixels, and what its teachers say of it.

    That is a feature for each patch to predict, or in the contrastive stage the embeddings of image and caption.
    """
    features = config.mim.predicted(config.model.vision.patches) if config.stage == "mim" else 2
    return 3 * seen_frames(config) * config.model.vision.image_size**2 + _targets(config, teachers, features)


def _targets(config: Config, teachers: Sequence[PlannedTeacher], features: int) -> int:
    """What teachers say of an image, at so many patches, and of the whole of it."""
    said = predicted(config, teachers)
    width = patch_width(said["targets"]) + len(config.mim.layers) * said["layer_width"]
    return _FP32 * (features * width + sum(target.summary_width for target in said["targets"]))


def _teacher_weights(config: Config, teacher: PlannedTeacher) -> int:
    """They are whole on every rank, unless `teacher.sharded` splits the vision tower over tensor-parallel ranks."""
    return teacher.weights // (config.parallel.tensor if config.teacher.sharded else 1) + teacher.text_weights


def _features(config: Config, own: int) -> int:
    """Own features in bfloat16, and four times in float32: as leaves, normalised, and the gradients of both."""
    return 2 * own * config.model.embed_dim * (_BF16 + 4 * _FP32)


def _masked_losses(config: Config, teachers: Sequence[PlannedTeacher]) -> int:
    """Bytes of a sample, in float32, as the backward pass begins.

    Predictions are kept, for cosines normalised ones and targets too. Cosines, which are reported beside other losses,
    have four tensors of that size for a while.
    """
    patches = config.mim.predicted(config.model.vision.patches)
    sizes = [_FP32 * patches * target.width for target in predicted(config, teachers)["targets"]]
    kept = [1 + (teacher_loss.loss == "cosine") for teacher_loss in config.teacher_losses[: len(sizes)]]
    return sum(size * times for size, times in zip(sizes, kept, strict=True)) + 4 * max(sizes, default=0)


def _tiles(config: Config, teachers: Sequence[PlannedTeacher], own: int) -> int:
    """The tensors of w2s/objectives/tiles.py, in float32.

    Captions of all ranks and their gradient, and three tiles of logits. Affinities keep gradients of their own and the
    teacher's captions of all ranks, and have nine tiles at a time.
    """
    width, tile = config.model.embed_dim, min(config.clip.tile, own)
    everyone, tiles, again = 2 * _FP32 * config.train.global_batch * width, 3, 0
    for teacher in teachers if config.clip.distill.kind != "feature" else ():
        tiles, again = 9, _FP32 * (2 * own * width + config.train.global_batch * (2 * width + teacher.width))
    return everyone + again + tiles * _FP32 * tile * config.clip.tile
