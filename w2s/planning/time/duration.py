"""Predicted seconds of a training step, by part, on the slowest rank of the pipeline.

What a pipeline makes of its ranks' passes, and how much of what data-parallel ranks exchange hides behind them, is
simulated (`simulated_schedule.py`). Reading and decoding images is taken to be hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from w2s.config.batching import ranks_per_stage
from w2s.config.sections import Config
from w2s.planning.memory import fully_sharded_costs
from w2s.planning.memory.activations import local_tokens
from w2s.planning.memory.planned_stage import PlannedStage
from w2s.planning.memory.rank_memory import fp8_share, sample_bytes
from w2s.planning.memory.states import States
from w2s.planning.model.flops import loss_flops, patch_width, recomputed_layers
from w2s.planning.model.simulated_schedule import Chunks, Passes, pipeline_of, seconds
from w2s.planning.model.teacher import PlannedTeacher, images_of_rank
from w2s.planning.model.towers import PlannedTower
from w2s.planning.time.cards import Card
from w2s.planning.time.layer_costs import Work, layer_time
from w2s.planning.time.roofline import exchange, message, moving

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
    """The seconds of a step in bfloat16, or FP8 where the configuration says so; `states` are those of a rank."""

    def __init__(self, stage: PlannedStage, card: Card, states: States) -> None:
        self._passes = [_TowerPasses(stage, card, tower) for tower in stage.towers]
        self._two_pass = stage.two_pass
        work, count = Work(), stage.micro_batches
        for passes in self._passes:
            work += passes.work * count
        accumulated = sum(count * passes.accumulated for passes in self._passes)
        teachers = zip(stage.teachers, images_of_rank(stage.config, stage.teachers, stage.gpus), strict=True)
        moved = UPDATE[stage.config.optim.name] * states.optimizer / 12 + _AVERAGING * states.average / 4
        self._alone = StepTime(
            **vars(work),
            recomputation=sum(count * passes.recomputed for passes in self._passes),
            accumulation=moving(card, states.gradients) + accumulated,
            teacher=sum(teacher_seconds(card, teacher, images) for teacher, images in teachers),
            loss=_loss(stage, card) if stage.config.stage == "clip" else 0.0,
            optimizer=moving(card, moved),
            batch=_batch(stage, card),
        )

    @property
    def least(self) -> float:
        """Seconds below which the step is not, without a simulation: with most of the bubble of an even pipeline."""
        forward = sum(passes.forward for passes in self._passes) if self._two_pass else 0.0
        return self._alone.total + forward + _MOST * sum(passes.bubble for passes in self._passes)

    def time(self) -> StepTime:
        """Return the parts, of which those that the pipeline makes are simulated."""
        trained = [passes.trained(gathers=not self._two_pass) for passes in self._passes]
        first_passes = [passes.forward_only() for passes in self._passes] if self._two_pass else []
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


class _TowerPasses:
    """A tower's passes: a micro-batch's seconds on the rank that takes longest, and what all ranks together take.

    Attributes:
        work: forward and backward pass of a micro-batch.
        recomputed: what of its forward pass is recomputed.
        accumulated: adding its gradients up, where the products do not.
        forward: forward passes of all micro-batches.
        bubble: in which ranks of a pipeline of even stages wait for each other.
    """

    def __init__(self, stage: PlannedStage, card: Card, tower: PlannedTower) -> None:
        config, parallel, samples = stage.config, stage.config.parallel, stage.micro_batch
        self._parallel, self._tower, self._count = parallel, tower, stage.micro_batches
        self._pipeline = pipeline_of(parallel, self._count)
        fused = fuses(config, card)
        self._layer = layer_time(card, tower, parallel, samples, fp8_share(config, tower), fused)
        self._ends = _ends(card, tower, samples)
        sizes = _chunk_sizes(tower, parallel.tensor)
        self._exchange = _Exchange(stage, card, sizes)
        linears = tower.linear_weights(parallel.tensor)
        added = [size - fused * layers * linears for size, layers in zip(sizes, tower.split, strict=True)]
        self._added = [moving(card, (_BF16 + 2 * _gradient_bytes(config)) * each) for each in added]
        sent = _BF16 * local_tokens(tower, parallel, samples) * tower.width
        self._message = message(card, sent, ranks_per_stage(parallel, stage.gpus)) if parallel.pipeline > 1 else 0.0
        self._again = [self._layer.forward.total * recomputed_layers(parallel, layers) for layers in tower.split]
        self._forward, self._backward = self._forwards(), self._backwards()
        both = [forward + backward for forward, backward in zip(self._forward, self._backward, strict=True)]
        turns = [sum(chunks) for chunks in self._chunks(both)]
        slowest = slice(turns.index(max(turns)), None, parallel.pipeline)
        layer = self._layer.forward + self._layer.backward
        parts = zip(tower.split[slowest], self._ends[slowest], strict=True)
        self.work = sum((layer * layers + ends for layers, ends in parts), Work())
        self.recomputed, self.accumulated = sum(self._again[slowest]), sum(self._added[slowest])
        self.forward = self._count * sum(self._forward[slowest])
        turn = self.work.total + self.recomputed + self.accumulated
        self.bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline * turn

    def trained(self, gathers: bool) -> _Taken:
        """Return what forward and backward passes take; `gathers` says whether they are the first with new weights."""
        if self._parallel.shard == "full":
            return self._fully_sharded(backward=True)
        return self._taken(self._chunks(self._backward), gathers=gathers, reduces=True)

    def forward_only(self) -> _Taken:
        """Return what forward passes alone take, which are the first with new weights."""
        if self._parallel.shard == "full":
            return self._fully_sharded(backward=False)
        return self._taken((), gathers=True, reduces=False)

    def _fully_sharded(self, backward: bool) -> _Taken:
        """The same where weights are gathered layer by layer, with what is outside of layers before and after all."""
        layers, ends, exchange = self._tower.layers, self._ends[0].total, self._exchange
        forwards = self._layer.forward.total
        backwards = (self._backward[0] - 2 / 3 * ends) / layers if backward else 0.0
        part = self._tower.layer_elements / _chunk_sizes(self._tower, 1)[0]
        gather, reduce = exchange.gather[0], exchange.reduce[0]
        delay = fully_sharded_costs.exposed(
            layers, self._count, forwards, backwards, part * gather, part * reduce, ahead=2
        )
        outside = (1 - layers * part) * (gather + backward * self._count * reduce)
        busy = self._count * (layers * (forwards + backwards) + ends * (1 if backward else 1 / 3))
        return _Taken(busy, 0.0, 0.0, delay + outside)

    def _taken(self, backward: Chunks, gathers: bool, reduces: bool) -> _Taken:
        forward, exchange, parallel = self._chunks(self._forward), self._exchange, self._parallel
        both = zip(forward, backward or ((0.0,),) * len(forward), strict=True)
        busy = self._count * max(sum(one) + sum(other) for one, other in both)
        gathers_beside = gathers and parallel.overlap_param_gather
        reduces_beside = reduces and parallel.overlap_grad_reduce
        bare = Passes(forward, backward)
        sending = replace(bare, message=self._message)
        whole = replace(
            sending,
            gather=self._chunks(exchange.gather) if gathers_beside else (),
            reduce=self._chunks(exchange.reduce) if reduces_beside else (),
            buckets=self._chunks(exchange.buckets),
        )
        times = [seconds(self._pipeline, each) for each in (bare, sending, whole)]
        # What is exchanged before or after the passes, nothing hides.
        before, after = gathers and not gathers_beside, reduces and not reduces_beside
        unhidden = sum(
            before * one + after * other for one, other in zip(exchange.gather, exchange.reduce, strict=True)
        )
        return _Taken(busy, times[0] - busy, times[1] - times[0], times[2] - times[1] + unhidden / parallel.pipeline)

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
    """What data-parallel ranks exchange of a tower's chunks."""

    stage: PlannedStage
    card: Card
    sizes: Sequence[int]
    """Parameters of each chunk on a rank."""

    @property
    def gather(self) -> list[float]:
        """Seconds of the weights of each chunk."""
        return self._seconds(1 if self.stage.config.precision.fp8_primary_weights else _BF16)

    @property
    def reduce(self) -> list[float]:
        """Seconds of the gradients of each chunk."""
        return self._seconds(_gradient_bytes(self.stage.config))

    @property
    def buckets(self) -> list[float]:
        """Parts of each chunk: Megatron splits the first one of the first stage alone."""
        first = math.ceil(self.sizes[0] / max(40_000_000, 1_000_000 * self.stage.data_size))
        return [first, *(1 for _ in self.sizes[1:])]

    def _seconds(self, element: int) -> list[float]:
        size, stride = self.stage.data_size, self.stage.config.parallel.tensor
        return [exchange(self.card, element * count, size, stride) for count in self.sizes]


