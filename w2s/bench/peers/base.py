"""What the steps of all peers have in common: autocast, accumulation, the optimizer, torch.compile."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from timm.optim.lamb import Lamb
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from w2s.bench.marks import Marks
from w2s.config.sections import Config, OptimConfig
from w2s.data.samples.batch import Batch
from w2s.data.samples.sample import SampleSpec


class Peer(ABC):
    """A peer's step: float32 weights, autocast where ours computes in bfloat16; compiled on a GPU."""

    def __init__(self, config: Config, model: nn.Module, spec: SampleSpec, device: torch.device) -> None:
        self.config, self.model, self.spec, self.device = config, model, spec, device
        self.compiled = device.type == "cuda"
        if self.compiled:
            model.compile()
        self.optimizer = peer_optimizer(model, config.optim)

    def step(self, batch: Batch, marks: Marks) -> None:
        """Update the weights once, with a global batch; the parts of the step are marked."""
        micro_batches = batch.to(self.device).split(self.config.train.micro_batch)
        for micro in micro_batches:
            loss = self.loss(micro, marks)
            with marks.part("backward"):
                (loss / len(micro_batches)).backward()
        with marks.part("optimizer"):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad or float("inf"))
            self.optimizer.step()
            self.optimizer.zero_grad()

    @abstractmethod
    def loss(self, micro: Batch, marks: Marks) -> Tensor:
        """Return the loss of a micro-batch; the teacher and the forward pass are marked."""

    @abstractmethod
    def forward_flops(self) -> float:
        """Count the operations of the trained towers' forward pass for one sample, without computing it."""

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision.compute == "bf16")


def peer_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, or timm's LAMB with a trust ratio at weight decay 0 too; `step` clips."""
    settings: dict[str, Any] = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.name == "lamb":
        return Lamb(model.parameters(), max_grad_norm=None, always_adapt=True, **settings)
    return torch.optim.AdamW(model.parameters(), fused=True, **settings)


def forward_flops(model: nn.Module, *inputs: Tensor) -> float:
    """Count the operations of a model's forward pass: two for a multiplication and an addition."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return float(counter.get_total_flops())
