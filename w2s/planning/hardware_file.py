"""A plan as a file for `hardware=`, ready to run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from w2s.config.batching import divisors, samples_per_rank
from w2s.config.load import load
from w2s.config.sections import Config, ParallelConfig, PrecisionConfig
from w2s.files import write_text
from w2s.planning.plan import Plan
from w2s.planning.request import Request

WORKERS = 8
"""Reading processes of a GPU."""
LANES = 512
"""As in configs/data/shards.yaml."""


def write(path: Path, request: Request, plans: Sequence[Plan]) -> None:
    """Write the best plan of each stage.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, text(path.stem, request, plans))


def text(name: str, request: Request, plans: Sequence[Plan]) -> str:
    """Return the content of the file."""
    first = plans[0].config
    lines = [
        f"# {request.gpus} x {request.card} for {first.model.name}, planned and not measured. Made by:",
        f"#   {request.command} --out {name}.yaml",
        *(_summary(plan) for plan in plans),
        f"hardware: {_flow({'name': name, 'device': 'cuda'})}",
        f"precision: {_flow({'compute': 'bf16', **_changed(asdict(first.precision), asdict(PrecisionConfig()))})}",
        f"teacher: {_flow({'precision': first.teacher.precision})}",
        f"data: {_flow({'workers': WORKERS})}",
        "on_stage:",
    ]
    for plan in plans:
        lines += [f"  {plan.config.stage}:", *(f"    {key}: {_flow(value)}" for key, value in _layout(plan, request))]
    return "\n".join(lines) + "\n"


def _summary(plan: Plan) -> str:
    gib, stage = plan.memory.total / 2**30, plan.config.stage
    speed = f"{plan.seconds:.3g} s a step, {100 * plan.mfu:.0f} % MFU, {plan.days:.3g} days"
    return f"# {stage}: {speed}, {gib:.0f} GiB on the fullest card"


def _layout(plan: Plan, request: Request) -> list[tuple[str, Mapping[str, Any]]]:
    """Batch and layout, as far as they are not what the stage has without them."""
    config, train = plan.config, {"micro_batch": plan.config.train.micro_batch}
    before = load(config.stage, request.overrides).train
    if config.train.global_batch != before.global_batch:
        train = {"global_batch": config.train.global_batch, "steps": config.train.steps} | train
    parallel = _changed(asdict(config.parallel), asdict(ParallelConfig()))
    return [
        ("train", train),
        *([("parallel", parallel)] if parallel else []),
        ("data", {"lanes": lanes(config, plan.gpus)}),
    ]


def lanes(config: Config, gpus: int) -> int:
    """Return lanes of the data: LANES or more that keep the readers of a GPU busy, as far as its batch allows."""
    share, least = samples_per_rank(config, gpus), max(WORKERS, LANES // gpus)
    return gpus * min((count for count in divisors(share) if count >= least), default=share)


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != defaults[name]}


def _flow(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=1_000).strip()
