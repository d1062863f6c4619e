"""Tables and pictures of a measured CLIP: its best and worst classes, what queries find, what it attends to."""

import numpy as np
from torch import Tensor

from w2s.evaluation.by_texts import ClipResult
from w2s.evaluation.clip_evaluator import ClipEvaluator
from w2s.evaluation.images import EvalImages, stills
from w2s.evaluation.scores.zero_shot import ClassResult, ZeroShotResult
from w2s.evaluation.tower_features import attention_of_cls
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.towers.clip import ImageTower
from w2s.tracking.report.pictures import (
    CaptionsFound,
    ClassExamples,
    ImagesFound,
    attention_picture,
    classes_picture,
    retrieval_picture,
)
from w2s.tracking.tables import Cell
from w2s.tracking.tracker import Tracker


def show_set(name: str, result: ClipResult, evaluator: ClipEvaluator, tracker: Tracker) -> None:
    """Show the classes and the findings of a test set; the main rank alone decodes images."""
    config = evaluator.config
    images = evaluator.images(evaluator.test_set(name), config.model.vision.image_size, how=result.resize)
    if result.zero_shot is not None:
        _show_classes(name, result.zero_shot, images, config.tracking.pictures, tracker)
    if result.found:
        tracker.picture(_file("retrieval", name), lambda path: retrieval_picture(path, *_found(result, images)))


def show_attention(name: str, vision: ShardedTower[ImageTower], evaluator: ClipEvaluator, tracker: Tracker) -> None:
    """Show what the embedding attends to in some images of a test set; every rank computes."""
    config, data = evaluator.config, evaluator.test_set(name)
    indices = np.unique(np.linspace(0, len(data) - 1, config.tracking.pictures).astype(int))
    shown = _read(evaluator.images(data, config.model.vision.image_size), indices.tolist())
    attention = attention_of_cls(vision, shown)
    tracker.picture(_file("attention", name), lambda path: attention_picture(path, shown, attention))


def _file(kind: str, name: str) -> str:
    """The file of a table or a picture of a test set."""
    return f"{kind}_{name}" if name else kind


def _found(result: ClipResult, images: EvalImages) -> tuple[list[ImagesFound], list[CaptionsFound]]:
    """What some captions and some images find first."""
    texts = result.captions.texts if result.captions else []
    return (
        [
            ImagesFound(texts[found.query], _read(images, found.hits), found.right)
            for found in result.found["text_to_image"]
        ],
        [
            CaptionsFound(_read(images, [found.query])[0], [texts[hit] for hit in found.hits], found.right)
            for found in result.found["image_to_text"]
        ],
    )


def _read(images: EvalImages, indices: list[int]) -> Tensor:
    """Some images, of clips the middle frames: uint8 [n, 3, S, S]."""
    (shown,) = images.only(np.array(indices)).read()
    return stills(shown)


def _show_classes(name: str, result: ZeroShotResult, images: EvalImages, count: int, tracker: Tracker) -> None:
    """Table and picture of the `count` classes of a test set that are recognised best and worst."""
    file = _file("classes", name)
    title = f"best and worst classes of {name}" if name else "best and worst classes"
    ends = {"best": result.classes[:count], "worst": result.classes[::-1][:count]}
    rows: list[list[Cell]] = [
        [end, c.name, c.top1, c.margin, c.confused_with] for end, classes in ends.items() for c in classes
    ]
    tracker.table(file, ["", "class", "top-1", "margin", "taken for"], rows, title)
    tracker.picture(
        file,
        lambda path: classes_picture(
            path, *([_examples(each, images, result.predictions) for each in classes] for classes in ends.values())
        ),
    )


def _examples(result: ClassResult, images: EvalImages, predictions: Tensor) -> ClassExamples:
    indices = result.images[:2]
    named = [images.data.class_names[int(predictions[index])] for index in indices]
    return ClassExamples(result.name, result.top1, _read(images, indices), named)
