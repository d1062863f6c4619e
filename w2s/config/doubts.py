"""What can run, but is hardly meant: the user is told, and not stopped."""

from w2s.config.batching import lanes_per_rank
from w2s.config.sections import Config


def doubts(config: Config, world_size: int) -> list[str]:
    """What can run on so many ranks, but is hardly meant: a line each."""
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
