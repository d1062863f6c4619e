from pathlib import Path
from types import SimpleNamespace

import torch

from w2s.bench.marks import Marks
from w2s.bench.step import WARM_UP, Job, _measure_rows, _Subject, with_batch
from w2s.config.load import load
from w2s.data.samples.batch import Batch
from w2s.stages.clip import sample_spec

CPU = torch.device("cpu")


def test_what_does_not_fit_is_a_row_without_figures(tmp_path: Path) -> None:
    config = load("clip", ["model=tiny", "hardware=cpu"])
    sizes: list[int] = []

    def step(batch: Batch) -> None:
        sizes.append(len(batch))
        if len(batch) > 8:
            raise torch.OutOfMemoryError("too large")

    stage = SimpleNamespace(config=config)
    subject = _Subject(step, sample_spec(config), 0, stage)
    job = Job(config, (4, 16, 8), "synthetic", 2, tmp_path / "x")
    rows = _measure_rows(subject, job, Marks(CPU), CPU, reader=0, world_size=1)
    assert [(row.micro_batch, row.global_batch, bool(row.parts)) for row in rows] == [
        (4, 4, True),
        (16, 16, False),
        (8, 8, True),
    ]
    assert sizes == [4] * (WARM_UP + 2) + [16] + [8] * (WARM_UP + 2)
    assert rows[1].milliseconds == 0
    assert stage.config == with_batch(config, 8, world_size=1)


def test_a_global_batch_is_one_micro_batch_of_every_replica() -> None:
    config = load("clip", ["model=tiny", "parallel.tensor=2", "parallel.pipeline=2"])
    assert with_batch(config, 8, world_size=8).train.global_batch == 16
    assert config.train.global_batch == 256
