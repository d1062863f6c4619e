import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.shard_files import bomb, encode, noise, smooth_photo
from w2s.data.samples.decode import FORMATS, MAX_PIXELS, decode_image
from w2s.data.shards.raw_sample import BadSample


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "data",
    [
        encode(smooth_photo(), "JPEG"),
        encode(smooth_photo(), "JPEG", progressive=True),
        encode(smooth_photo(), "JPEG", subsampling=0),
        encode(smooth_photo()[..., 0], "JPEG"),
        encode(noise(0), "PNG"),
        encode(noise(0)[..., 0], "PNG"),
        encode(noise(0), "WEBP"),
    ],
    ids=["jpeg", "progressive", "4:4:4", "grey jpeg", "png", "grey png", "webp"],
)
def test_pixels_equal_pillows(data: bytes) -> None:
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, by_pillow(data))


def test_cmyk_becomes_rgb() -> None:
    output = io.BytesIO()
    Image.fromarray(smooth_photo()).convert("CMYK").save(output, "JPEG", quality=95)
    assert np.abs(decode_image(output.getvalue()) - by_pillow(output.getvalue())).max() <= 1


def test_transparency_is_laid_on_white() -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[0, 0] = 255, 0, 0, 255
    rgba[1, 1] = 0, 0, 0, 128
    pixels = decode_image(encode(rgba))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[1, 1].tolist() == [127, 127, 127]
    assert pixels[3, 3].tolist() == [255, 255, 255]


def test_a_palette_with_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    output = io.BytesIO()
    image.save(output, "PNG", transparency=0)
    assert decode_image(output.getvalue()).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    pixels = decode_image(encode(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)))
    assert pixels[0, :, 0].tolist() == [0, 0x80, 0xFF]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    image = Image.fromarray(smooth_photo(40, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    output = io.BytesIO()
    image.save(output, format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(output.getvalue())))
    pixels = decode_image(output.getvalue())
    assert pixels.shape[:2] == ((40, 60) if orientation < 5 else (60, 40))
    assert np.array_equal(pixels, np.asarray(upright))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be decoded"),
        (b"\0" * 1000, "cannot be decoded"),
        (b"\xff\xd8" + b"\0" * 1000, "cannot be decoded"),
        (encode(smooth_photo(), "JPEG")[:4000], "cannot be decoded"),
        (encode(noise(0))[:600], "cannot be decoded"),
        (encode(noise(0))[:40], "cannot be decoded"),
        (bomb(), "too large"),
    ],
    ids=["empty", "zeros", "jpeg zeros", "cut jpeg", "cut png", "png header", "bomb"],
)
def test_what_is_no_image_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode_image(data)


def test_the_size_limit_holds_for_jpeg_and_below_pillows_own(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    data = encode(smooth_photo(), "JPEG")
    monkeypatch.setattr("w2s.data.samples.decode.MAX_PIXELS", dict.fromkeys(MAX_PIXELS, 400 * 500 - 1))
    for image in (data, encode(smooth_photo())):
        with pytest.raises(BadSample, match="too large"):
            decode_image(image)
    monkeypatch.setattr("w2s.data.samples.decode.MAX_PIXELS", dict.fromkeys(MAX_PIXELS, 400 * 500))
    assert decode_image(data).shape == (400, 500, 3)
    assert not recwarn


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "PDF", "EPS"])
def test_only_the_named_decoders_are_used(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others one starts a program."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert format not in FORMATS
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image(encode(noise(0), format))
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_a_large_image_is_converted_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(noise(0, 30, 40))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise(1, 30, 40)[..., 0]))
    output = io.BytesIO()
    image = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50) if mode == "I;16" else image
    image.convert(mode).save(output, "PNG")
    whole = decode_image(output.getvalue())
    monkeypatch.setattr("w2s.data.samples.decode._STRIP", 280)
    assert np.array_equal(decode_image(output.getvalue()), whole)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = encode(smooth_photo(), "JPEG", progressive=True)
    assert decode_image(data).shape == (400, 500, 3)
    with pytest.raises(BadSample, match="too many scans"):
        decode_image(data + b"\xff\xda" * 65)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_beginning_of_an_image_decodes_or_is_a_bad_sample(format: str) -> None:
    data = encode(noise(3), format)
    refused = 0
    for end in range(0, len(data), 13):
        try:
            decode_image(data[:end])
        except BadSample:
            refused += 1
    assert refused > 2
