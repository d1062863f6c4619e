"""What the command line asks the planner for."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from w2s.config.load import load
from w2s.config.sections import Config, TrainConfig
from w2s.errors import UserError

TRAINED = ("mim", "clip")
"""Stages with steps that can be planned."""
ON_GPUS = ("precision.compute=bf16", "teacher.precision=bf16", "hardware.device=cuda")
"""Settings that are planned with unless the command line has others."""


@dataclass(frozen=True)
class Request:
    """Stages to be planned, with the same model, on the same GPUs."""

    stages: tuple[str, ...]
    overrides: tuple[str, ...]
    gpus: int
    card: str
    batches: Mapping[str, int]
    """Samples of a stage's step over all GPUs; without one the configuration's, or the nearest that they can share."""

    @property
    def fixed(self) -> frozenset[str]:
        """Keys that the command line gives a value."""
        return frozenset(override.partition("=")[0] for override in self.overrides)

    def config(self, stage: str, gpus: int) -> Config:
        """Return the configuration of a stage on a number of GPUs.

        Raises:
            ConfigError: the overrides do not make one.
        """
        config = load(stage, [*ON_GPUS, *self.overrides])
        return replace(config, train=_for_gpus(config.train, self.batches.get(stage), gpus))

    @property
    def command(self) -> str:
        """The command line, quoted for a shell."""
        batches = [word for stage, size in self.batches.items() for word in ("--batch", f"{stage}={size}")]
        options = ["--gpus", str(self.gpus), "--card", self.card, *batches]
        return shlex.join(["w2s", "plan", *self.stages, *self.overrides, *options])


def request(arguments: Sequence[str], gpus: int, card: str, batches: Sequence[str] = ()) -> Request:
    """Return what is asked for.

    Args:
        arguments: one or more stages, then overrides.
        gpus: how many there are.
        card: their name in cards.yaml.
        batches: samples of a step over all GPUs, `N` for every stage or `STAGE=N` for one.

    Raises:
        UserError: there is no stage among the arguments, or one that is not trained; a batch is not a number.
    """
    stages = tuple(argument for argument in arguments if "=" not in argument)
    unknown = [stage for stage in stages if stage not in TRAINED]
    if unknown or not stages:
        named = f"stage {unknown[0]} is not one that is planned" if unknown else "w2s plan asks for no stage"
        raise UserError(f"{named}: use mim, clip, or both, as in `w2s plan mim model=eva_18b`")
    overrides = tuple(argument for argument in arguments if "=" in argument)
    return Request(stages, overrides, gpus, card, _by_stage(batches, stages))


def _by_stage(batches: Sequence[str], stages: tuple[str, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for given in batches:
        stage, _, size = given.rpartition("=")
        if stage not in ("", *stages) or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--batch {given} is not a batch of {' or '.join(stages)}: use 4096, or {stages[0]}=4096")
        sizes |= dict.fromkeys([stage] if stage else stages, int(size))
    return sizes


def _for_gpus(train: TrainConfig, batch: int | None, gpus: int) -> TrainConfig:
    """The same number of samples in batches of another size, in whole steps."""
    size = batch or max(1, round(train.global_batch / gpus)) * gpus
    if size == train.global_batch:
        return train
    samples = train.steps * train.global_batch
    return replace(train, global_batch=size, steps=math.ceil(samples / size))
