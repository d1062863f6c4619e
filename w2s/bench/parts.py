"""The parts of a stage's step, marked from outside: hooks on its modules, its optimizer and the process groups."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work

from w2s import compat
from w2s.bench.marks import Parts
from w2s.training.stage import Stage

PARTS = ("data", "teacher", "forward", "backward", "optimizer", "communication")
"""The names of the parts, in the order of a step; what is left is `marks.REST`."""

_COLLECTIVES = ("all", "broadcast", "gather", "recv", "reduce", "scatter", "send", "_allgather", "_reduce_scatter")
"""How the methods of a process group begin that move tensors."""


@contextmanager
def marked(stage: Stage, marks: Parts) -> Iterator[None]:
    """Mark the parts of a stage's steps for as long as the block lasts.

    Communication is what a rank spends on it alone: collectives that run beside the computation count from where the
    rank begins to wait for them. It is taken out of the part in which it happens.

    """
    with ExitStack() as undo:
        for tower in stage.towers.values():
            for chunk in tower.chunks:
                _mark_module(chunk, "forward", marks, undo)
                undo.callback(chunk.register_forward_hook(_backward_marker(marks)).remove)
        for teacher in stage.teachers:
            _mark_module(teacher, "teacher", marks, undo)
        for name in ("zero_grad", "step"):
            _mark_method(stage.optimizer, name, "optimizer", marks, undo)
        for name in dir(ProcessGroup):
            if name.startswith(_COLLECTIVES):
                _mark_method(ProcessGroup, name, "communication", marks, undo)
        _mark_method(Work, "wait", "communication", marks, undo)
        yield


def _mark_module(module: nn.Module, part: str, marks: Parts, undo: ExitStack) -> None:
    def begin(*unused: Any) -> None:
        marks.begin(part)

    def end(*unused: Any) -> None:
        marks.end()

    undo.callback(module.register_forward_pre_hook(begin).remove)
    undo.callback(module.register_forward_hook(end).remove)


def _backward_marker(marks: Parts) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that marks the backward pass: from the gradient of the output on, up to the end of the pass."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        begun = False

        def begin(gradient: Tensor) -> None:
            nonlocal begun
            if not begun:
                marks.begin("backward")
                compat.after_backward(marks.end)
            begun = True

        for part in [output] if isinstance(output, Tensor) else output or ():
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(begin)

    return hook


def _mark_method(owner: Any, name: str, part: str, marks: Parts, undo: ExitStack) -> None:
    """Put a marked call in the place of a method of an object or of a class, until it is undone."""
    original, defined = getattr(owner, name), vars(owner).get(name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with marks.part(part):
            return original(*args, **kwargs)

    setattr(owner, name, call)
    # What a class gives out is not what it holds.
    undo.callback(*((delattr, owner, name) if defined is None else (setattr, owner, name, defined)))
