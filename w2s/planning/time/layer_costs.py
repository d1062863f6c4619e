"""Seconds of a micro-batch in one layer on one rank."""

from dataclasses import dataclass
from operator import add

from w2s.config.sections import ParallelConfig
from w2s.planning.memory.activations import local_tokens
from w2s.planning.model.towers import PlannedTower
from w2s.planning.time.cards import Card
from w2s.planning.time.roofline import exchange, moving, product

_BF16, _FP32 = 2, 4
LAUNCHES = 20
"""Kernels of a layer's forward pass, and half of those of its backward pass; counted in the code, about."""


@dataclass(frozen=True)
class Work:
    """Seconds by kind."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    """Norms, activations, residuals, and rounding to FP8."""
    tensor: float = 0.0
    """Communication among tensor-parallel ranks that nothing hides."""
    launches: float = 0.0
    """Waiting for kernels to be launched, where they are too short."""

    @property
    def total(self) -> float:
        """All kinds."""
        return self.products + self.attention + self.elementwise + self.tensor + self.launches

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(add, vars(self).values(), vars(other).values()))

    def __mul__(self, times: float) -> "Work":
        return Work(*(seconds * times for seconds in vars(self).values()))


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer for one micro-batch."""

    forward: Work
    backward: Work
    """Without what is recomputed of the forward pass."""


def layer_time(
    card: Card, tower: PlannedTower, parallel: ParallelConfig, samples: int, fp8: float, fused: bool
) -> LayerTime:
    """Return the seconds of a layer for a micro-batch of some samples.

    Args:
        fp8: share of the layers that multiply in FP8; the mean over all layers is returned.
        fused: whether products add gradients of weights up in float32.
    """
    sizes = _Sizes(card, tower, parallel, samples, fp8, fused)
    return LayerTime(_launched(card, sizes.forward(), LAUNCHES), _launched(card, sizes.backward(), 2 * LAUNCHES))


def _launched(card: Card, work: Work, kernels: int) -> Work:
    return work + Work(launches=max(0.0, kernels * card.launch - work.total))


class _Sizes:
    """A layer's matrices on one rank."""

    def __init__(
        self, card: Card, tower: PlannedTower, parallel: ParallelConfig, samples: int, fp8: float, fused: bool
    ) -> None:
        self.card, self.parallel, self.fp8, self.post_norm = card, parallel, fp8, tower.post_norm
        self.result = 2 * _FP32 if fused else _BF16
        self.num_tokens, self.local_tokens = samples * tower.tokens, local_tokens(tower, parallel, samples)
        self.width, self.hidden = tower.width, tower.mlp_width // parallel.tensor
        inner = tower.width // parallel.tensor
        self.linears = (
            (tower.width, 3 * inner), (inner, tower.width), (tower.width, self.hidden), (self.hidden, tower.width)
        )  # fmt: skip
        operations = tower.flops.attention / tower.layers * samples / parallel.tensor
        self.slowdown = card.slowdown(tower.width)
        self.attention = self.slowdown * operations / card.attention(tower.sequence)
        self.exchange = exchange(card, self.num_tokens * tower.width * _BF16, parallel.tensor, 1)

    def forward(self) -> Work:
        """Two exchanges after each pair of linears: an all-reduce, or with sequence parallelism its two halves."""
        return Work(
            products=sum(self._product(self.num_tokens, inner, outer) for inner, outer in self.linears),
            attention=self.attention,
            elementwise=self._elementwise(stream=6 if self.post_norm else 10, hidden=2, rounded=0),
            tensor=4 * self.exchange,
        )

    def backward(self) -> Work:
        """Gradients with respect to the inputs, then the weights, behind which the exchange of the former runs."""
        grad_inputs = sum(self._product(self.num_tokens, outer, inner) for inner, outer in self.linears)
        grad_weights = [self._product(inner, self.num_tokens, outer, self.result) for inner, outer in self.linears]
        hidden = 1 if self.parallel.sequence else 2
        late = sum(max(0.0, hidden * self.exchange - seconds) for seconds in (grad_weights[0], grad_weights[2]))
        gelu = 5 if self.parallel.recompute == "selective" else 3
        return Work(
            products=grad_inputs + sum(grad_weights),
            attention=2.5 * self.attention,
            elementwise=self._elementwise(stream=12, hidden=gelu, rounded=1),
            tensor=late + (2 * self.exchange if self.parallel.sequence else 0.0),
        )

    def _product(self, rows: int, inner: int, columns: int, result: int = _BF16) -> float:
        sizes = self.card, rows, inner, columns
        bf16 = product(*sizes, fp8=False, result=result) if self.fp8 < 1 else 0.0
        fp8 = product(*sizes, fp8=True, result=result) if self.fp8 else 0.0
        return self.slowdown * ((1 - self.fp8) * bf16 + self.fp8 * fp8)

    def _elementwise(self, stream: int, hidden: int, rounded: int) -> float:
        """Seconds of elementwise kernels.

        Args:
            stream: reads and writes of tensors of the residual stream.
            hidden: those of the MLP's hidden activations.
            rounded: side of the linears, 0 the inputs and 1 the outputs, that is rounded to FP8: read once in bfloat16,
                written twice in FP8 (as it is and transposed).
        """
        count = _BF16 * (stream * self.local_tokens * self.width + hidden * self.num_tokens * self.hidden)
        rounding = (_BF16 + 2) * self.num_tokens * sum(linear[rounded] for linear in self.linears)
        return self.slowdown * moving(self.card, count + self.fp8 * rounding)
