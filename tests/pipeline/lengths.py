"""A pipeline whose trainings are read out at several lengths and compared by compute, over the smallest model."""

from pathlib import Path

STEPS = """
title: Lengths
seeds: [3, 5]
overrides: [model=tiny, data=shards, data.train=train, eval.shards=tune, optim.warmup=2, train.global_batch=8]
compare: {metric: retrieval/mean_recall_at_10, baseline: scratch, exists: [weak]}
steps:
  - {name: weak, stage: clip, overrides: [init.vision=none], budgets: {steps: [10, 20]}}
  - name: masked
    stage: mim
    overrides: ['init.vision={weak_20}', 'teacher.source=eva:eva_tiny', teacher.image_size=28, train.steps=10]
  - name: start
    stage: clip
    overrides: ['init.vision={masked}']
    budgets: {steps: [10, 20], cooldown: 0.5}
    choose: {key: optim.lr, among: [1e-3, 2e-3], by: retrieval/mean_recall_at_10, share: 0.5}
  - {name: scratch, stage: clip, overrides: [init.vision=none], budgets: {steps: [20, 80, 320]}}
  - {name: eval, stage: eval, overrides: ['init.checkpoint={start_20}']}
"""


def write_lengths(folder: Path, shared: str = "") -> str:
    """Write the pipeline, one of whose steps all seeds may share, and return its path."""
    path = folder / "lengths.yaml"
    path.write_text(STEPS.replace(f"name: {shared},", f"name: {shared}, shared: true,") if shared else STEPS)
    return str(path)
