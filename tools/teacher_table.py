"""Print the table of teachers in docs/teachers.md: width of a target, input, patches and cost of an image.

    python tools/teacher_table.py

Every network is built on the meta device, without weights, and its multiply-adds are counted (two operations each).
"""

from importlib.resources import files

import torch
from torch.utils.flop_counter import FlopCounterMode

from w2s.config.load import load
from w2s.config.sections import TeacherConfig
from w2s.teachers.build import without_weights

GRID = 16
"""Patches along one side of a 224 px student."""


def row(config: TeacherConfig) -> str:
    """A row of the table."""
    teacher = without_weights(config, grid=GRID)
    side, grid = teacher.image_size, teacher.grid
    with FlopCounterMode(display=False) as counter:
        teacher(torch.empty(1, 3, side, side, device="meta"))
    parameters = sum(parameter.numel() for parameter in teacher.parameters()) / 1e6
    cost = counter.get_total_flops() / 1e9
    cells = [f"`{config.name}`", f"{parameters:,.0f}", f"{teacher.width}", f"{side}", f"{side // grid}", f"{cost:,.1f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("| `teacher=` | million parameters | width | input, px | patch, px | GFLOP per image |")
    print("|---|---|---|---|---|---|")
    for path in sorted((files("w2s.configs") / "teacher").iterdir(), key=lambda path: path.name):
        print(row(load("mim", [f"teacher={path.name.removesuffix('.yaml')}"]).teacher))
