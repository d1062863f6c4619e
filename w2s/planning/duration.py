"""Predicted seconds of a training step, by part, on the slowest rank of the pipeline.

What a pipeline makes of its ranks' passes, and how much of what data-parallel ranks exchange hides behind them, is
simulated (`simulated_schedule.py`). Reading and decoding images is taken to be hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from w2s.config.batching import (
    data_parallel_size,
    micro_batch_size,
    model_parallel_size,
    num_micro_batches,
    num_passes,
    ranks_per_stage,
    samples_per_replica,
)
from w2s.config.sections import Config
from w2s.planning import fully_sharded_costs
from w2s.planning.activations import local_tokens
from w2s.planning.cards import Card
from w2s.planning.flops import loss_flops, patch_width, recomputed_layers
from w2s.planning.layer_costs import Work, layer_time
from w2s.planning.memory import fp8_share, sample_bytes
from w2s.planning.roofline import exchange, message, moving
from w2s.planning.simulated_schedule import Chunks, Passes, pipeline_of, seconds
from w2s.planning.states import States
from w2s.planning.teacher import PlannedTeacher, images_of_rank, predicted
from w2s.planning.towers import PlannedTower

_BF16, _FP32 = 2, 4
UPDATE = {"adamw": 46, "lamb": 134}
"""Bytes that an update reads and writes for a parameter of a rank's share: norm of the gradient and clipping (12), the
fused AdamW (28) or LAMB's operators one by one (116), the weight in bfloat16 (6)."""
_AVERAGING = 12
"""Bytes that a moving average reads and writes for a parameter: the average twice, the master weight."""
_MOST = 0.9
LOSS_READS = 20
"""Reads and writes of a tile of logits in w2s/objectives: exponentials, sums and products in place, about."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; `WORDS` says what each is."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    launches: float = 0.0
    tensor: float = 0.0
    recomputation: float = 0.0
    second_pass: float = 0.0
    bubble: float = 0.0
    pipeline: float = 0.0
    accumulation: float = 0.0
    data: float = 0.0
    teacher: float = 0.0
    loss: float = 0.0
    optimizer: float = 0.0
    batch: float = 0.0

    @property
    def total(self) -> float:
        """The step."""
        return sum(vars(self).values())

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(vars(self), key=vars(self).__getitem__)


WORDS = {
    "products": "matrix products of the towers",
    "attention": "attention",
    "elementwise": "norms, activations and residuals",
    "launches": "kernel launches",
    "tensor": "communication of tensor-parallel ranks",
    "recomputation": "recomputed layers",
    "second_pass": "the second forward pass",
    "bubble": "the pipeline's bubble",
    "pipeline": "messages of the pipeline",
    "accumulation": "accumulation of gradients",
    "data": "communication of data-parallel ranks",
    "teacher": "the teacher",
    "loss": "the contrastive loss",
    "optimizer": "the optimizer",
    "batch": "exchange of the batch",
}
"""The parts in words."""


class StepModel:
    """The seconds of a step in bfloat16, or FP8 where the configuration says so.

    Args:
        config: the stage of training.
        card: the GPUs.
        towers: the towers of the stage.
        teachers: its teachers.
        states: of the rank that holds most.
        world_size: GPUs in all.
    """

    def __init__(
        self,
        config: Config,
        card: Card,
        towers: Sequence[PlannedTower],
        teachers: Sequence[PlannedTeacher],
        states: States,
        world_size: int,
    ) -> None:
        self._runs = [_Run(config, card, tower, world_size) for tower in towers]
        self._twice = num_passes(config, num_micro_batches(config, world_size)) == 2
        work = Work()
        for run in self._runs:
            work += run.work * run.count
        self._alone = StepTime(
            products=work.products,
            attention=work.attention,
            elementwise=work.elementwise,
            launches=work.launches,
            tensor=work.tensor,
            recomputation=sum(run.count * run.recomputed for run in self._runs),
            accumulation=moving(card, states.gradients) + sum(run.count * run.accumulated for run in self._runs),
            teacher=sum(
                teacher_seconds(card, teacher, images)
                for teacher, images in zip(teachers, images_of_rank(config, teachers, world_size), strict=True)
            ),
            loss=_loss(config, card, teachers, world_size) if config.stage == "clip" else 0.0,
            optimizer=moving(card, UPDATE[config.optim.name] * states.optimizer / 12 + _AVERAGING * states.average / 4),
            batch=_batch(config, card, teachers, world_size),
        )

    @property
    def least(self) -> float:
        """Seconds below which the step is not, without a simulation: with most of the bubble of an even pipeline."""
        forward = sum(run.forward for run in self._runs) if self._twice else 0.0
        return self._alone.total + forward + _MOST * sum(run.bubble for run in self._runs)

    def time(self) -> StepTime:
        """Return the parts, of which those that the pipeline makes are simulated."""
        trained = [run.trained(gathers=not self._twice) for run in self._runs]
        first_passes = [run.seen() for run in self._runs] if self._twice else []
        return replace(
            self._alone,
            second_pass=sum(each.busy + each.bubble for each in first_passes),
            bubble=sum(each.bubble for each in trained),
            pipeline=sum(each.messages for each in (*trained, *first_passes)),
            data=sum(each.data for each in (*trained, *first_passes)),
        )


@dataclass(frozen=True)
class _Taken:
    """Seconds of the passes of a tower through its pipeline."""

    busy: float
    """Of the rank that computes longest."""
    bubble: float
    """In which it waits for others that compute."""
    messages: float
    """By which messages between stages delay it."""
    data: float
    """In which weights are gathered, or gradients reduced, beside no computing."""


class _Run:
    """A tower's passes: a micro-batch's seconds on the rank that takes longest, and what all ranks together take.

    Attributes:
        count: micro-batches.
        work: forward and backward pass of a micro-batch.
        recomputed: what of its forward pass is recomputed.
        accumulated: adding its gradients up, where the products do not.
        forward: forward passes of all micro-batches.
        bubble: in which ranks of a pipeline of even stages wait for each other.
    """

    def __init__(self, config: Config, card: Card, tower: PlannedTower, world_size: int) -> None:
        parallel, samples = config.parallel, micro_batch_size(config, world_size)
        self._parallel, self._card, self._tower = parallel, card, tower
        self.count = num_micro_batches(config, world_size)
        self._pipeline = pipeline_of(parallel, self.count)
        fused = fuses(config, card)
        self._layer = layer_time(card, tower, parallel, samples, fp8_share(config, tower), fused)
        self._ends = _ends(card, tower, samples, len(tower.split))
        sizes = _chunk_sizes(tower, parallel.tensor)
        linears = tower.linear_weights(parallel.tensor)
        gradient = _gradient_bytes(config)
        added = [size - fused * layers * linears for size, layers in zip(sizes, tower.split, strict=True)]
        self._added = [moving(card, (_BF16 + 2 * gradient) * each) for each in added]
        self._exchange = _Exchange(config, card, world_size, sizes)
        sent = _BF16 * local_tokens(tower, parallel, samples) * tower.width
        self._message = message(card, sent, ranks_per_stage(parallel, world_size)) if parallel.pipeline > 1 else 0.0
        self._again = [self._layer.forward.total * recomputed_layers(parallel, layers) for layers in tower.split]
        self._forward, self._backward = self._forwards(), self._backwards()
        both = [forward + backward for forward, backward in zip(self._forward, self._backward, strict=True)]
        turns = [sum(chunks) for chunks in self._chunks(both)]
        own = slice(turns.index(max(turns)), None, parallel.pipeline)
        layer = self._layer.forward + self._layer.backward
        parts = zip(tower.split[own], self._ends[own], strict=True)
        self.work = sum((layer * layers + ends for layers, ends in parts), Work())
        self.recomputed, self.accumulated = sum(self._again[own]), sum(self._added[own])
        self.forward = self.count * sum(self._forward[own])
        turn = self.work.total + self.recomputed + self.accumulated
        self.bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline * turn

    def trained(self, gathers: bool) -> _Taken:
        """Return what forward and backward passes take; `gathers` says whether they are the first with new weights."""
        if self._parallel.shard == "full":
            return self._fully_sharded(backward=True)
        exchanged = replace(self._exchange, new_weights=gathers)
        return self._taken(self._chunks(self._forward), self._chunks(self._backward), exchanged)

    def seen(self) -> _Taken:
        """Return what forward passes alone take, which are the first with new weights."""
        if self._parallel.shard == "full":
            return self._fully_sharded(backward=False)
        return self._taken(self._chunks(self._forward), (), replace(self._exchange, gradients=False))

    def _fully_sharded(self, backward: bool) -> _Taken:
        """The same where weights are gathered layer by layer, with what is outside of layers before and after all."""
        layers, ends, exchange = self._tower.layers, self._ends[0].total, self._exchange
        forwards = self._layer.forward.total
        backwards = (self._backward[0] - 2 / 3 * ends) / layers if backward else 0.0
        part = self._tower.layer_elements / exchange.sizes[0]
        gather, reduce = exchange.gather[0], exchange.reduce[0]
        delay = fully_sharded_costs.exposed(
            layers, self.count, forwards, backwards, part * gather, part * reduce, ahead=2
        )
        outside = (1 - layers * part) * (gather + backward * self.count * reduce)
        busy = self.count * (layers * (forwards + backwards) + ends * (1 if backward else 1 / 3))
        return _Taken(busy, 0.0, 0.0, delay + outside)

    def _taken(self, forward: Chunks, backward: Chunks, exchange: "_Exchange") -> _Taken:
        both = zip(forward, backward or ((0.0,),) * len(forward), strict=True)
        busy = self.count * max(sum(one) + sum(other) for one, other in both)
        bare = Passes(forward, backward)
        sending = replace(bare, message=self._message)
        whole = replace(
            sending,
            gather=self._chunks(exchange.gather) if exchange.gathers else (),
            reduce=self._chunks(exchange.reduce) if exchange.reduces else (),
            buckets=self._chunks(exchange.buckets),
        )
        times = [seconds(self._pipeline, each) for each in (bare, sending, whole)]
        return _Taken(busy, times[0] - busy, times[1] - times[0], times[2] - times[1] + exchange.unhidden)

    def _chunks(self, figures: Sequence[float]) -> Chunks:
        """The figures of all virtual stages by rank and chunk."""
        stages = self._parallel.pipeline
        return tuple(tuple(figures[stage::stages]) for stage in range(stages))

    def _forwards(self) -> list[float]:
        """Seconds of a micro-batch's forward pass through each virtual stage."""
        layer = self._layer.forward.total
        return [layer * layers + ends.total / 3 for layers, ends in zip(self._tower.split, self._ends, strict=True)]

    def _backwards(self) -> list[float]:
        """The same of its backward pass."""
        layer = self._layer.backward.total
        parts = zip(self._tower.split, self._ends, self._again, self._added, strict=True)
        return [layer * layers + 2 / 3 * ends.total + again + added for layers, ends, again, added in parts]


