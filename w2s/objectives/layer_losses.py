"""The losses between single layers of a student and of its teacher."""

from collections.abc import Callable, Sequence

from torch import Tensor

from w2s.config.sections import Config
from w2s.objectives.masked_loss import masked_loss
from w2s.optim.lr_schedule import falling_weight


class LayerLosses:
    """The losses of `mim.layers` in a step, whose weight falls over the run.

    Args:
        config: the masked stage.
        step: the step, from 0.
        micro_batches: of it; each adds its losses, whose mean counts.

    Attributes:
        reports: each loss before it was weighted, of the layers that this rank holds: `layers/LAYER` by micro-batch.
    """

    def __init__(self, config: Config, step: int, micro_batches: int) -> None:
        self.mim, self.loss = config.mim, masked_loss(config.mim.loss)
        weight = self.mim.layers_weight * falling_weight(step, config.train.steps, self.mim.layers_until)
        self.factor = weight / micro_batches
        self.reports: list[dict[str, Tensor]] = []

    def for_targets(self, targets: Sequence[Tensor], weights: Tensor | None = None) -> Callable[[int, Tensor], Tensor]:
        """Return the loss of a micro-batch, which takes the index of a student's layer and its predictions [n, k, d].

        Args:
            targets: what is to be predicted, [n, k, d] for each of `mim.layers`.
            weights: [n] of the samples, see `weighted`.
        """
        known = {pair.student: (pair.weight, target) for pair, target in zip(self.mim.layers, targets, strict=True)}

        def loss(layer: int, predictions: Tensor) -> Tensor:
            weight, target = known[layer]
            value = self.loss(predictions, target, weights)
            self.reports.append({f"layers/{layer}": value.detach()})
            return self.factor * weight * value

        return loss
