"""The evaluation stage: zero-shot classification, retrieval and k-NN of a finished CLIP."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from w2s.checkpoint.find import find
from w2s.checkpoint.handover import load_all
from w2s.checkpoint.store import read_meta
from w2s.config.layout import check_towers
from w2s.config.load import model_from
from w2s.config.sections import Config
from w2s.data.builtin.registry import without_left_out
from w2s.errors import ConfigError
from w2s.evaluation.evaluate import of_sets
from w2s.evaluation.images import EvalImages
from w2s.evaluation.zero_shot import ClassResult, ZeroShotResult
from w2s.megatron.groups import Ranks
from w2s.precision import compute_dtype
from w2s.probe import ClipProbe
from w2s.towers.build import build_clip
from w2s.tracking.pictures import ClassExamples, classes_picture
from w2s.tracking.tables import Cell
from w2s.tracking.tracker import Tracker
from w2s.trainer import open_run, test_inputs, tracked, write_result


def run(config: Config) -> None:
    """Evaluate the CLIP that `init.checkpoint` names."""
    started = time.perf_counter()
    checkpoint = find(config.init.checkpoint, Path(config.run.root).expanduser(), key="init.checkpoint", stage="clip")
    if checkpoint is None:
        raise ConfigError("init.checkpoint=none leaves nothing to evaluate: give a clip run, or latest")
    with open_run(config) as (ranks, pulse, folder):
        pulse.at("evaluating", long=True)
        config.eval.sets = without_left_out(config.data, config.eval.sets)
        trained = read_meta(checkpoint)
        loss = replace(config.clip, loss=trained.setting("clip", "loss"))
        config = replace(config, model=model_from(trained.config), clip=loss)
        check_towers(config)
        tracker = Tracker(config, folder, main=ranks.main, tags={"w2s.parent_checkpoint": str(checkpoint)})
        with tracked(tracker):
            tracker.message(f"run folder: {folder}")
            tracker.inputs(test_inputs(config))
            metrics = evaluate(config, checkpoint, tracker, ranks)
            write_result(folder, config, metrics, started, ranks)


def evaluate(config: Config, checkpoint: Path, tracker: Tracker, ranks: Ranks) -> dict[str, float]:
    """Measure a checkpoint, show tables and pictures, return the metrics."""
    vision, text = build_clip(config, compute_dtype(config.precision), ranks.device)
    load_all({"vision": vision, "text": text}, checkpoint)
    probe = ClipProbe(config, ranks)
    galleries = probe.galleries(vision)
    results = {name: probe.measure(vision, text, name, galleries=galleries) for name in config.eval.by_name}
    metrics = of_sets({name: result.metrics for name, result in results.items()}) | probe.baselines()
    meta = read_meta(checkpoint)
    tracker.log(meta.step, meta.samples, metrics)
    tracker.results(metrics, str(checkpoint))
    for name, result in results.items():
        if result.zero_shot is not None and config.tracking.pictures:
            test = probe.test_set(name)
            images = probe.images(test, config.model.vision.image_size, how=result.resize)
            _show_classes(name, result.zero_shot, images, config.tracking.pictures, tracker)
    return metrics


def _show_classes(name: str, result: ZeroShotResult, images: EvalImages, count: int, tracker: Tracker) -> None:
    """Table and picture of the `count` classes of a test set that are recognised best and worst."""
    file = f"classes_{name}" if name else "classes"
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
    (shown,) = images.only(np.array(numbers)).read()
    return ClassExamples(result.name, result.top1, shown, named)