@dataclass(frozen=True)
class _Exchange:
    """What data-parallel ranks exchange of a tower's chunks in its passes."""

    config: Config
    card: Card
    world_size: int
    sizes: Sequence[int]
    """Parameters of each virtual stage on a rank."""
    new_weights: bool = True
    """Whether weights have to be gathered before the passes."""
    gradients: bool = True
    """Whether gradients have to be reduced after them."""

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered beside the passes."""
        return self.new_weights and self.config.parallel.overlap_param_gather

    @property
    def reduces(self) -> bool:
        """Whether gradients are reduced beside the passes."""
        return self.gradients and self.config.parallel.overlap_grad_reduce

    @property
    def unhidden(self) -> float:
        """Seconds of what is exchanged before or after the passes."""
        before, after = self.new_weights and not self.gathers, self.gradients and not self.reduces
        seconds = sum(before * one + after * other for one, other in zip(self.gather, self.reduce, strict=True))
        return seconds / self.config.parallel.pipeline

    @property
    def gather(self) -> list[float]:
        """Seconds of the weights of each chunk."""
        width = 1 if self.config.precision.fp8_primary_weights else _BF16
        return [self._seconds(width * size) for size in self.sizes]

    @property
    def reduce(self) -> list[float]:
        """Seconds of the gradients of each chunk."""
        return [self._seconds(_gradient_bytes(self.config) * size) for size in self.sizes]

    @property
    def buckets(self) -> list[float]:
        """Parts of each chunk: Megatron splits the first one of the first stage alone."""
        first = math.ceil(self.sizes[0] / max(40_000_000, 1_000_000 * self._replicas))
        return [first, *(1 for _ in self.sizes[1:])]

    @property
    def _replicas(self) -> int:
        return data_parallel_size(self.config.parallel, self.world_size)

    def _seconds(self, count: float) -> float:
        return exchange(self.card, count, self._replicas, self.config.parallel.tensor)


@cache
def _chunk_sizes(tower: PlannedTower, tensor: int) -> tuple[int, ...]:
    """Parameters of each chunk on one tensor-parallel rank."""
    return tuple(sum(tower.chunk(stage, tensor, with_logit_parameters=False)) for stage in range(len(tower.split)))


def _ends(card: Card, tower: PlannedTower, samples: int, stages: int) -> list[Work]:
    """Forward and backward pass of the embedding on the first stage and of the head on the last."""
    rate = card.bf16_gemm * 1e12
    ends = [Work() for _ in range(stages)]
    ends[0] += Work(products=2 * samples * tower.flops.embedding / rate)
    ends[-1] += Work(products=3 * samples * tower.flops.head / rate)
    return ends


def _gradient_bytes(config: Config) -> int:
    return _FP32 if config.precision.gradients == "fp32" else _BF16


def fuses(config: Config, card: Card) -> bool:
    """Whether products add gradients of weights up themselves, as Transformer Engine's do."""
    return config.precision.linear == "te" or (config.precision.linear == "auto" and card.fp8_tflops > 0)


