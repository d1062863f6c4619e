"""The section of the training samples."""

from dataclasses import dataclass, field
from typing import Literal

from w2s.config.requirements import require, require_probabilities, require_scale


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A part of the training samples; what is empty or null is as in the sections above."""

    samples: int = 0
    """Samples of the phase, a multiple of train.global_batch; 0 in the last phase lasts to the end of the run."""
    train: str = ""
    """Training shards, as data.train; a source that another phase reads too continues where that one left it."""
    weights: list[float] = field(default_factory=list)
    """Probability of each source, as data.weights."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest area of the random crop, as a fraction of the image."""
    patch_dropout: float | None = None
    """Fraction of patches that the contrastive stage does not see."""
    frames: int | None = None
    """Frames of a clip that the contrastive stage sees, as data.frames."""

    def __post_init__(self) -> None:
        require(self.samples >= 0, f"data.phases: samples={self.samples} must be at least 0")
        require_probabilities(self.weights, "data.phases: weights")
        if self.crop_scale is not None:
            require_scale(self.crop_scale, "data.phases: crop_scale")
        if self.patch_dropout is not None:
            require(0 <= self.patch_dropout < 1, f"data.phases: patch_dropout={self.patch_dropout} must be in [0, 1)")
        if self.frames is not None:
            require(self.frames >= 1, f"data.phases: frames={self.frames} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
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
    weights: list[float] = field(default_factory=list)
    """Probability that a sample comes from each source; empty makes one pool of all sources' shards."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Parts of the training with sources, crops or patch dropout of their own, one after the other."""
    index: str = "${run.root}/index"
    """Folder of the sizes that `w2s data index` has counted."""
    allow_pipe: bool = False
    """Let sources be `pipe:COMMAND`, which runs a shell command and reads its output."""
    lanes: int = 8
    """Streams that the sample order is made of; the number of reading ranks must divide it."""
    shuffle: int = 256
    """Samples that a lane shuffles together, shared among its sources by their weights."""
    replacement: bool = False
    """Draw shards with replacement instead of going through all of them in every epoch."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the random crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest aspect ratio of the random crop."""
    flip: bool = True
    """Flip half of the images left to right."""
    half_scale: bool = False
    """Decode a JPEG at exactly half its size where the crop is at least twice the view: faster, slightly different."""
    image_key: str = "jpg;jpeg;png;webp;bmp;gif;tif;tiff;image;img;mp4;mov;mkv;webm;avi"
    """Extensions of the image or the video in a sample; the first that is there is taken.

    Columns of a parquet file are extensions.
    """
    frames: int = 1
    """Frames of a clip whose features are averaged, in the contrastive stage and in evaluations; an image is one frame.

    A clip is a sample of numbered images (`000.jpg`, `001.jpg`, ...) or a video. With 1 its middle frame is an image.
    """
    caption_key: str = "txt;text;caption"
    """Where the caption is: an extension, or `json.KEY` for a key of the JSON file; several separated by `;`.

    Columns of a parquet file are extensions, and keys of its JSON file.
    """
    caption_weights: list[float] = field(default_factory=list)
    """Probability of each caption of `caption_key`; empty takes the first that is there."""
    workers: int = 1
    """Reading processes per rank; 0 reads in the training process."""
    read_ahead_mb: float = 1024.0
    """Megabytes of undecoded samples that a rank reads ahead, beside the windows that are handed out."""
    timeout: float = 30.0
    """Seconds after which a connection to a server that gives nothing is opened again."""
    max_bad_fraction: float = 0.05
    """Stop when more than this fraction of the last 1,000 samples of a reading process could not be read."""

    def __post_init__(self) -> None:
        for name, least in (("lanes", 1), ("shuffle", 1), ("frames", 1), ("workers", 0)):
            value = getattr(self, name)
            require(value >= least, f"data.{name}={value} must be at least {least}")
        require(self.read_ahead_mb >= 0, f"data.read_ahead_mb={self.read_ahead_mb} must be at least 0")
        require(self.timeout > 0, f"data.timeout={self.timeout} must be above 0")
        require_scale(self.crop_scale, "data.crop_scale")
        low, high = self.crop_ratio
        require(0 < low <= high, f"data.crop_ratio=[{low}, {high}] must be two rising numbers above 0")
        require(
            0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction} must be between 0 and 1"
        )
        require_probabilities(self.weights, "data.weights")
        require_probabilities(self.caption_weights, "data.caption_weights")
        keys = self.caption_key.split(";")
        require(
            len(self.caption_weights) in (0, len(keys)),
            f"data.caption_weights={self.caption_weights} are not one for each of data.caption_key={self.caption_key}: "
            f"give {len(keys)}",
        )
