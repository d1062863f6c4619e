"""The evaluations that stages ask for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from w2s.config.sections import EvalConfig
from w2s.errors import DataError
from w2s.evaluation.by_gallery import Gallery, evaluate_by_gallery, in_common
from w2s.evaluation.by_texts import encode_texts, evaluate_clip
from w2s.evaluation.dataset import EvalSet
from w2s.evaluation.metric_names import of_sets
from w2s.evaluation.scores.linear_probe import train_probe

COLOURS = {"red": 0, "green": 1, "blue": 2}


def eval_set(words, class_names=tuple(COLOURS), captions=None, labels="from words"):
    """A set with a sample for each word."""
    class_indices = torch.tensor([list(class_names).index(word) for word in words]) if labels else None
    places = np.zeros((len(words), 2), dtype=np.int64)
    texts = list(words) if captions is None else captions
    return EvalSet(["0.tar"], places, texts, class_indices, list(class_names), list(words))


def features(words):
    """The colours of images, brighter from one to the next."""
    return torch.eye(3)[[COLOURS[word] for word in words]] * torch.arange(1, len(words) + 1)[:, None]


def encode_text(tokens):
    return torch.eye(3)[tokens[:, 0]]


def tokenize(texts):
    return torch.tensor([[next(index for colour, index in COLOURS.items() if colour in text)] for text in texts])


def clip(data, encode_text=encode_text, **config):
    config = EvalConfig(batch_size=2, **config)
    texts = encode_texts(config, data, encode_text=encode_text, tokenize=tokenize)
    return evaluate_clip(data, features(data.keys), texts)


def by_gallery(test, neighbours, probe=False):
    known, seen = features(neighbours.keys), features(test.keys)
    gallery = Gallery(neighbours, known, train_probe(known, neighbours.labels) if probe else None)
    return evaluate_by_gallery(test, gallery, features=seen, probed=seen, k=1)


def test_a_perfect_clip():
    result = clip(eval_set(["red", "blue", "red", "green"]), templates="simple")
    assert result.metrics == {
        "zero_shot/top1": 1,
        "zero_shot/top5": 1,
        "zero_shot/mean_per_class": 1,
        "zero_shot/chance_top1": 1 / 3,
        "zero_shot/chance_top5": 1,
        **{
            f"retrieval/{way}_recall_at_{k}": 1
            for way in ("image_to_text", "text_to_image", "mean")
            for k in (1, 5, 10)
        },
    }
    assert result.zero_shot.predictions.tolist() == [0, 2, 0, 1]


def test_a_clip_that_takes_red_for_green():
    def confused(tokens):
        return torch.eye(3)[torch.tensor([1, 0, 2])[tokens[:, 0]]]

    result = clip(eval_set(["red", "blue", "red", "green"]), encode_text=confused)
    assert result.metrics["zero_shot/top1"] == 1 / 4
    assert result.metrics["zero_shot/mean_per_class"] == pytest.approx(1 / 3)
    assert result.metrics["retrieval/image_to_text_recall_at_1"] == 1 / 4
    worst = result.zero_shot.classes[-1]
    assert (result.zero_shot.classes[0].name, worst.top1) == ("blue", 0)


def test_what_a_set_lacks_is_not_measured():
    names = clip(eval_set(["red", "blue"]), retrieval=False).metrics
    assert {name.split("/")[0] for name in names} == {"zero_shot"}
    assert {name.split("/")[0] for name in clip(eval_set(["red"], captions=[])).metrics} == {"zero_shot"}
    several = clip(eval_set(["red", "blue"], labels=None, captions=["red\ndark red", "blue"]))
    assert {name.split("/")[0] for name in several.metrics} == {"retrieval"}
    assert several.zero_shot is None
    assert several.metrics["retrieval/text_to_image_recall_at_1"] == 1


def test_several_classes_an_image_are_ranked():
    data = eval_set(["red", "blue", "red", "green"], captions=[])
    data.labels = torch.nn.functional.one_hot(data.labels, 3).bool()
    data.labels[1, 0] = True  # "blue" is "red" too, and last of three among the reds' ties
    result = clip(data)
    assert result.zero_shot is None
    assert result.metrics == {
        "zero_shot/mean_average_precision": pytest.approx((1 + 1 + 1) / 3),
        "zero_shot/chance_mean_average_precision": pytest.approx(5 / 12),
    }


def test_knn_matches_classes_by_name():
    neighbours = eval_set(["blue", "red", "red"], class_names=("blue", "red"))
    assert by_gallery(eval_set(["red", "green", "blue"]), neighbours) == {
        "knn": {"top1": 1, "top5": 1, "chance_top1": 1 / 2, "coverage": pytest.approx(2 / 3)}
    }


def test_a_linear_probe_beside_it():
    neighbours = eval_set(["blue", "red"] * 10, class_names=("blue", "red"))
    measured = by_gallery(eval_set(["red", "green", "blue"]), neighbours, probe=True)["linear_probe"]
    assert measured.pop("inverse_strength") > 0
    assert measured == {"top1": 1, "top5": 1, "mean_per_class": 1, "coverage": pytest.approx(2 / 3)}


def test_a_set_without_classes_in_common_has_no_coverage():
    neighbours = eval_set(["blue", "red"])
    for data in (eval_set(["green"]), eval_set(["red"], labels=None)):
        assert by_gallery(data, neighbours) == {"knn": {"coverage": 0}}


def test_metrics_of_named_sets():
    assert of_sets({"": {"knn/top1": 1}}) == {"knn/top1": 1}
    assert of_sets({"a": {"knn/top1": 1}, "b": {"knn/top1": 0}}) == {"a/knn/top1": 1, "b/knn/top1": 0}


def test_neighbours_need_classes_in_common():
    neighbours = eval_set(["blue"])
    assert in_common([eval_set(["red"]), eval_set(["blue"])], neighbours)
    assert not in_common([eval_set(["red"])], neighbours)
    with pytest.raises(DataError, match=r"eval\.knn_shards has no class for each image"):
        in_common([neighbours], eval_set(["red"], labels=None))


def test_a_set_may_have_prompts_of_its_own():
    seen = []

    def tokenize_and_keep(texts):
        seen.extend(texts)
        return tokenize(texts)

    data = replace(eval_set(["red", "blue"], class_names=("red", "blue")), prompts=["a {c} wall", "{c} and {c}"])
    config = EvalConfig(templates="own", retrieval=False)
    encoders = {"encode_text": encode_text, "tokenize": tokenize_and_keep}
    assert (
        evaluate_clip(data, features(data.keys), encode_texts(config, data, **encoders)).metrics["zero_shot/top1"] == 1
    )
    assert seen == ["a red wall", "red and red", "a blue wall", "blue and blue"]
    with pytest.raises(DataError, match=r"^eval\.templates=own, but a test set \(red, \.\.\.\) has no prompts: write "):
        encode_texts(config, replace(data, prompts=[]), **encoders)
