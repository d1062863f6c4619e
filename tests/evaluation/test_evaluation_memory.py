"""The memory of an evaluation does not grow with the number of test images."""

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.data.shard_files import encode, smooth_photo, write_shard
from tests.stages.runs import run_stage
from tests.stages.shape_images import write_shapes

SIZE = 224
FEW, MANY = 2_000, 50_000


def peak_mib(command: Sequence[str]) -> float:
    """Largest memory of a command and all below it, what they share counted once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process, peak = psutil.Popen(command, env=environment), 0.0
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(each.memory_full_info().pss for each in family) / 2**20)
        except psutil.Error:  # one ended just now
            continue
        try:
            process.wait(0.2)
        except psutil.TimeoutExpired:
            continue
    assert process.returncode == 0
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_flat_over_50000_images(tmp_path: Path, workers: int) -> None:
    """At 224 pixels; a byte kept of each would be 7 GB."""
    photo = encode(smooth_photo(256, 320), "JPEG", quality=90)
    files = [{"jpg": photo, "cls": b"%d" % index} for index in range(10)]
    for count in (FEW, MANY):
        (tmp_path / f"{count}").mkdir()
        (tmp_path / f"{count}" / "classnames.txt").write_text("".join(f"class {index}\n" for index in range(10)))
        for shard in range(0, count, 2_000):
            samples = ((f"{index:05d}", files[index % 10]) for index in range(shard, shard + 2_000))
            write_shard(tmp_path / f"{count}" / f"{shard:05d}.tar", samples)
    train = write_shapes(tmp_path / "train", shards=1, seed=0)
    options = ["hardware=cpu", "data.builtin=none", f"run.root={tmp_path / 'runs'}", "tracking.enabled=false"]
    model = ["model=tiny", f"model.vision.image_size={SIZE}", "model.vision.patch_size=32", "init.vision=none"]
    tiny = ["train.steps=1", "train.global_batch=8", "train.micro_batch=8", "optim.warmup=0", "data.lanes=1"]
    run_stage(
        "clip", [*options, *model, *tiny, f"data.train={train}", "data.workers=0", "eval.shards=", "run.name=clip"]
    )
    w2s = str(Path(sysconfig.get_path("scripts")) / "w2s")
    options += ["init.checkpoint=clip", "eval.baselines=false", "eval.retrieval=false", f"data.workers={workers}"]
    few, many = (
        peak_mib(
            [w2s, "stage", "eval", "data=shards", *options, f"eval.shards={tmp_path / str(n)}", f"run.name=eval-{n}"]
        )
        for n in (FEW, MANY)
    )
    print(f"{workers} workers: {few:.0f} MiB with {FEW} images, {many:.0f} MiB with {MANY}")
    # What is known of 48,000 images (keys, places, labels, features of 16 channels) is 20 MiB.
    assert many - few < 64
