"""A moving average of the weights, kept beside them (Polyak and Juditsky 1992)."""

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average of the parameters of an optimizer, in float32.

    After update t it is `average + (1 - d) (parameter - average)` with `d = min(decay, (1 + t) / (10 + t))`, the
    warm-up of TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`: it soon forgets the first weights.

    Args:
        base_optimizer: over this rank's slices in float32. It has a `found_inf` as torch's fused optimizers know
            it, and counts in `step` the updates that were made.
        decay: the decay after the warm-up.
    """

    def __init__(self, base_optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._base_optimizer, self._decay = base_optimizer, decay
        self._of = {p: p.detach().clone() for group in base_optimizer.param_groups for p in group["params"]}

    def __getitem__(self, parameter: Tensor) -> Tensor:
        """The average of a parameter: the tensor itself."""
        return self._of[parameter]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update; a step that was skipped changes nothing, and nobody waits for it."""
        if not self._of:
            return
        parameters, averages = list(self._of), list(self._of.values())
        taken = 1 - self._base_optimizer.found_inf  # type: ignore[attr-defined]
        updates = self._base_optimizer.state[parameters[0]]["step"]  # they are counted together
        weight = (9 / (10 + updates)).clamp(min=1 - self._decay) * taken
        torch._foreach_lerp_(averages, parameters, [weight] * len(averages))

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the weights as they are."""
        for parameter, average in self._of.items():
            average.copy_(parameter)

    @torch.no_grad()
    def exchange(self) -> None:
        """Let weights and average change places; a second time undoes it to the bit."""
        for parameter, average in self._of.items():
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)
