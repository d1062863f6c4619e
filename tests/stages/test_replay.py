"""A step that is repeated on ranks of both stages: whose fault is it, and does anything change?"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.stages.conftest import Material
from tests.stages.layout_steps import STAGES
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.samples.batch import Batch
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.run import open_stream
from w2s.training.replay import replay
from w2s.training.stage import Stage, train_step

Fault = Callable[[Ranks, Batch, int], bool]
"""Whether a step goes wrong on a rank, with a batch, at a call."""


def _of_the_device(ranks: Ranks, batch: Batch, call: int) -> bool:
    return ranks.data_rank == 1


def _of_the_data(ranks: Ranks, batch: Batch, call: int) -> bool:
    return 21 in batch.indices.tolist()  # of the second step


def _passing(ranks: Ranks, batch: Batch, call: int) -> bool:
    return ranks.data_rank == 1 and call == 2


class Faulty:
    """A stage whose vision tower gives no numbers where there is a fault: what it gives reaches all ranks."""

    def __init__(self, stage: Stage, fault: Fault, ranks: Ranks) -> None:
        self.genuine, self._fault, self._ranks, self._calls = stage.step, fault, ranks, 0
        self._now = False
        for part in stage.towers["vision"].chunks:
            part.blocks.register_forward_hook(lambda *call: call[-1] * math.nan if self._now else None)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        self._calls += 1
        self._now = self._fault(self._ranks, batch, self._calls)
        return self.genuine(batch)


def _second_step(config: Config, fault: Fault) -> tuple[str, bool]:
    """What is said of the second of three steps, and whether all is as if nobody had asked."""
    ends = []
    said = ""
    for asked in (True, False):
        with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
            stage = STAGES[config.stage](config, ranks)
            stage.step = Faulty(stage, fault, ranks).step  # type: ignore[method-assign]
            stream = open_stream(config, stage.spec, rank=ranks.data_reader_rank, size=ranks.world_size)
            for step in range(3):
                train_step(stage, batch := stream.next(), 1.0)
                if asked and step == 1:
                    said = replay(stage, batch, ranks).words
            stream.close()
            weights = [
                weight for tower in stage.towers.values() for part in tower.chunks for weight in part.parameters()
            ]
            ends.append([*weights, *stage.extra_state().values()])
    return said, all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


OF_DATA_RANK_1 = {2: "rank 1", 4: "ranks [1, 3]"}
LAYOUTS = {2: ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"], 4: ["parallel.pipeline=2"]}


FAULTS: dict[str, tuple[Fault, str]] = {
    "device": (_of_the_device, "the device of rank"),
    "data": (_of_the_data, "the data of rank"),
    "passing": (_passing, "not reproducible (no rank fails again"),
}
BRIEF = {("clip", 2, "device"), ("clip", 2, "data"), ("mim", 2, "device")}
"""Where minutes count."""
CASES = [
    pytest.param(*case, marks=() if case in BRIEF else pytest.mark.slow)
    for case in itertools.product(("mim", "clip"), LAYOUTS, FAULTS)
]


@pytest.mark.parametrize(("stage", "ranks", "kind"), CASES)
def test_a_fault_in_a_tower_is_told_apart(material: Material, stage: str, ranks: int, kind: str) -> None:
    fault, says = FAULTS[kind]
    teacher = [f"teacher.source=timm:test_vit@{material.teacher}", "teacher.target_norm=standardize"]
    data = ["data.builtin=none", f"data.train={material.train}", "data.workers=0", "eval.shards=", "eval.knn_shards="]
    train = ["train.global_batch=16", "train.micro_batch=8", "init.vision=none", *LAYOUTS[ranks]]
    config = load(stage, ["model=tiny", "hardware=cpu", *teacher, *data, *train])
    for said, unchanged in run_ranks(_second_step, ranks, config, fault):
        assert says in said and ("not reproducible" in said or f"{OF_DATA_RANK_1[ranks]} on " in said)
        assert unchanged
