"""Zero-shot classification against a few plain lines."""

import pytest
import torch
import torch.nn.functional as F

from w2s.evaluation.scores.zero_shot import class_embeddings, templates_of, zero_shot

WORDS = torch.randn(256, 8, generator=torch.Generator().manual_seed(3))


def tokenize(texts):
    return torch.tensor([[ord(letter) for letter in text[:40].ljust(40)] for text in texts])


def encode_text(tokens):
    return 5 * WORDS[tokens].mean(1)


def embeddings(names, templates, batch_size=3):
    return class_embeddings(
        names, templates=templates_of(templates), encode_text=encode_text, tokenize=tokenize, batch_size=batch_size
    )


def test_bare_names_are_normalised_features():
    names = ["cat", "dog"]
    torch.testing.assert_close(embeddings(names, "none"), F.normalize(encode_text(tokenize(names)), dim=-1))


def test_templates_are_averaged_after_normalising():
    names = ["cat", "dog", "a house"]
    vectors = embeddings(names, "simple")
    forms = ["itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."]
    forms += ["a {} in a video game.", "art of the {}.", "a photo of the small {}."]
    for name, vector in zip(names, vectors, strict=True):
        prompts = F.normalize(encode_text(tokenize([form.format(name) for form in forms])), dim=-1)
        torch.testing.assert_close(vector, F.normalize(prompts.mean(0), dim=0))
    assert embeddings(["cat"], "openai").shape == (1, 8)


def test_accuracies_against_plain_python():
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(9, 6, generator=generator), dim=-1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 6, 7] * 100)  # class 8 has no image; over one block
    images = 3 * classes[labels] + 2 * torch.randn(len(labels), 6, generator=generator)
    names = [f"class {label}" for label in range(9)]
    result = zero_shot(images, classes, labels, names)
    order = (F.normalize(images, dim=-1) @ classes.T).argsort(1, descending=True)
    top1 = (order[:, 0] == labels).double()
    assert 0.2 < top1.mean() < 0.95
    assert torch.equal(result.predictions, order[:, 0])
    assert result.metrics == pytest.approx(
        {
            "top1": top1.mean().item(),
            "top5": (order[:, :5] == labels[:, None]).any(1).double().mean().item(),
            "mean_per_class": sum(top1[labels == label].mean().item() for label in range(8)) / 8,
            "chance_top1": 1 / 9,
            "chance_top5": 5 / 9,
        }
    )


def test_classes_from_best_to_worst():
    classes = torch.eye(4)
    near, right, wrong = [0.9, 0.8, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]
    images = torch.tensor([right, [0.8, 0.9, 0.0, 0.0], wrong, near, [0.0, 0.0, 0.0, 1.0], wrong])
    labels = torch.tensor([0, 1, 2, 2, 2, 3])
    result = zero_shot(images, classes, labels, ["a", "b", "c", "d"])
    assert [(one.name, one.images, one.top1) for one in result.classes] == [
        ("a", [0], 1.0),  # wider margin than b
        ("b", [1], 1.0),
        ("c", [2, 3, 4], 0.0),  # narrower than d's -1
        ("d", [5], 0.0),
    ]
    assert [one.confused_with for one in result.classes] == ["", "", "a", "b"]
    assert result.classes[0].margin == pytest.approx(1.0)


def test_collapsed_features_score_chance():
    labels = torch.arange(6).repeat(10)
    result = zero_shot(torch.ones(60, 3), F.normalize(torch.ones(6, 3), dim=-1), labels, list("abcdef"))
    assert result.metrics["top1"] == pytest.approx(1 / 6)
    assert result.metrics["top5"] == pytest.approx(5 / 6)


def test_few_classes_have_a_top5_chance_of_one():
    assert zero_shot(torch.eye(2), torch.eye(2), torch.arange(2), ["a", "b"]).metrics["chance_top5"] == 1
