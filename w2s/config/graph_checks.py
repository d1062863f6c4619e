"""Whether a stage's layers can be replayed from CUDA graphs."""

import torch

from w2s.config.batching import views_in_phases
from w2s.config.sections import Config
from w2s.errors import ConfigError


def check_graphs(config: Config) -> None:
    """CUDA graphs need a GPU, the same shapes in every pass, and one pass at a time.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    if not config.parallel.cuda_graphs:
        return
    parallel, (frames, dropouts) = config.parallel, map(set, zip(*views_in_phases(config), strict=True))
    fixes = {
        "parallel.tensor=1": parallel.tensor > 1,
        "parallel.pipeline=1": parallel.pipeline > 1,
        "parallel.recompute=none or selective": parallel.recompute == "full",
        "precision.fp8=none": config.precision.fp8 != "none",
        "parallel.overlap_param_gather=false": parallel.overlap_param_gather,
        "model.vision.drop_path=0": config.model.vision.drop_path > 0,
        "one patch_dropout in all data.phases": len(dropouts) > 1,
        "the same frames in all data.phases": len(frames) > 1,
        "mim.layers=[]": config.stage == "mim" and bool(config.mim.layers),
        "hardware=auto on a machine with a GPU": config.hardware.device == "cpu" or not torch.cuda.device_count(),
    }
    needed = [fix for fix, is_needed in fixes.items() if is_needed]
    if needed:
        raise ConfigError(f"parallel.cuda_graphs=true needs {', '.join(needed)}: set that, or leave the graphs out")
