"""How long a stage takes as a whole: its steps, and the checkpoints and evaluations between them.

A checkpoint holds training up while each rank copies its share to the host and, where it is not written in the
background (`checkpoint.async_save`), until it is on the disk. An evaluation encodes test images in batches that
data-parallel ranks share out (`encode_all`); reading them, texts and scores are left out.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from w2s.config.batching import model_parallel_size
from w2s.config.sections import Config
from w2s.data.shards.listing import list_shards
from w2s.data.shards.sizes import count_samples
from w2s.errors import UserError, W2SError
from w2s.planning.in_memory_costs import CHECKSUM_GBS
from w2s.planning.model.simulated_schedule import Passes, pipeline_of, seconds
from w2s.planning.model.teacher import predicted
from w2s.planning.model.towers import PlannedTower, planned_towers
from w2s.planning.plan import Plan
from w2s.planning.time.cards import GPUS_PER_NODE, Card
from w2s.planning.time.duration import teacher_seconds
from w2s.planning.time.layer_costs import layer_time


@dataclass(frozen=True)
class Images:
    """The images of an evaluation."""

    test: int
    """Of `eval.shards`; 0 turns evaluations off."""
    neighbours: int = 0
    """Of `eval.knn_shards`."""


@dataclass(frozen=True)
class Part:
    """A part of a run."""

    times: int
    seconds: float
    """Each time."""

    @property
    def days(self) -> float:
        """Of all times."""
        return self.times * self.seconds / 86_400


@dataclass(frozen=True)
class RunTime:
    """The parts of a run."""

    steps: Part
    checkpoints: Part
    evaluations: Part | None
    """None where nobody knows how many images there are."""

    @property
    def days(self) -> float:
        """The run, without interruptions."""
        return self.steps.days + self.checkpoints.days + (self.evaluations.days if self.evaluations else 0.0)


def run_time(plan: Plan, card: Card, images: Images | None) -> RunTime:
    """Plan a stage as a whole; without `images` it is not known what its evaluations take."""
    config, steps = plan.config, plan.config.train.steps
    trained, saved = Part(steps, 86_400 * plan.days / steps), Part(_saves(config), _save(plan, card))
    if images is None:
        return RunTime(trained, saved, None)
    return RunTime(trained, saved, Part(_evaluations(config) if images.test else 0, _evaluation(plan, card, images)))


def counted(config: Config, given: int) -> Images | None:
    """Return the images of an evaluation; None where their shards are not here, or nobody has counted them.

    Raises:
        UserError: the command line gives a number of test images for a run that evaluates nothing.
    """
    if not config.eval.shards:
        if given:
            raise UserError(f"--eval-images {given} without test shards: give eval.shards, or leave it out")
        return Images(0)
    if given:
        return Images(given, (config.eval.knn_shards and _size(config, "eval.knn_shards", config.eval.knn_shards)) or 0)
    sizes = [_size(config, key, shards) for key, shards in config.eval.by_key.items()]
    return None if None in sizes else Images(*(size or 0 for size in sizes))


def _size(config: Config, key: str, shards: str) -> int | None:
    try:
        return count_samples(list_shards(shards, key), Path(config.data.index))
    except W2SError:
        return None


def _saves(config: Config) -> int:
    keep, steps = config.checkpoint, config.train.steps
    return len({*range(keep.every, steps, keep.every), *(step for step in keep.keep_at if step < steps), steps})


def _save(plan: Plan, card: Card) -> float:
    """Seconds that training waits for a checkpoint; the ranks of a node write into shared storage together."""
    keep, written = plan.config.checkpoint, plan.written
    copied = written / (1e9 * card.pcie_gbs * card.estimates.pcie)
    on_host = plan.host.seconds if keep.memory else 0.0
    if keep.async_save:
        return on_host + copied
    of_node = min(GPUS_PER_NODE, plan.gpus) * written
    return on_host + copied + of_node / (1e9 * card.estimates.storage_gbs) + written / (1e9 * CHECKSUM_GBS)


def _evaluations(config: Config) -> int:
    """Before the first step, between steps, and after the last one."""
    train = config.train
    return 2 + ((train.steps - 1) // train.eval_every if train.eval_every else 0)


def _evaluation(plan: Plan, card: Card, images: Images) -> float:
    """In the masked stage, predictions of the test images beside the teacher's features, then features for k-NN."""
    config, size = plan.config, min(plan.config.eval.batch_size, max(1, images.test))
    whole = replace(config, clip=replace(config.clip, patch_dropout=0.0), data=replace(config.data, phases=[]))
    vision = planned_towers(whole, **predicted(config, plan.teachers))[0]
    masked = config.stage == "mim"
    rounds = tests = _rounds(images.test, size, plan.data_size)
    if images.neighbours and masked:
        rounds += tests + _rounds(images.neighbours, size, plan.data_size)
    targets = tests * math.ceil(size / model_parallel_size(config.parallel)) if masked else 0
    with_teachers = sum(teacher_seconds(card, teacher, targets) for teacher in plan.teachers)
    return rounds * _batch(config, card, vision, size) + with_teachers


def _rounds(images: int, size: int, ranks: int) -> int:
    """Batches that a rank encodes."""
    return math.ceil(math.ceil(images / size) / ranks)


def _batch(config: Config, card: Card, tower: PlannedTower, images: int) -> float:
    """Seconds of a batch in all layers, in as many micro-batches as keep a pipeline busy (`infer`), without FP8."""
    parallel = config.parallel
    count = parallel.micro_batch_group or parallel.pipeline
    layer = layer_time(card, tower, parallel, math.ceil(images / count), fp8=0.0, fused=False).forward.total
    stages = range(parallel.pipeline)
    forward = tuple(tuple(layer * layers for layers in tower.split[stage :: parallel.pipeline]) for stage in stages)
    return seconds(pipeline_of(parallel, count), Passes(forward))
