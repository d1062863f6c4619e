"""A pipeline with seeds, choices and equal compute, over the smallest model."""

from pathlib import Path

from w2s.config.sections import Config

_STEPS = """
title: Seeds
experiment: seeds
seeds: {seeds}
overrides: [model=tiny, data=shards, data.train=train, eval.shards=tune, 'teacher.source=eva:eva_tiny']
steps:
  - {{name: masked, stage: mim, overrides: [train.steps=40]}}
  - name: masked_clip
    stage: clip
    overrides: ['init.vision={{masked}}', train.steps=20, optim.warmup=4]
    choose: &choose {{key: optim.lr, among: {among}, by: zero_shot/top5, share: {share}}}
  - {{name: scratch, stage: clip, overrides: [init.vision=none, train.steps=20, optim.warmup=4], choose: *choose}}
  - {{name: scratch_long, stage: clip, overrides: [init.vision=none], compute_of: [masked, masked_clip]}}
  - {{name: eval_masked, stage: eval, overrides: ['init.checkpoint={{masked_clip}}'], beside: [eval_scratch]}}
  - {{name: eval_scratch, stage: eval, overrides: ['init.checkpoint={{scratch}}']}}
  - {{name: eval_scratch_long, stage: eval, overrides: ['init.checkpoint={{scratch_long}}']}}
"""


def write_seeded(folder: Path, seeds: str = "[3, 5]", among: str = "[1e-3, 2e-3, 4e-3]", share: str = "0.5") -> str:
    """Write the pipeline and return its path."""
    path = folder / "seeded.yaml"
    path.write_text(_STEPS.format(seeds=seeds, among=among, share=share))
    return str(path)


def twice_for_masked(config: Config) -> dict[str, float]:
    """Zero-shot top-1 of an evaluation: its seed in percent, for the masked arm twice that."""
    times = 2 if config.run.name.startswith("eval_masked") else 1
    return {"tux/zero_shot/top1": times * config.run.seed / 100, "tux/zero_shot/chance_top1": 0.0016}
