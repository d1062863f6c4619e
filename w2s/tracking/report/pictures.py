"""Pictures at the end of a stage: what was masked and how well it was guessed, features as colours, best and worst."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from w2s.files import writing
from w2s.redaction import printable

_DPI = 150
_CELL = 1.35  # inches of one image
_HEAD = 0.42  # of a heading
_GREY = 168
_INK, _FAINT, _GOOD, _BAD = "#1f2430", "#6b7280", "#15803d", "#b91c1c"
_MOST_NUMBERS = 49  # patches of an image that still leave room for a number in each


@dataclass(frozen=True)
class ClassExamples:
    """A class with some of its images.

    Attributes:
        name: name of the class.
        accuracy: fraction of the class's images that were recognised.
        images: uint8 [k, 3, S, S].
        predictions: name of the class that was predicted for each of the k images.
    """

    name: str
    accuracy: float
    images: Tensor
    predictions: Sequence[str]


@dataclass(frozen=True)
class ImagesFound:
    """What a caption finds first.

    Attributes:
        caption: the query.
        images: the hits, the nearest first: uint8 [k, 3, S, S].
        right: whether each of them is a right answer.
    """

    caption: str
    images: Tensor
    right: Sequence[bool]


@dataclass(frozen=True)
class CaptionsFound:
    """What an image finds first.

    Attributes:
        image: the query, uint8 [3, S, S].
        captions: the hits, the nearest first.
        right: whether each of them is a right answer.
    """

    image: Tensor
    captions: Sequence[str]
    right: Sequence[bool]


def masked_picture(path: Path, images: Tensor, masks: Tensor, cosines: Tensor, kind: str = "masked") -> None:
    """Draws images, the same with the masked patches in grey, and the cosine of prediction and target per patch.

    Masked patches have a frame on the heat map; where there are too many for frames, the seen ones are pale.

    Args:
        path: PNG to write.
        images: uint8 [n, 3, S, S].
        masks: bool [n, P], true where a patch was masked; P is a square number, row by row.
        cosines: float [n, P], NaN where there is no prediction.
        kind: whose mean is written below an image: of the `masked` patches, or of all that there are, under this name.

    Raises:
        UserError: the file cannot be written.
    """
    grid = math.isqrt(masks.shape[1])
    low, high = _limits(cosines)
    figure, axes = _grid_figure(["image", "masked", "cosine to\nthe teacher"], len(images), (low, high))
    for column, image in enumerate(images):
        mask = masks[column].reshape(grid, grid).cpu()
        cosine = cosines[column].reshape(grid, grid).float().cpu().numpy()
        _show(axes[0][column], _pixels(image))
        _show(axes[1][column], _pixels(_grey_out(image.cpu(), mask)))
        roomy = grid**2 <= _MOST_NUMBERS
        faded = np.where(mask.numpy() | roomy, 1.0, 0.35)
        axes[2][column].imshow(cosine, cmap="viridis", vmin=low, vmax=high, alpha=faded)
        if roomy:
            _mark_masked(axes[2][column], mask.numpy())
            _write_values(axes[2][column], cosine, middle=(low + high) / 2)
        counted = cosines[column][masks[column]] if kind == "masked" else cosines[column]
        axes[2][column].set_xlabel(f"{kind} {counted.nanmean():.2f}", fontsize=8, color=_INK)
    _save(figure, path)


def features_picture(path: Path, images: Tensor, student: Tensor, teacher: Tensor) -> None:
    """Draws images above the first three principal components of student and teacher features, as colours.

    The components are those of all patches of all images together. The student's three are then rotated onto the
    teacher's (orthogonal Procrustes), so that equal colours in the two rows mean the same direction.

    Args:
        path: PNG to write.
        images: uint8 [n, 3, S, S].
        student: float [n, P, D1], at least three of n x P, and of D1.
        teacher: float [n, P, D2].

    Raises:
        UserError: the file cannot be written.
    """
    teacher_components = principal_components(teacher.flatten(0, 1))
    student_components = principal_components(student.flatten(0, 1))
    left, _, right = torch.linalg.svd(student_components.T @ teacher_components)
    rows = {"student": (student, student_components @ left @ right), "teacher": (teacher, teacher_components)}
    figure, axes = _grid_figure(["image", *rows], len(images))
    for column, image in enumerate(images):
        _show(axes[0][column], _pixels(image))
    for row, (features, components) in enumerate(rows.values(), start=1):
        grid = math.isqrt(features.shape[1])
        colours = _spread(components).reshape(len(images), grid, grid, 3).numpy()
        for column, colour in enumerate(colours):
            _show(axes[row][column], colour)
    _save(figure, path)


FULL_LIGHT = 4
"""How many times an equal share of attention is drawn at full brightness."""


def attention_picture(path: Path, images: Tensor, weights: Tensor) -> None:
    """Draws images, and the same as bright as their patches are attended to, beside an equal attention to all.

    The scale is the same for all images and runs: an equal attention is a quarter of full brightness.

    Args:
        path: PNG to write.
        images: uint8 [n, 3, S, S].
        weights: float [n, P], P a square number, row by row; 1 / P each is an equal attention.

    Raises:
        UserError: the file cannot be written.
    """
    grid = math.isqrt(weights.shape[1])
    figure, axes = _grid_figure(["image", "lit by\nattention", "times an\nequal share"], len(images), (0, FULL_LIGHT))
    for column, (image, weight) in enumerate(zip(images.cpu(), weights.float().cpu(), strict=True)):
        times = (weight * grid**2).reshape(1, 1, grid, grid)
        lit = functional.interpolate(times, size=image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
        light = (lit / FULL_LIGHT).clamp(0, 1)
        _show(axes[0][column], _pixels(image))
        _show(axes[1][column], _pixels((image * light).to(torch.uint8)))
        axes[2][column].imshow(times[0, 0].numpy(), cmap="viridis", vmin=0, vmax=FULL_LIGHT)
    _save(figure, path)


def principal_components(features: Tensor) -> Tensor:
    """Scores on the first three principal components, each with unit variance.

    The sign of a component is the one that makes its largest weight positive, so that a picture is the same each time.

    Args:
        features: float [m, D].

    Returns:
        float32 [m, 3], on the CPU.
    """
    centred = features.detach().float().cpu()
    centred = centred - centred.mean(0)
    with torch.random.fork_rng(devices=[]):  # the randomised solver must not move the generator of training
        torch.manual_seed(0)
        _, _, directions = torch.pca_lowrank(centred, q=min(24, *centred.shape), center=False, niter=8)
    directions = directions[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    scores = centred @ (directions * largest.sign())
    return scores / scores.std(0).clamp_min(1e-12)


def classes_picture(path: Path, best: Sequence[ClassExamples], worst: Sequence[ClassExamples]) -> None:
    """Draws the classes that are recognised best and worst, with the predicted name under each image.

    Args:
        path: PNG to write.
        best: the best classes, best first; each with at least one image.
        worst: the worst classes, worst first.

    Raises:
        UserError: the file cannot be written.
    """
    cells = max(len(item.images) for item in [*best, *worst])
    across = min(max(1, 8 // cells), max(len(best), len(worst)))
    width, height = cells * _CELL + 0.3, _CELL + 0.85
    blocks = {"recognised best": best, "recognised worst": worst}
    rows = {title: math.ceil(len(items) / across) for title, items in blocks.items()}
    top = sum(rows.values()) * height + len(blocks) * _HEAD
    figure = Figure(figsize=(across * width, top))
    for title, items in blocks.items():
        _write(figure, 0.012 * across * width, top - 0.28, title, fontsize=12, weight="bold", va="baseline")
        top -= _HEAD
        for index, item in enumerate(items):
            _draw_class(figure, item, (index % across) * width + 0.15, top - (index // across) * height)
        top -= rows[title] * height
    _save(figure, path)


def _draw_class(figure: Figure, item: ClassExamples, left: float, top: float) -> None:
    """Draws a class with its upper left corner at (left, top)."""
    title = _lines(f"{item.name}\u00a0·\u00a0{item.accuracy:.0%}", room=17 * len(item.images), most=2)
    _write(figure, left, top - 0.36, title, fontsize=8.5, weight="bold", va="bottom")
    for index, (image, prediction) in enumerate(zip(item.images, item.predictions, strict=True)):
        colour = _GOOD if prediction == item.name else _BAD
        axes = _framed(figure, image, left + index * _CELL, top - 0.42, colour, linewidth=1.2)
        name = _lines(prediction, room=21, most=2)
        axes.set_xlabel(name, fontsize=7.5, color=colour, labelpad=3, parse_math=False)


def retrieval_picture(path: Path, by_text: Sequence[ImagesFound], by_image: Sequence[CaptionsFound]) -> None:
    """Draws captions with the images that they find first, and images with their captions; right ones are green.

    Args:
        path: PNG to write.
        by_text: captions, each with at least one image.
        by_image: images, each with at least one caption.

    Raises:
        UserError: the file cannot be written.
    """
    across = 2 + max(len(query.images) for query in by_text)
    figure = Figure(figsize=(across * _CELL, (len(by_text) + len(by_image)) * _CELL + 2 * _HEAD))
    top = figure.get_figheight()
    for title, rows in (("text to image", by_text), ("image to text", by_image)):
        _write(figure, 0.1, top - _HEAD / 2, title, fontsize=12, weight="bold")
        top -= _HEAD
        for query in rows:
            if isinstance(query, ImagesFound):
                _write(figure, 0.1, top - _CELL / 2, _lines(query.caption, room=34, most=5), fontsize=8.5)
                for place, (image, right) in enumerate(zip(query.images, query.right, strict=True), start=2):
                    _framed(figure, image, place * _CELL, top, _GOOD if right else _BAD)
            else:
                _framed(figure, query.image, _CELL / 2, top, _FAINT)
                for line, (caption, right) in enumerate(zip(query.captions, query.right, strict=True)):
                    height = top - (line + 0.5) * (_CELL - 0.1) / len(query.captions)
                    shown = _lines(caption, room=12 * across, most=1)
                    _write(figure, 2 * _CELL, height, shown, fontsize=8, color=_GOOD if right else _BAD)
            top -= _CELL
    _save(figure, path)


# Places are in inches from a figure's lower left corner.


def _write(figure: Figure, left: float, height: float, text: str, **style: Any) -> None:
    """Writes text that begins at `left`, its middle at `height`."""
    width, whole = figure.get_size_inches()
    style = {"color": _INK, "va": "center", **style}
    figure.text(left / width, height / whole, text, parse_math=False, **style)


def _framed(figure: Figure, image: Tensor, left: float, top: float, colour: str, linewidth: float = 2) -> Axes:
    """Draws an image with a frame, its upper left corner at (left, top)."""
    width, height = figure.get_size_inches()
    side = _CELL - 0.1
    axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
    _show(axes, _pixels(image))
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=linewidth)
    return axes


def _grid_figure(
    rows: Sequence[str], columns: int, bar: tuple[float, float] | None = None
) -> tuple[Figure, NDArray[np.object_]]:
    """A figure of images in rows, each with its name at the left, and at the right the colour bar of a range."""
    right = 0.1 if bar is None else 0.85
    width, height = columns * _CELL + 0.95 + right, len(rows) * _CELL + 0.35
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        gridspec_kw={
            "left": 0.95 / width,
            "right": 1 - right / width,
            "top": 1 - 0.08 / height,
            "bottom": 0.27 / height,
            "wspace": 0.06,
            "hspace": 0.06,
        },
    )
    for row, name in zip(axes, rows, strict=True):
        for cell in row:
            _bare(cell)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=_INK, labelpad=8)
    if bar is not None:
        bar_axes = figure.add_axes((1 - 0.62 / width, 0.12, 0.12 / width, 0.76))
        figure.colorbar(ScalarMappable(Normalize(*bar), cmap="viridis"), cax=bar_axes).outline.set_visible(False)
        bar_axes.tick_params(labelsize=8, colors=_FAINT, length=2)
    return figure, axes


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _show(axes: Axes, pixels: NDArray[np.generic]) -> None:
    _bare(axes)
    axes.imshow(pixels, interpolation="nearest")


def _pixels(image: Tensor) -> NDArray[np.generic]:
    return image.detach().permute(1, 2, 0).cpu().numpy()


def _grey_out(image: Tensor, mask: Tensor) -> Tensor:
    """The image [3, S, S] with the patches of `mask` [grid, grid] in grey."""
    covered = functional.interpolate(mask[None, None].float(), size=image.shape[-2:], mode="nearest")[0, 0] > 0
    return torch.where(covered, torch.full_like(image, _GREY), image)


def _mark_masked(axes: Axes, mask: NDArray[np.bool_]) -> None:
    for row, column in np.argwhere(mask):
        axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="white", linewidth=1.1))


def _write_values(axes: Axes, values: NDArray[np.generic], middle: float) -> None:
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        text = f"{value:.2f}".replace("0.", ".", 1)
        colour = "black" if value > middle else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=5.5, color=colour)


def _limits(values: Tensor) -> tuple[float, float]:
    """A range in tenths that holds all values that are numbers."""
    values = values[~values.isnan()]
    low = float(np.floor(values.min().item() * 10) / 10)
    high = float(np.ceil(values.max().item() * 10) / 10)
    return low, max(high, low + 0.1)


def _spread(components: Tensor) -> Tensor:
    """Maps each component to 0..1, its outer two percent clipped."""
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]), dim=0)
    spread: Tensor = (components - low) / (high - low).clamp_min(1e-12)
    return spread.clamp(0, 1)


def _lines(text: str, room: int, most: int) -> str:
    return "\n".join(textwrap.wrap(printable(text), room, max_lines=most, placeholder="…"))


def _save(figure: Figure, path: Path) -> None:
    with writing(path):
        figure.savefig(path, format="png", dpi=_DPI)
