"""Print the table of teachers in the README: width of a target, input, patches and cost of an image.

    python tools/teacher_table.py

Every network is built on the meta device, without weights, and its multiply-adds are counted (two operations each).
"""

from importlib.resources import files

import torch
from torch.utils.flop_counter import FlopCounterMode

from w2s.config.load import load, named_model
from w2s.config.sections import TeacherConfig
from w2s.teachers.base import PatchNetwork
from w2s.teachers.efficientnet import SIZES, EfficientNetLite
from w2s.teachers.eva_vit import without_weights
from w2s.teachers.open_clip_vit import open_clip_model
from w2s.teachers.timm_vit import timm_model

GRID = 16
"""Patches along one side of a 224 px student."""


def network(config: TeacherConfig) -> PatchNetwork:
    """The teacher's network without its weights."""
    kind, _, rest = config.source.partition(":")
    name = rest.partition("@")[0]
    if config.source in SIZES:
        return EfficientNetLite(config.source, image_size=0, grid=GRID).to("meta")
    if kind == "eva":
        return without_weights(named_model(name))
    with torch.device("meta"):
        return (timm_model if kind == "timm" else open_clip_model)(name, None, image_size=0)


def row(config: TeacherConfig) -> str:
    """A row of the table."""
    teacher = network(config).eval().requires_grad_(False)
    side, grid = teacher.image_size, teacher.grid
    with FlopCounterMode(display=False) as counter:
        teacher(torch.empty(1, 3, side, side, device="meta"))
    parameters = sum(parameter.numel() for parameter in teacher.parameters()) / 1e6
    cost = counter.get_total_flops() / 1e9
    cells = [f"`{config.name}`", f"{parameters:,.0f}", f"{teacher.width}", f"{side}", f"{side // grid}", f"{cost:,.1f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("| `teacher=` | million parameters | width | input, px | patch, px | GFLOP an image |")
    print("|---|---|---|---|---|---|")
    for path in sorted((files("w2s.configs") / "teacher").iterdir(), key=lambda path: path.name):
        print(row(load("mim", [f"teacher={path.name.removesuffix('.yaml')}"]).teacher))
