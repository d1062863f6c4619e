"""The section of the training samples."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from w2s.config.rules import (
    Fraction,
    FractionBelowOne,
    NonNegativeInt,
    OnlyFor,
    PositiveInt,
    Probabilities,
    Range,
    Rising,
    Section,
    require,
    written,
)

_MIDDLE_FRAME = OnlyFor("clip", "eval", why="the masked stage learns from the middle frame of a clip")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(Section, prefix="data.phases: "):
    """A part of the training samples; what is empty or null is as in the sections above."""

    samples: NonNegativeInt = 0
    """Samples of the phase, a multiple of train.global_batch; 0 in the last phase lasts to the end of the run."""
    train: str = ""
    """Training shards, as data.train; a source that another phase reads too continues where that one left it."""
    weights: Annotated[list[float], Probabilities()] = field(default_factory=list)
    """Probability of each source, as data.weights."""
    crop_scale: Annotated[tuple[float, float] | None, Rising("(0, 1]")] = None
    """Smallest and largest area of the random crop, as a fraction of the image."""
    patch_dropout: FractionBelowOne | None = None
    """Fraction of patches that the contrastive stage does not see."""
    frames: PositiveInt | None = None
    """Frames of a clip that the contrastive stage sees, as data.frames."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, prefix="data."):
    """Training images and captions: webdataset shards or parquet files, drawn in lanes."""

    name: str = "custom"
    """Name of the data set, as in configs/data/NAME.yaml."""
    builtin: Literal["none", "emoji", "showcase"] = "none"
    """Data set that w2s builds from packages below `cache` when it is not there yet."""
    cache: str = "${oc.env:W2S_CACHE,'~/.cache/w2s'}"
    """Folder for built-in data sets; the environment variable W2S_CACHE changes it."""
    train: str = ""
    """Training shards: a folder, a glob, a brace pattern, a URL or a .txt file that lists them.

    `,` joins several to one source; `::` or `;` separate sources.
    """
    weights: Annotated[list[float], Probabilities()] = field(default_factory=list)
    """Probability that a sample comes from each source; empty makes one pool of all sources' shards."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts of the training with sources, crops or patch dropout of their own, one after the other."""
    index: str = "${run.root}/index"
    """Folder of the sizes that `w2s data index` has counted."""
    allow_pipe: bool = False
    """Let sources be `pipe:COMMAND`, which runs a shell command and reads its output."""
    lanes: PositiveInt = 8
    """Streams that the sample order is made of; the number of reading ranks must divide it."""
    shuffle: PositiveInt = 256
    """Samples that a lane shuffles together, shared among its sources by their weights."""
    replacement: bool = False
    """Draw shards with replacement instead of going through all of them in every epoch."""
    crop_scale: Annotated[tuple[float, float], Rising("(0, 1]")] = (0.2, 1.0)
    """Smallest and largest area of the random crop, as a fraction of the image."""
    crop_ratio: Annotated[tuple[float, float], Rising("(0, inf]")] = (0.75, 4 / 3)
    """Smallest and largest aspect ratio of the random crop."""
    flip: bool = True
    """Flip half of the images left to right."""
    half_scale: bool = False
    """Decode a JPEG at exactly half its size where the crop is at least twice the view: faster, slightly different."""
    image_key: str = "jpg;jpeg;png;webp;bmp;gif;tif;tiff;image;img;mp4;mov;mkv;webm;avi"
    """Extensions of the image or the video in a sample; the first that is there is taken.

    Columns of a parquet file are extensions.
    """
    frames: Annotated[PositiveInt, _MIDDLE_FRAME] = 1
    """Frames of a clip whose features are averaged, in the contrastive stage and in evaluations; an image is one frame.

    A clip is a sample of numbered images (`000.jpg`, `001.jpg`, ...) or a video. With 1 its middle frame is an image.
    """
    caption_key: str = "txt;text;caption"
    """Where the caption is: an extension, or `json.KEY` for a key of the JSON file; several separated by `;`.

    Columns of a parquet file are extensions, and keys of its JSON file.
    """
    caption_weights: Annotated[list[float], Probabilities()] = field(default_factory=list)
    """Probability of each caption of `caption_key`; empty takes the first that is there."""
    workers: NonNegativeInt = 1
    """Reading processes per rank; 0 reads in the training process."""
    read_ahead_mb: Annotated[float, Range("[0, inf]")] = 1024.0
    """Megabytes of undecoded samples that a rank reads ahead, beside the windows that are handed out."""
    timeout: Annotated[float, Range("(0, inf]")] = 30.0
    """Seconds after which a connection to a server that gives nothing is opened again."""
    max_bad_fraction: Fraction = 0.05
    """Stop when more than this fraction of the last 1,000 samples of a reading process could not be read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = self.caption_key.split(";")
        require(
            len(self.caption_weights) in (0, len(keys)),
            f"data.caption_weights={written(self.caption_weights)} are not one for each of data.caption_key="
            f"{self.caption_key}: give {len(keys)}",
        )
