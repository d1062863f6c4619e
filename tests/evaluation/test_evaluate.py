"""The evaluations that stages ask for."""

from dataclasses import replace

import pytest
import torch

from w2s.config.sections import EvalConfig
from w2s.errors import DataError
from w2s.evaluation.dataset import EvalSet
from w2s.evaluation.evaluate import evaluate_clip, evaluate_knn, of_sets

COLOURS = {"red": 0, "green": 1, "blue": 2}


def eval_set(words, class_names=tuple(COLOURS), captions=None, labels="from words"):
    """One flat image a word."""
    images = torch.zeros(len(words), 3, 4, 4, dtype=torch.uint8)
    for number, word in enumerate(words):
        images[number, COLOURS[word]] = 200 + number
    numbers = torch.tensor([list(class_names).index(word) for word in words]) if labels else None
    return EvalSet(images, list(words) if captions is None else captions, numbers, list(class_names), list(words))


def encode_image(images):
    return images.float().mean((2, 3))


def encode_text(tokens):
    return torch.eye(3)[tokens[:, 0]]


def tokenize(texts):
    return torch.tensor([[next(number for colour, number in COLOURS.items() if colour in text)] for text in texts])


def clip(data, encode_text=encode_text, **config):
    return evaluate_clip(
        EvalConfig(batch_size=2, **config),
        data,
        encode_image=encode_image,
        encode_text=encode_text,
        tokenize=tokenize,
    )


def knn(tests, neighbours, encode=encode_image):
    return evaluate_knn(EvalConfig(knn_k=1, batch_size=2), tests, neighbours, encode=encode)


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


def test_knn_matches_classes_by_name():
    neighbours = eval_set(["blue", "red", "red"], class_names=("blue", "red"))
    assert knn({"": eval_set(["red", "green", "blue"])}, neighbours) == {
        "": {"top1": 1, "top5": 1, "chance_top1": 1 / 2, "coverage": pytest.approx(2 / 3)}
    }


def test_knn_of_several_sets_encodes_the_neighbours_once():
    sets = {"warm": eval_set(["red", "red"]), "cold": eval_set(["green"]), "texts": eval_set(["red"], labels=None)}
    neighbours, encoded = eval_set(["blue", "red"]), []

    def encode(images):
        encoded.append(len(images))
        return encode_image(images)

    result = knn(sets, neighbours, encode)
    assert result["warm"] == knn({"": sets["warm"]}, neighbours)[""]
    assert result["cold"] == result["texts"] == {"coverage": 0}
    assert sum(encoded) == len(neighbours.images) + len(sets["warm"].images)


def test_metrics_of_named_sets():
    assert of_sets({"": {"knn/top1": 1}}) == {"knn/top1": 1}
    assert of_sets({"a": {"knn/top1": 1}, "b": {"knn/top1": 0}}) == {"a/knn/top1": 1, "b/knn/top1": 0}


def test_knn_needs_classes_in_common():
    neighbours = eval_set(["blue"])
    with pytest.raises(DataError, match="no class in common"):
        knn({"": eval_set(["red"])}, neighbours)
    with pytest.raises(DataError, match=r"eval\.knn_shards has several captions"):
        knn({"": neighbours}, eval_set(["red"], labels=None))


def test_a_set_may_have_prompts_of_its_own():
    seen = []

    def tokenize_and_keep(texts):
        seen.extend(texts)
        return tokenize(texts)

    data = replace(eval_set(["red", "blue"], class_names=("red", "blue")), prompts=["a {c} wall", "{c} and {c}"])
    config = EvalConfig(templates="own", retrieval=False)
    encoders = {"encode_image": encode_image, "encode_text": encode_text, "tokenize": tokenize_and_keep}
    assert evaluate_clip(config, data, **encoders).metrics["zero_shot/top1"] == 1
    assert seen == ["a red wall", "red and red", "a blue wall", "blue and blue"]
    with pytest.raises(DataError, match=r"^eval\.templates=own, but a test set \(red, \.\.\.\) has no prompts: write "):
        evaluate_clip(config, replace(data, prompts=[]), **encoders)
