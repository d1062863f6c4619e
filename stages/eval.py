"""The evaluation stage: zero-shot classification, retrieval, k-NN and a linear probe of a finished CLIP."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from w2s.checkpoint.export.registering import register_clip
from w2s.checkpoint.find import find_any
from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.starts.handover import load_all
from w2s.config.layout_checks import check_towers
from w2s.config.load import model_from
from w2s.config.precision import compute_dtype
from w2s.config.sections import Config, Resize
from w2s.config.suites import Suite, load_suite
from w2s.data.builtin.builtin_sets import without_left_out
from w2s.evaluation.clip_evaluator import ClipEvaluator
from w2s.evaluation.evaluate import ClipResult, of_sets, under
from w2s.evaluation.images import EvalImages, stills
from w2s.evaluation.scores.zero_shot import ClassResult, ZeroShotResult
from w2s.evaluation.suite import as_measured, differences, find_sets, means, score, table
from w2s.evaluation.tower_features import attention_of_cls
from w2s.megatron.parallel.optimizer import Towers
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.run import open_run, origins, recorded, test_inputs
from w2s.towers.build import build_clip
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


def run(config: Config) -> None:
    """Evaluate the CLIP that `init.checkpoint` names."""
    started = time.perf_counter()
    checkpoint = find_any(config.init.checkpoint, Path(config.run.root).expanduser(), key="init.checkpoint")
    with open_run(config) as (ranks, heartbeat, folder):
        heartbeat.at("evaluating", long=True)
        suite = load_suite(config.eval.suite) if config.eval.suite else None
        if suite is None:
            sets = without_left_out(config.data, config.eval.sets)
        else:
            sets = find_sets(config.eval.suite, suite, config.eval.root)
        trained = read_meta(checkpoint)
        loss = replace(config.clip, loss=trained.setting("clip", "loss"))
        config = replace(config, model=model_from(trained.config), clip=loss, eval=replace(config.eval, sets=sets))
        check_towers(config)
        inputs = test_inputs(config)
        facts = {**origins(config, str(checkpoint)), "checkpoint": str(checkpoint.absolute())}
        tracker = Tracker(config, folder, main=ranks.main, facts=facts)
        with recorded(tracker, folder, config, started, ranks) as metrics:
            tracker.inputs(inputs)
            metrics |= evaluate(config, suite, checkpoint, tracker, ranks)
    register_clip(config, folder, checkpoint, ranks)


def evaluate(config: Config, suite: Suite | None, checkpoint: Path, tracker: Tracker, ranks: Ranks) -> dict[str, float]:
    """Measure a checkpoint, show tables and pictures, return the metrics."""
    vision, text = build_clip(config, compute_dtype(config.precision), ranks.device)
    load_all({"vision": vision, "text": text}, checkpoint, config.eval.weights)
    evaluator = ClipEvaluator(config, ranks)
    measured, resized, sizes = dict[str, dict[str, float]](), dict[str, Resize](), dict[str, int]()
    for name, rules, result in _measure({"vision": vision, "text": text}, evaluator, suite):
        measured[name], resized[name], sizes[name] = result.metrics, result.resize, len(rules.test_set(name))
        if config.tracking.pictures:
            _show(name, result, rules, config.tracking.pictures, tracker)
        if config.tracking.pictures and len(measured) == 1:  # of one set says enough
            _show_attention(name, vision, rules, config.tracking.pictures, tracker)
    metrics = of_sets(measured) | evaluator.baselines()
    if suite is not None:
        metrics |= under(Path(config.eval.suite).stem, means(suite, measured))
        tracker.table("suite", *table(suite, _name(checkpoint), measured, resized), suite.title)
        for difference in differences(suite, sizes):
            tracker.message(difference)
    meta = read_meta(checkpoint)
    tracker.log(meta.step, meta.samples, metrics)
    tracker.results(metrics, str(checkpoint))
    return metrics


def _measure(
    towers: Towers, evaluator: ClipEvaluator, suite: Suite | None
) -> Iterator[tuple[str, ClipEvaluator, ClipResult]]:
    """Measure the test sets one after the other, each with the probe of its rules."""
    vision, text = towers["vision"], towers["text"]
    sets = evaluator.config.eval.by_name
    if suite is None:
        galleries = evaluator.galleries(vision)
        for name in sets:
            yield name, evaluator, evaluator.measure(vision, text, name, galleries=galleries)
        return
    for one in suite.sets:
        if one.name in sets:
            own = ClipEvaluator(as_measured(evaluator.config, suite, one, sets[one.name]), evaluator.ranks)
            galleries, rule = own.galleries(vision), partial(score, one, suite)
            yield one.name, own, own.measure(vision, text, one.name, galleries=galleries, score=rule)


def _name(checkpoint: Path) -> str:
    """The run that a checkpoint is of."""
    return checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else checkpoint.name


def _show(name: str, result: ClipResult, evaluator: ClipEvaluator, count: int, tracker: Tracker) -> None:
    """Tables and pictures of a test set; the main rank alone decodes what is in them."""
    images = evaluator.images(evaluator.test_set(name), evaluator.config.model.vision.image_size, how=result.resize)
    if result.zero_shot is not None:
        _show_classes(name, result.zero_shot, images, count, tracker)
    if result.found:
        tracker.picture(_file("retrieval", name), lambda path: retrieval_picture(path, *_found(result, images)))


def _show_attention(
    name: str, vision: ShardedTower[ImageTower], evaluator: ClipEvaluator, count: int, tracker: Tracker
) -> None:
    """Picture of what the embedding looks at in some test images; every rank computes."""
    data = evaluator.test_set(name)
    numbers = np.unique(np.linspace(0, len(data) - 1, count).astype(int))
    (read,) = evaluator.images(data, evaluator.config.model.vision.image_size).only(numbers).read()
    shown = stills(read)
    looks = attention_of_cls(vision, shown)
    tracker.picture(_file("attention", name), lambda path: attention_picture(path, shown, looks))


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


def _read(images: EvalImages, numbers: list[int]) -> Tensor:
    """Some images, of clips the middle frames: uint8 [n, 3, S, S]."""
    (shown,) = images.only(np.array(numbers)).read()
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
    numbers = result.images[:2]
    named = [images.data.class_names[int(predictions[number])] for number in numbers]
    return ClassExamples(result.name, result.top1, _read(images, numbers), named)
