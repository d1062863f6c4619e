"""The losses between single layers of a student and of its teacher."""

from collections.abc import Callable, Sequence

from torch import Tensor

from w2s.config.sections import MimConfig
from w2s.objectives.masked_loss import LOSSES


class LayerLosses:
    """The losses of `mim.layers` in a step.

    Args:
        mim: which layers, by which loss and with what weights.
        factor: what all of them are multiplied by.

    Attributes:
        reports: each loss before it was weighted, of the layers that this rank holds: `layers/LAYER` by micro-batch.
    """

    def __init__(self, mim: MimConfig, factor: float) -> None:
        self.mim, self.factor = mim, factor
        self.reports: list[dict[str, Tensor]] = []

    def for_targets(self, targets: Sequence[Tensor]) -> Callable[[int, Tensor], Tensor]:
        """Return the loss of a micro-batch, which takes the number of a student's layer and its predictions [n, k, d].

        Args:
            targets: what is to be predicted, [n, k, d] for each of `mim.layers`.
        """
        known = {pair.student: (pair.weight, target) for pair, target in zip(self.mim.layers, targets, strict=True)}

        def loss(layer: int, predictions: Tensor) -> Tensor:
            weight, target = known[layer]
            value = LOSSES[self.mim.loss](predictions, target)
            self.reports.append({f"layers/{layer}": value.detach()})
            return self.factor * weight * value

        return loss
