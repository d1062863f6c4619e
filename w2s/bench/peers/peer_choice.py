"""Which peer can run a stage, and how."""

from w2s.config.sections import Config
from w2s.errors import ConfigError

PEERS = {"mim": "timm", "clip": "open_clip"}
"""The peer of each stage."""


def check_peer(config: Config, peer: str, ranks: int) -> None:
    """Refuse a peer that cannot do the same step.

    Raises:
        ConfigError: with the fix.
    """
    if PEERS[config.stage] != peer:
        raise ConfigError(f"--vs {peer} does not run stage {config.stage}: use --vs {PEERS[config.stage]}")
    if ranks > 1:
        raise ConfigError(f"--vs {peer} runs on one rank, not on --nproc {ranks}: leave --nproc out")
    if config.stage == "mim":
        if len(config.teacher_losses) > 1:
            raise ConfigError(f"--vs {peer} has one teacher: leave teachers out")
        if config.mim.layers:
            raise ConfigError(f"--vs {peer} predicts after the last layer alone: leave mim.layers out")
        if config.mim.summary_weight:
            raise ConfigError(f"--vs {peer} has no summary target: leave mim.summary_weight out")
        return
    if config.train.global_batch > config.train.micro_batch:
        raise ConfigError(
            f"--vs {peer} takes all pairs at once: train.micro_batch={config.train.micro_batch} is less than "
            f"train.global_batch={config.train.global_batch}, use --micro-batch"
        )
    if config.clip.loss != "softmax":
        raise ConfigError(f"--vs {peer} has the softmax loss, not clip.loss={config.clip.loss}: use clip.loss=softmax")
    if config.stage_teachers:
        raise ConfigError(
            f"--vs {peer} has no teacher, and clip.distill.source={config.clip.distill.source} names one: leave it out"
        )
    if config.data.phases:
        raise ConfigError(f"--vs {peer} knows no data.phases: leave them out")
    if config.data.frames > 1:
        raise ConfigError(f"--vs {peer} sees images, data.frames={config.data.frames} makes clips: leave it out")
