"""The parts of real steps, marked from outside."""

from itertools import count

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from tests.distributed import run_ranks
from w2s.bench.marks import REST, Marks
from w2s.bench.parts import PARTS, marked
from w2s.bench.synthetic import synthetic_batch
from w2s.config.load import load
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.stages.clip import ContrastiveStage
from w2s.stages.mim import MaskedStage
from w2s.training.stage import train_step


def build(stage: str, ranks: Ranks, *overrides: str) -> MaskedStage | ContrastiveStage:
    tiny = ("model=tiny", "hardware=cpu", "train.global_batch=8", "train.micro_batch=4", "teacher.source=timm:test_vit")
    config = load(stage, [*tiny, "teacher.image_size=64", *overrides])
    return (MaskedStage if stage == "mim" else ContrastiveStage)(config, ranks)


def steps(stage: MaskedStage | ContrastiveStage, marks: Marks, count: int) -> list[Tensor]:
    batch = synthetic_batch(stage.spec, 8 // stage.ranks.world_size, stage.config.model.text.vocab_size)
    norms = []
    for _ in range(count):
        with marks.step():
            norms.append(train_step(stage, batch, 1.0)["grad_norm"])
    return norms


def test_every_part_is_seen_and_nothing_is_left_behind(alone: Ranks) -> None:
    originals = {**vars(ProcessGroup)}, {**vars(Work)}
    distilled = ("clip.distill.source=eva:tiny",)
    for name, overrides in (("mim", ()), ("clip", ()), ("clip", distilled)):
        stage, marks = build(name, alone, *overrides), Marks(alone.device)
        with marked(stage, marks):
            watched = steps(stage, marks, 2)
        (_, parts) = marks.read()
        # Alone in its groups a rank exchanges nothing.
        wanted = {*PARTS, REST} - {"data", "communication"} - ({"teacher"} if not stage.teachers else set())
        assert parts.keys() == wanted
        assert min(parts.values()) > 0
        # The same numbers as without marks, and the same objects as before.
        assert watched == steps(build(name, alone, *overrides), Marks(alone.device), 2)
        modules: list[nn.Module] = [part for tower in stage.towers.values() for part in tower.chunks]
        modules += [] if not stage.teachers else stage.teachers
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        assert not vars(stage.optimizer).keys() & {"step", "zero_grad"}
        assert ({**vars(ProcessGroup)}, {**vars(Work)}) == originals


def collectives(layout: tuple[str, ...]) -> float:
    """How often a rank of two communicates in a step: on a clock that ticks once a reading, a part is its marks."""
    parallel = load("mim", [*layout]).parallel
    with process_groups.initialize_groups(parallel, torch.device("cpu")) as ranks:
        stage, marks = build("mim", ranks, *layout), Marks(ranks.device)
        marks._clock = count().__next__
        with marked(stage, marks):
            steps(stage, marks, 2)
        return marks.read()[-1]["communication"] / 1e3


@pytest.mark.slow
def test_ranks_that_split_layers_communicate_in_every_one() -> None:
    whole, split = (run_ranks(collectives, 2, layout)[0] for layout in ((), ("parallel.tensor=2",)))
    assert whole >= 2  # gradients out, weights back
    # Two sums a layer in the forward pass and two in the backward pass, of two layers and two micro-batches.
    assert split - whole >= 16
