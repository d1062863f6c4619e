"""Checks across sections and against the machine: what a user would get wrong is refused before a run starts.

The rules of single keys stand beside them (`rules.py`); of what computes, each subject has a file beside this one.
"""

import torch

from w2s.config.batching import lanes_per_rank
from w2s.config.fp8_checks import check_fp8_layout, check_linears
from w2s.config.layout_checks import check_graphs, check_lanes, check_micro_batches, check_ranks, check_towers
from w2s.config.rules import check_rules, require
from w2s.config.sections import Config, HardwareConfig
from w2s.config.stage_checks import (
    check_contrastive_stage,
    check_data,
    check_evaluation,
    check_init,
    check_masked_stage,
    check_optimizer,
)
from w2s.config.teacher_checks import check_teachers


def check(config: Config, world_size: int, local_size: int) -> None:
    """Refuse what cannot run.

    Args:
        config: the configuration of one stage.
        world_size: ranks in all.
        local_size: ranks on this machine.

    Raises:
        ConfigError: with the key, its value and legal values.
    """
    check_settings(config)
    _check_device(config.hardware, local_size)
    check_ranks(config, world_size)
    check_linears(config)
    if config.stage == "eval":
        check_evaluation(config)
        return
    check_data(config)
    check_towers(config)
    check_micro_batches(config, world_size)
    check_lanes(config.data.lanes, config.train.global_batch, world_size, config.parallel)
    check_fp8_layout(config, world_size)
    check_graphs(config)


def check_settings(config: Config) -> None:
    """Refuse what would be wrong on any number of ranks and any machine.

    Raises:
        ConfigError: with the key, its value and legal values.
    """
    check_rules(config, "tracking")
    if config.stage == "eval":
        return
    check_optimizer(config)
    check_init(config)
    check_teachers(config)
    if config.stage == "mim":
        check_masked_stage(config)
    else:
        check_contrastive_stage(config)


def _check_device(hardware: HardwareConfig, local_size: int) -> None:
    cards = torch.cuda.device_count()
    require(
        hardware.device != "cuda" or cards > 0,
        "this machine has no GPU that torch can use, but hardware.device=cuda: use hardware=cpu",
    )
    require(
        hardware.device == "cpu" or not 0 < cards < local_size,
        f"{local_size} ranks on a machine with {cards} GPUs: use --nproc {cards}, or hardware=cpu",
    )


def doubts(config: Config, world_size: int) -> list[str]:
    """What can run on so many ranks, but is hardly meant: a line each; the user is told, and not stopped."""
    return [*_rate_of_a_random_text_tower(config), *_idle_workers(config, world_size)]


def _rate_of_a_random_text_tower(config: Config) -> list[str]:
    """EVA's rates for text are a tenth of those for vision."""
    optim, init = config.optim, config.init
    text, vision = optim.text_lr or optim.lr, optim.vision_lr or optim.lr
    if config.stage != "clip" or {init.text, init.checkpoint} != {"none"} or 5 * text > vision:
        return []
    return [
        f"the text tower starts from random weights at optim.text_lr={text:g}, a rate for a finished one beside "
        f"optim.vision_lr={vision:g}: name one, such as init.text=teacher, or raise the rate"
    ]


def _idle_workers(config: Config, world_size: int) -> list[str]:
    lanes = lanes_per_rank(config.data.lanes, config.train.global_batch, world_size)
    workers = config.data.workers
    if workers > max(1, lanes):
        return [
            f"data.workers={workers} are {lanes} on each rank, as many as it has of data.lanes={config.data.lanes}: "
            f"use data.lanes={workers * world_size}, or fewer workers"
        ]
    if workers and lanes % workers:
        return [
            f"data.workers={workers} do not divide the {lanes} lanes that a rank reads in a step (data.lanes="
            f"{config.data.lanes} on {world_size} ranks): the workers with more of them hold up the others"
        ]
    return []
