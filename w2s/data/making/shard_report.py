"""What is inside of shards: `w2s data check` reads everything, `w2s data show` draws some of it."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from w2s.data.samples.captions import draw_caption
from w2s.data.samples.decode import decode_image
from w2s.data.samples.frames import choose_frames
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.shards.containers import read_shard
from w2s.data.shards.raw_sample import BadSample, RawSample, Skipped, find_images, kind
from w2s.data.shards.sizes import known_sizes
from w2s.errors import DataError
from w2s.redaction import printable

_LISTED = 10
_THUMBNAIL = 224


@dataclass
class Report:
    """What reading shards has found."""

    shards: int = 0
    samples: int = 0
    extensions: Counter[str] = field(default_factory=Counter)
    """Samples that have a file with an extension; those of numbered files are one."""
    bad: Counter[str] = field(default_factory=Counter)
    """Samples that a run would skip, by reason."""
    examples: list[Skipped] = field(default_factory=list)
    """The first of them."""
    empty: int = 0
    """Shards without a sample, which a run passes by."""
    wrong_sizes: list[str] = field(default_factory=list)
    """Shards with another number of samples than is noted beside them."""

    def add(self, other: "Report") -> None:
        """Take in what was found in another shard."""
        self.shards += other.shards
        self.samples += other.samples
        self.empty += other.empty
        self.extensions += other.extensions
        self.bad += other.bad
        self.examples = (self.examples + other.examples)[:_LISTED]
        self.wrong_sizes += other.wrong_sizes

    def lines(self) -> Iterator[str]:
        """Yield the report as text."""
        empty = f" ({self.empty} of them empty)" if self.empty else ""
        yield f"{self.shards} shards{empty}, {self.samples} samples, {sum(self.bad.values())} of them bad"
        yield "files: " + ", ".join(f".{name} in {count}" for name, count in sorted(self.extensions.items()))
        for reason, count in self.bad.most_common():
            yield f"bad: {count} x {reason}"
        for sample in self.examples:
            yield f"  {sample.key} in {sample.shard}: {sample.reason}"
        yield from self.wrong_sizes


def check_shards(shards: Sequence[str], image_key: str, caption_key: str | None, workers: int) -> Report:
    """Read and decode every sample as a run would.

    Args:
        shards: paths or URLs.
        image_key: extensions of the image, separated by `;`.
        caption_key: where captions are, separated by `;`; None where they are not needed.
        workers: threads that read.
    """
    sizes = known_sizes(shards)
    check = partial(_check, image_key=image_key, caption_key=caption_key)
    report = Report()
    with ThreadPoolExecutor(workers) as pool:  # the decoders work without Python's lock
        for part in pool.map(check, shards, map(sizes.get, shards)):
            report.add(part)
    return report


def _check(shard: str, noted: int | None, image_key: str, caption_key: str | None) -> Report:
    report = Report(shards=1)
    for sample in read_shard(shard):
        try:
            _read(sample, image_key, caption_key)
        except BadSample as error:
            report.bad[str(error)] += 1
            report.examples = [*report.examples, Skipped(sample.key, shard, str(error))][:_LISTED]
        report.samples += 1
        report.extensions.update({kind(extension) for extension in sample.files})
    report.empty = int(report.samples == 0)
    if noted is not None and noted != report.samples:
        report.wrong_sizes.append(f"{shard} has {report.samples} samples, but {noted} are noted beside it")
    return report


def _read(sample: RawSample, image_key: str, caption_key: str | None) -> tuple[Image.Image, str]:
    if sample.damage:
        raise BadSample(sample.damage)
    caption = draw_caption(sample, caption_key, (), generator(0, Purpose.CAPTION, 0)) if caption_key else ""
    images = find_images(sample.files, image_key)
    if not images:
        raise BadSample("image is missing")
    frames = [decode_image(frame) for frame in choose_frames(images, len(images))]
    return Image.fromarray(frames[len(frames) // 2]), caption


def draw_sheet(shards: Sequence[str], image_key: str, caption_key: str | None, count: int, path: Path) -> int:
    """Draw the first good samples of the shards with their captions, and save the sheet.

    Returns:
        The number of samples in the sheet.

    Raises:
        DataError: there is no good sample, or the file cannot be written.
    """
    shown = list(islice(_good(shards, image_key, caption_key), count))
    if not shown:
        raise DataError(f"{shards[0]} and the others have no sample with an image and a caption: see `w2s data check`")
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.4 * columns, 3 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (image, caption) in zip(figure.axes, shown, strict=False):
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        axes.imshow(image)
        title = "\n".join(printable(line) for line in textwrap.wrap(caption, 28, max_lines=4, placeholder=" ..."))
        axes.set_title(title, fontsize=8, parse_math=False)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    return len(shown)


def describe_shards(shards: Sequence[str]) -> Iterator[str]:
    """Yield, as text, the size of each shard (some of many) and the files of the first sample of the first one."""
    for shard in shards[:_LISTED]:
        samples = list(read_shard(shard, wanted=()))
        damage = f", then {samples[-1].damage}" if samples and samples[-1].damage else ""
        yield f"{shard}: {sum(not sample.damage for sample in samples)} samples{damage}"
    if len(shards) > _LISTED:
        yield f"... {len(shards)} shards in all"
    first = next(read_shard(shards[0]), None)
    if first is not None:
        yield f"{first.key}: {', '.join(f'.{name} ({len(data)} bytes)' for name, data in first.files.items())}"


def _good(shards: Sequence[str], image_key: str, caption_key: str | None) -> Iterator[tuple[Image.Image, str]]:
    # Some of each shard: related samples often lie next to each other.
    readers = [iter(read_shard(shard)) for shard in shards[:64]]
    while readers:
        for reader in list(readers):
            sample = next(reader, None)
            if sample is None:
                readers.remove(reader)
                continue
            try:
                yield _read(sample, image_key, caption_key)
            except BadSample:
                continue
