"""Predicted seconds of a training step, by part, on the slowest rank of the pipeline.

Passes follow the schedules of Narayanan et al. 2021: m micro-batches take m turns of the slowest stage, and p stages
with v chunks each (p - 1) / v turns more. What data-parallel ranks exchange hides behind one micro-batch's pass where
the overlap options are on. Reading and decoding images is taken to be hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from w2s.config.layout import model_parallel_size
from w2s.config.sections import Config
from w2s.planning.activations import local_rows
from w2s.planning.cards import Card
from w2s.planning.flops import loss_flops, micro_batches, passes, recomputed_layers, share
from w2s.planning.layers import Work, layer_time
from w2s.planning.memory import fp8_share, sample_bytes
from w2s.planning.roofline import exchange, message, moving
from w2s.planning.states import States
from w2s.planning.teacher import PlannedTeacher
from w2s.planning.towers import PlannedTower

_BF16, _FP32 = 2, 4
UPDATE = {"adamw": 46, "lamb": 134}
"""Bytes that an update reads and writes for a parameter of a rank's share: norm of the gradient and clipping (12), the
fused AdamW (28) or LAMB's operators one by one (116), the weight in bfloat16 (6)."""
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
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max((part.name for part in fields(self)), key=lambda name: getattr(self, name))


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


def step_time(
    config: Config,
    card: Card,
    towers: Sequence[PlannedTower],
    teacher: PlannedTeacher | None,
    states: States,
    world_size: int,
) -> StepTime:
    """Return the seconds of a step in bfloat16, or FP8 where the configuration says so.

    Args:
        config: the stage of training.
        card: the GPUs.
        towers: the towers of the stage.
        teacher: its teacher, if it has one.
        states: of the rank that holds most.
        world_size: GPUs in all.
    """
    turns = [_Turns(config, card, tower, world_size) for tower in towers]
    count, again = micro_batches(config, world_size), passes(config, world_size) == 2
    work = Work()
    for turn in turns:
        work += turn.trained * count
    elements = states.gradients // _gradient_bytes(config)
    return StepTime(
        products=work.products,
        attention=work.attention,
        elementwise=work.elementwise,
        launches=work.launches,
        tensor=work.tensor,
        recomputation=count * sum(turn.recomputed for turn in turns),
        second_pass=sum((count + turn.idle) * turn.forward for turn in turns) if again else 0.0,
        bubble=sum(turn.idle * (turn.trained.total + turn.recomputed) for turn in turns),
        pipeline=count * (3 if again else 2) * sum(turn.message for turn in turns),
        accumulation=moving(card, count * elements * (_BF16 + 2 * _gradient_bytes(config)) + states.gradients),
        data=_data(config, card, states, turns, world_size),
        teacher=_teacher(config, card, teacher, world_size) if teacher else 0.0,
        loss=_loss(config, card, teacher, world_size) if config.stage == "clip" else 0.0,
        optimizer=moving(card, UPDATE[config.optim.name] * states.optimizer / 12),
        batch=_batch(config, card, teacher, world_size),
    )


class _Turns:
    """A tower's micro-batch on the rank of the pipeline that takes longest, in seconds."""

    def __init__(self, config: Config, card: Card, tower: PlannedTower, world_size: int) -> None:
        parallel, samples = config.parallel, min(config.train.micro_batch, share(config, world_size))
        layer = layer_time(card, tower, parallel, samples, fp8_share(config, tower))
        both = layer.forward + layer.backward
        ends = _ends(card, tower, samples, parallel.pipeline)
        again = [
            sum(recomputed_layers(parallel, layers) for layers in tower.split[stage :: parallel.pipeline])
            for stage in range(parallel.pipeline)
        ]
        layers = [tower.layers_of(stage, parallel.pipeline) for stage in range(parallel.pipeline)]
        stage = max(
            range(parallel.pipeline),
            key=lambda stage: layers[stage] * both.total + again[stage] * layer.forward.total + ends[stage].total,
        )
        self.trained = both * layers[stage] + ends[stage]
        self.backward = layer.backward.total * layers[stage]
        self.forward = layer.forward.total * layers[stage] + ends[stage].total / 3
        self.recomputed = layer.forward.total * again[stage]
        self.idle = (parallel.pipeline - 1) / parallel.virtual_pipeline
        self.message = 0.0
        if parallel.pipeline > 1:
            sent = _BF16 * local_rows(tower, parallel, samples) * tower.width
            seen = 1.0 if parallel.virtual_pipeline == 1 else 1 - card.estimates.hidden
            distance = world_size // parallel.pipeline
            self.message = seen * parallel.virtual_pipeline * message(card, sent, distance)


def _ends(card: Card, tower: PlannedTower, samples: int, stages: int) -> list[Work]:
    """Forward and backward pass of the embedding on the first stage and of the head on the last."""
    rate = card.bf16_gemm * 1e12
    ends = [Work() for _ in range(stages)]
    ends[0] += Work(products=2 * samples * tower.flops.embedding / rate)
    ends[-1] += Work(products=3 * samples * tower.flops.head / rate)
    return ends


def _gradient_bytes(config: Config) -> int:
    return _FP32 if config.precision.gradients == "fp32" else _BF16


def _data(config: Config, card: Card, states: States, turns: Sequence[_Turns], world_size: int) -> float:
    """What nothing hides of the reduce-scatter of gradients and the all-gather of weights."""
    parallel = config.parallel
    size = world_size // model_parallel_size(parallel)
    gathered = states.weights
    if config.precision.fp8_primary_weights:
        gathered = gathered // 2
    reduce = exchange(card, states.gradients, size, parallel.tensor)
    gather = exchange(card, gathered, size, parallel.tensor)
    if parallel.overlap_grad_reduce:
        reduce -= min(card.estimates.hidden * reduce, sum(turn.backward for turn in turns))
    if parallel.overlap_param_gather:
        gather -= min(card.estimates.hidden * gather, sum(turn.forward for turn in turns))
    return reduce + gather


def _teacher(config: Config, card: Card, teacher: PlannedTeacher, world_size: int) -> float:
    """The teacher's forward pass over the images of one rank."""
    operations = config.train.global_batch // world_size * teacher.flops
    if config.teacher.precision == "bf16":
        return operations / (card.bf16_gemm * 1e12 * card.estimates.teacher)
    return operations / (card.fp32_tflops * 1e12 * card.estimates.fp32)


def _loss(config: Config, card: Card, teacher: PlannedTeacher | None, world_size: int) -> float:
    """Products in float32, passes over the tiles, and the exchange of the captions' features and gradients."""
    samples, parallel = share(config, world_size), config.parallel
    operations = loss_flops(config, teacher.width if teacher else 0).hardware
    products = samples * operations / (card.fp32_tflops * 1e12 * card.estimates.fp32)
    tiles = moving(card, LOSS_READS * _FP32 * samples * config.train.global_batch)
    features = _FP32 * config.train.global_batch * config.model.embed_dim
    size = world_size // model_parallel_size(parallel)
    return products + tiles + 2 * exchange(card, features, size, parallel.tensor)


def _batch(config: Config, card: Card, teacher: PlannedTeacher | None, world_size: int) -> float:
    """What the ranks of a model-parallel group give each other of the samples that each has read."""
    parallel, sent = config.parallel, share(config, world_size) * sample_bytes(config, teacher)
    stride = 1 if parallel.pipeline == 1 else world_size // parallel.pipeline
    return exchange(card, sent, model_parallel_size(parallel), stride)