@cache
def _chunk_sizes(tower: PlannedTower, tensor: int) -> tuple[int, ...]:
    """Parameters of each chunk on one tensor-parallel rank."""
    return tuple(sum(tower.chunk(stage, tensor, with_logit_parameters=False)) for stage in range(len(tower.split)))


def _ends(card: Card, tower: PlannedTower, samples: int) -> list[Work]:
    """Forward and backward pass of the embedding on the first stage and of the head on the last."""
    rate = card.bf16_gemm * 1e12
    ends = [Work() for _ in tower.split]
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


def _loss(stage: PlannedStage, card: Card) -> float:
    """Products in float32, passes over the tiles, and the exchange of the captions' features and gradients."""
    config, samples = stage.config, stage.replica_samples
    operations = loss_flops(config, patch_width(stage.targets)).hardware
    products = samples * operations / (card.fp32_tflops * 1e12 * card.estimates.fp32)
    tiles = moving(card, LOSS_READS * _FP32 * samples * config.train.global_batch)
    features = _FP32 * config.train.global_batch * config.model.embed_dim
    return products + tiles + 2 * exchange(card, features, stage.data_size, config.parallel.tensor)


def _batch(stage: PlannedStage, card: Card) -> float:
    """What the ranks of a model-parallel group give each other of the samples that each has read."""
    parallel, sent = stage.config.parallel, stage.replica_samples * sample_bytes(stage)
    stride = 1 if parallel.pipeline == 1 else ranks_per_stage(parallel, stage.gpus)
    return exchange(card, sent, stage.model_size, stride)
