"""A checkpoint of one layout continues in any other: weights, optimizer, statistics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import means, run_ranks
from tests.stages.conftest import Material
from tests.stages.layout_steps import STAGES
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.stream.stream import Stream
from w2s.megatron.checkpoint import state
from w2s.megatron.parallel import process_groups
from w2s.optim.lr_schedule import lr_factor

TENSOR, PIPELINE, FULLY = "parallel.tensor=2", "parallel.pipeline=2", "parallel.shard=full"
CHAIN: list[tuple[int, list[str]]] = [
    (4, [TENSOR, PIPELINE, "train.micro_batch=4"]),
    (2, [FULLY, "train.micro_batch=8"]),
    (1, ["train.micro_batch=16"]),
    (2, [FULLY, "train.micro_batch=4"]),
    (2, ["train.micro_batch=8"]),
    (2, [TENSOR, "train.micro_batch=16"]),
]
"""Ranks and layouts, each of which continues where the one before has saved."""
BEGUN, NEXT = 2, 3
"""Steps before the first checkpoint, and after each."""
TOLERANCE = 1e-6
"""Relative and absolute, of float32 losses whose sums come in another order: a few units of 6e-8."""


def go_on(configs: list[Config], folders: list[tuple[Path | None, Path]]) -> list[list[float]]:
    """Begin, or load the first folder; save into the second; return the next losses. One after the other."""
    return [_go_on(config, *pair) for config, pair in zip(configs, folders, strict=True)]


def _go_on(config: Config, before: Path | None, after: Path) -> list[float]:
    with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
        stage: Any = STAGES[config.stage](config, ranks)
        sizes = {"global_batch": 16, "seed": 0, "rank": ranks.data_reader_rank, "size": ranks.world_size}
        stream = Stream(config.data, stage.spec, **sizes)
        batches = [stream.next() for _ in range(BEGUN + NEXT)]

        def train(steps: range) -> list[float]:
            losses = []
            for step in steps:
                stage.optimizer.zero_grad()
                losses.append(means(ranks, stage.step(batches[step]))["loss"])
                stage.optimizer.step(lr_factor(step, config.train.steps, config.optim))
            return losses

        if before is None:
            train(range(BEGUN))
        else:
            stage.load_extra_state(state.load(before, stage.towers, stage.optimizer, step=BEGUN))
        state.save(after, stage.towers, stage.optimizer, stage.extra_state()).finish()
        return train(range(BEGUN, BEGUN + NEXT))


@pytest.fixture(scope="module")
def common(material: Material) -> list[str]:
    data = ["data.builtin=none", f"data.train={material.train}", "data.workers=0", "eval.shards=", "eval.knn_shards="]
    teacher = [f"teacher.source=timm:test_vit@{material.teacher}", "teacher.target_norm=standardize"]
    train = ["train.steps=5", "train.global_batch=16", "optim.warmup=1", "optim.lr=1e-4"]
    return ["model=tiny", "hardware=cpu", *data, *teacher, *train]


@pytest.mark.slow
def test_bfloat16_resumes_bit_for_bit(common: list[str], tmp_path: Path) -> None:
    """The scalars of the loss are float32 beside bfloat16 weights, in any layout."""
    bf16 = [*common, "init.vision=none", "precision.compute=bf16", "optim.name=lamb", "clip.loss=sigmoid"]
    configs, folders = [], []
    for name, layout in {"pipeline": [PIPELINE, "train.micro_batch=4"], "data": ["train.micro_batch=8"]}.items():
        first, again = tmp_path / name, tmp_path / f"{name}-again"
        for before, after in ((None, first), (first, again)):
            after.mkdir()
            configs.append(load("clip", [*bf16, "clip.logit_scale=10", *layout]))
            folders.append((before, after))
    begun_split, resumed_split, begun, resumed = run_ranks(go_on, 2, configs, folders)[0]
    assert (begun_split, begun) == (resumed_split, resumed)
    assert begun == pytest.approx(begun_split, rel=2**-6), "bfloat16 has eight bits"


@pytest.mark.slow
def test_any_layout_resumes_where_another_stopped(common: list[str], tmp_path: Path) -> None:
    stages = {"mim": ["optim.name=adamw", "mim.summary_weight=0.5"], "clip": ["optim.name=lamb", "init.vision=none"]}
    before: dict[str, Path | None] = dict.fromkeys(stages)
    expected: dict[str, list[float]] = {}
    for index, (ranks, layout) in enumerate(CHAIN):
        folders = {stage: tmp_path / f"{stage}-{index}" for stage in stages}
        for folder in folders.values():
            folder.mkdir()
        configs = [load(stage, [*common, *changes, *layout]) for stage, changes in stages.items()]
        pairs = [(before[stage], folders[stage]) for stage in stages]
        losses = dict(zip(stages, run_ranks(go_on, ranks, configs, pairs)[0], strict=True))
        for stage, values in losses.items():
            assert values == pytest.approx(expected.setdefault(stage, values), rel=TOLERANCE, abs=TOLERANCE), (
                stage,
                layout,
            )
            assert len(set(values)) == NEXT
        before = dict(folders)
