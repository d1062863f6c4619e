"""Measure what the planner's times stand on, on one GPU, and print it as JSON beside what the planner says.

    python tools/calibrate.py [--card NAME] [--tiny]

Matrix products of EVA-18B's layers at 8 and 16 images, forward and by weights, the latter with gradients added up
apart or by the product; and attention by each of torch's backends, forward and backward. `--tiny` goes the same way
on any machine, with sizes that take no time.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from w2s.bench.speed import card_of
from w2s.config.load import named_model
from w2s.planning.time.cards import Card, card
from w2s.planning.time.roofline import moving, product

IMAGES = (8, 16)
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Measured:
    """An operation, and the seconds that it takes."""

    what: str
    shape: str
    planned: float
    measured: float | None
    """None where this machine cannot do it."""


@dataclass(frozen=True)
class Sizes:
    """Of a tower whose operations are measured."""

    width: int
    mlp_width: int
    heads: int
    tokens: int
    device: str

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linears."""
        return {
            "QKV": (self.width, 3 * self.width),
            "attention's output": (self.width, self.width),
            "MLP, up": (self.width, self.mlp_width),
            "MLP, down": (self.mlp_width, self.width),
        }


def seconds(operation: Callable[[], Any]) -> float | None:
    """The median of many runs."""
    try:
        return float(Timer("operation()", globals={"operation": operation}).blocked_autorange(min_run_time=0.1).median)
    except (RuntimeError, TypeError):  # no such kernel here, or too old a torch
        return None


def products(kind: Card, sizes: Sizes, rows: int) -> Iterator[Measured]:
    """The products of a layer's linears, in bfloat16."""
    for name, (inner, columns) in sizes.linears.items():
        rows_in, weight, rows_out = noise(sizes, rows, inner), noise(sizes, columns, inner), noise(sizes, rows, columns)
        sums = torch.zeros(columns, inner, device=sizes.device)
        shape = f"[{rows}, {inner}] x [{inner}, {columns}]"
        planned = product(kind, rows, inner, columns, fp8=False)
        yield Measured(f"{name}, forward", shape, planned, seconds(partial(torch.mm, rows_in, weight.t())))
        shape = f"[{columns}, {rows}] x [{rows}, {inner}]"
        planned = product(kind, columns, rows, inner, fp8=False) + moving(kind, (2 + 4 + 4) * columns * inner)
        apart = seconds(partial(added_apart, sums, rows_out.t(), rows_in))
        yield Measured(f"{name}, by weight, added up apart", shape, planned, apart)
        planned = product(kind, columns, rows, inner, fp8=False, result=8)
        at_once = seconds(partial(torch.addmm, sums, rows_out.t(), rows_in, out_dtype=torch.float32))
        yield Measured(f"{name}, by weight, added up by the product", shape, planned, at_once)


def added_apart(sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add a product in bfloat16 to sums in float32."""
    return sums.add_(left @ right)


def attention(kind: Card, sizes: Sizes, images: int) -> Iterator[Measured]:
    """Forward and backward pass by each backend."""
    shape = images, sizes.heads, sizes.tokens, sizes.width // sizes.heads
    parts = [noise(sizes, *shape).requires_grad_() for _ in range(3)]
    operations = 4 * parts[0].numel() * sizes.tokens * 3.5
    for backend in BACKENDS:

        def step(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*parts)
            torch.autograd.grad(out, parts, out)

        planned = operations / kind.attention(sizes.tokens)
        yield Measured(f"attention, {backend.name.lower()}", str(list(shape)), planned, seconds(step))


def noise(sizes: Sizes, *shape: int) -> Tensor:
    """Numbers of the size that activations have."""
    return torch.randn(shape, device=sizes.device, dtype=torch.bfloat16)


def main(
    name: Annotated[str, typer.Option("--card", help="The GPU, where torch's name is none of cards.yaml.")] = "h100",
    tiny: Annotated[bool, typer.Option("--tiny", help="Small sizes, on any machine.")] = False,
) -> None:
    """Measure, and print JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vision = named_model("tiny" if tiny else "eva_18b").vision
    sizes = Sizes(vision.width, vision.mlp_width, vision.heads, 1 + vision.patches, device)
    kind = (card_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None) or card(name)
    found = [
        each
        for images in IMAGES
        for part in (products(kind, sizes, images * sizes.tokens), attention(kind, sizes, images))
        for each in part
    ]
    print(json.dumps({"card": kind.name, "device": device, "rows": [asdict(each) for each in found]}, indent=1))


if __name__ == "__main__":
    typer.run(main)
