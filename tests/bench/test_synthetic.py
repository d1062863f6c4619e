from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tests.stages.shape_images import write_shapes
from w2s.bench.synthetic import synthetic_batch
from w2s.config.load import load
from w2s.run import open_stream
from w2s.stages import clip, mim


@pytest.mark.parametrize(("stage", "frames"), [("mim", 1), ("clip", 1), ("clip", 2)])
def test_noise_has_the_form_of_samples(stage: str, frames: int, tmp_path: Path) -> None:
    shards = write_shapes(tmp_path / "shapes", shards=2, seed=0)
    overrides = ["model=tiny", "model.vision.drop_path=0.5", f"data.train={shards}", "data.builtin=none"]
    overrides += [f"data.frames={frames}", "data.lanes=2", "data.workers=0", "train.global_batch=8"]
    config = load(stage, overrides)
    spec = mim.sample_spec(config, teacher_sizes=(64,)) if stage == "mim" else clip.sample_spec(config)
    with closing(open_stream(config, spec, rank=0, size=1)) as stream:
        real = stream.next()
    noise = synthetic_batch(spec, 8, config.model.text.vocab_size)
    for field in fields(real):
        ours, theirs = getattr(noise, field.name), getattr(real, field.name)
        if isinstance(theirs, torch.Tensor):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), field.name
        else:
            assert type(ours) is type(theirs), field.name
    # What is drawn is that of the first samples of a run, and the end token is the largest number.
    assert noise.masks is None or torch.equal(noise.masks, real.masks)
    assert noise.kept is None or torch.equal(noise.kept, real.kept)
    assert torch.equal(noise.branch_scales, real.branch_scales)
    assert noise.tokens is None or torch.equal(noise.tokens.max(dim=1).values, real.tokens.max(dim=1).values)
