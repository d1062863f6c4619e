from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from w2s.errors import UserError
from w2s.tracking.report.pictures import (
    CaptionsFound,
    ClassExamples,
    ImagesFound,
    attention_picture,
    classes_picture,
    features_picture,
    masked_picture,
    principal_components,
    retrieval_picture,
)

RED, BLUE = (220, 30, 30), (30, 30, 220)


def plain(count: int, colour: tuple[int, int, int], size: int = 32) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(count, 3, size, size)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def share(path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels that have a colour."""
    return int((np.abs(pixels(path) - np.array(colour)).max(-1) <= 2).sum())


@pytest.mark.parametrize("grid", [4, 16])
def test_masked_picture_covers_what_is_masked(tmp_path: Path, grid: int) -> None:
    masks = torch.zeros(2, grid**2, dtype=torch.bool)
    masks[:, : grid**2 // 4] = True
    masked_picture(tmp_path / "m.png", plain(2, RED), masks, torch.linspace(-0.2, 0.9, 2 * grid**2).reshape(2, -1))
    # Each image is drawn once whole and once with a quarter in grey.
    assert share(tmp_path / "m.png", (168, 168, 168)) / share(tmp_path / "m.png", RED) == pytest.approx(1 / 7, rel=0.05)


def test_masked_picture_grows_with_the_images(tmp_path: Path) -> None:
    for count in (1, 3):
        masks = torch.eye(4, dtype=torch.bool)[0].expand(count, 4)
        masked_picture(tmp_path / f"{count}.png", plain(count, RED), masks, torch.full((count, 4), 0.5))
    (height, width, _), (tall, wide, _) = (pixels(tmp_path / f"{count}.png").shape for count in (1, 3))
    assert (tall, wide - width) == (height, 405)


def test_features_picture_gives_rotated_features_the_teachers_colours(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(2, 16, 12, generator=generator) * torch.linspace(3, 0.1, 12)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    features_picture(tmp_path / "f.png", plain(2, BLUE), teacher @ rotation + 5, teacher)
    picture = pixels(tmp_path / "f.png")
    rows = np.flatnonzero((picture[:, 200] != 255).any(-1))
    _, student, shown_teacher = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    middle_difference = picture[student[20:-20]].mean(0) - picture[shown_teacher[20 : 20 + len(student) - 40]].mean(0)
    assert np.abs(middle_difference[150:]).mean() < 3


def test_components_are_those_of_the_svd_and_leave_the_generator_alone() -> None:
    features = torch.randn(100, 80, generator=torch.Generator().manual_seed(0)) * torch.linspace(4, 0.5, 80)
    torch.manual_seed(3)
    expected_next = torch.rand(1)
    torch.manual_seed(3)
    components = principal_components(features)
    assert torch.equal(torch.rand(1), expected_next)
    centred = features - features.mean(0)
    left, _, right = torch.linalg.svd(centred, full_matrices=False)
    signs = torch.stack([row[row.abs().argmax()].sign() for row in right[:3]])
    reference = left[:, :3] * signs
    torch.testing.assert_close(components, reference / reference.std(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(principal_components(features), components, atol=0, rtol=0)


def test_classes_picture_frames_right_and_wrong(tmp_path: Path) -> None:
    right = ClassExamples("red square", 1.0, plain(1, RED), ["red square"])
    wrong = ClassExamples("blue square", 0.0, plain(1, BLUE), ["a red square with a very long name that goes on"])
    classes_picture(tmp_path / "c.png", [right] * 3, [wrong])
    assert share(tmp_path / "c.png", RED) == pytest.approx(3 * share(tmp_path / "c.png", BLUE), rel=0.02)
    good, bad = share(tmp_path / "c.png", (21, 128, 61)), share(tmp_path / "c.png", (185, 28, 28))
    assert good > 2 * bad > 0


def test_retrieval_picture_marks_what_is_right(tmp_path: Path) -> None:
    red, blue = plain(1, RED), plain(1, BLUE)
    by_text = [ImagesFound("a red square", torch.cat([red, blue, blue]), [True, False, False])]
    for name, right in (("right", True), ("wrong", False)):
        by_image = [CaptionsFound(blue[0], ["red " * 60], [right])]
        retrieval_picture(tmp_path / f"{name}.png", by_text, by_image)
    picture = tmp_path / "right.png"
    assert share(picture, BLUE) == pytest.approx(3 * share(picture, RED), rel=0.02)
    good, bad = (
        [share(tmp_path / f"{name}.png", c) for name in ("right", "wrong")] for c in ((21, 128, 61), (185, 28, 28))
    )
    assert good[0] > good[1] > 0 and bad[1] > bad[0] > 0  # the caption has changed sides
    assert bad[0] == pytest.approx(2 * good[1], rel=0.05)  # two frames and one


def test_attention_picture_is_bright_where_more_than_an_equal_share_goes(tmp_path: Path) -> None:
    weights = torch.zeros(1, 4)
    weights[0, 0] = 1  # four times an equal share
    attention_picture(tmp_path / "a.png", plain(1, RED), weights)
    dark = share(tmp_path / "a.png", (0, 0, 0))
    assert (
        0.1 < dark / share(tmp_path / "a.png", RED) < 0.5
    )  # whole in the first row, about a quarter lit in the second


def test_an_equal_attention_is_evenly_dim(tmp_path: Path) -> None:
    attention_picture(tmp_path / "a.png", plain(1, RED), torch.full((1, 16), 1 / 16))
    whole, quarter = share(tmp_path / "a.png", RED), share(tmp_path / "a.png", (55, 7, 7))
    assert quarter == pytest.approx(whole, rel=0.02), "the image once in full, once in a quarter of its light"


def test_names_are_no_formulas(tmp_path: Path) -> None:
    """What matplotlib's mathtext would refuse."""
    name = r"$\frac{ and $x^_$"
    classes_picture(tmp_path / "c.png", [ClassExamples(name, 1.0, plain(1, RED), [name])], [])
    assert share(tmp_path / "c.png", RED) > 0


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    example = ClassExamples("red", 1.0, plain(1, RED), ["red"])
    with pytest.raises(UserError, match=r"cannot write .*c\.png"):
        classes_picture(tmp_path / "file" / "c.png", [example], [])
