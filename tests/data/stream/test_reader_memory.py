from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.data.shard_files import write_shards
from w2s.config.sections import DataConfig
from w2s.data.samples.sample import SampleSpec
from w2s.data.stream.stream import Stream

SAMPLES = 200_000
BATCH = 200


def resident_mib() -> float:
    """Memory of this process and all below it, what they share counted once each."""
    process = psutil.Process()
    return sum(each.memory_full_info().uss for each in [process, *process.children(recursive=True)]) / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_flat_over_200000_samples(tmp_path: Path, workers: int) -> None:
    """Two sources, captions, masks. A leak of 100 bytes a sample would be 15 MiB between the first and last quarter."""
    for name in ("a", "b"):
        write_shards(tmp_path / name, [60] * 8)
    spec = SampleSpec(image_size=8, grid=4, masked_patches=6, context_length=8, image_key="png")
    data = DataConfig(
        train=f"{tmp_path}/a::{tmp_path}/b", weights=[0.7, 0.3], lanes=8, shuffle=50, replacement=True, workers=workers
    )
    seen = []
    with closing(Stream(data, spec, global_batch=BATCH, seed=0, rank=0, size=1)) as stream:
        for step in range(1, SAMPLES // BATCH + 1):
            stream.next()
            if step * BATCH % 10_000 == 0:
                seen.append(resident_mib())
    early, late = seen[3:7], seen[-4:]
    print(f"{workers} workers: {sum(early) / 4:.1f} MiB, later {sum(late) / 4:.1f} MiB")
    assert sum(late) / 4 - sum(early) / 4 < 8