def teacher_seconds(card: Card, teacher: PlannedTeacher, images: float) -> float:
    """Return the seconds of a teacher's forward pass over the images of one rank."""
    operations = images * teacher.flops
    if teacher.precision == "bf16":
        return operations / (card.bf16_gemm * 1e12 * card.estimates.teacher)
    return operations / (card.fp32_tflops * 1e12 * card.estimates.fp32)


def _loss(config: Config, card: Card, teachers: Sequence[PlannedTeacher], world_size: int) -> float:
    """Products in float32, passes over the tiles, and the exchange of the captions' features and gradients."""
    samples, parallel = samples_per_replica(config, world_size), config.parallel
    operations = loss_flops(config, patch_width(predicted(config, teachers)["targets"])).hardware
    products = samples * operations / (card.fp32_tflops * 1e12 * card.estimates.fp32)
    tiles = moving(card, LOSS_READS * _FP32 * samples * config.train.global_batch)
    features = _FP32 * config.train.global_batch * config.model.embed_dim
    size = data_parallel_size(parallel, world_size)
    return products + tiles + 2 * exchange(card, features, size, parallel.tensor)


def _batch(config: Config, card: Card, teachers: Sequence[PlannedTeacher], world_size: int) -> float:
    """What the ranks of a model-parallel group give each other of the samples that each has read."""
    parallel, sent = config.parallel, samples_per_replica(config, world_size) * sample_bytes(config, teachers)
    stride = 1 if parallel.pipeline == 1 else ranks_per_stage(parallel, world_size)
    return exchange(card, sent, model_parallel_size(parallel), stride)
