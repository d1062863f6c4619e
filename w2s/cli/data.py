"""w2s data make, build, index, check, show."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from w2s.cli.app import Debug, Overrides, app, one_line
from w2s.errors import UserError, W2SError
from w2s.redaction import shown

data = typer.Typer(help="Make, count, check and show shards.")
app.add_typer(data, name="data")


Shards = Annotated[str, typer.Argument(help="What data.train takes: a folder, a glob, a brace pattern or a URL.")]
Workers = Annotated[int, typer.Option(min=1, help="Threads that work side by side.")]
Layout = Literal["shards", "clip_benchmark"]
# As DataConfig's.
IMAGE_KEY, CAPTION_KEY = "jpg;jpeg;png;webp;bmp;gif;tif;tiff;image;img;mp4;mov;mkv;webm;avi", "txt;text;caption"
ImageKey = Annotated[str, typer.Option(help="Extensions (columns) of the image, separated by ;")]
CaptionKey = Annotated[
    str, typer.Option(help="Extensions (columns) of the caption, or json.KEY; empty for images only.")
]


@data.command("make")
def data_make(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images, a .csv, .tsv, .jsonl or .json table, a COCO caption file, parquet files.",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for the shards.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffling.")] = 0,
    workers: Workers = 1,
    images: Annotated[str, typer.Option(help="Folder that the paths in a table are relative to.")] = "",
    image_column: Annotated[str, typer.Option(help="Column of the images or their paths.")] = "",
    caption_column: Annotated[str, typer.Option(help="Column of the captions.")] = "",
    class_column: Annotated[str, typer.Option(help="Column of the classes.")] = "",
    class_names: Annotated[str, typer.Option(help="File that maps folders or numbers to names of classes.")] = "",
    layout: Annotated[
        Layout, typer.Option(help="shards to train on, or a test set as CLIP_benchmark has it.")
    ] = "shards",
    split: Annotated[str, typer.Option(help="Split of the test set, train or test (taken if none is named).")] = "",
    like: Annotated[str, typer.Option(help="Set of CLIP_benchmark whose class names and prompts it has.")] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt with {c} for the class name, or several.")] = None,
    debug: Debug = False,
) -> None:
    """Write images, captions and classes into shards. The same command resumes where it was interrupted."""
    with one_line(debug):
        from w2s.data.making.clip_benchmark import BenchmarkSet
        from w2s.data.making.items import find_items
        from w2s.data.making.make import make_shards
        from w2s.data.making.table_files import Columns
        from w2s.launch import show_notes

        show_notes()
        if (like or prompt or split) and layout == "shards":
            raise UserError("--split, --like and --prompt are for a test set: add --layout clip_benchmark")
        test_set = None
        if layout == "clip_benchmark":
            test_set = BenchmarkSet(split=split or "test", like=like, prompts=prompt or [])
        columns = Columns(image=image_column, caption=caption_column, label=class_column)
        sizes = make_shards(
            find_items(Path(source), columns, Path(images) if images else None),
            Path(out),
            shard_size=shard_size,
            seed=seed,
            workers=workers,
            test_set=test_set,
            class_names=Path(class_names) if class_names else None,
        )
        print(f"{sum(sizes.values())} samples in {len(sizes)} shards: {out}")


@data.command("build")
def data_build(
    name: Annotated[str, typer.Argument(help="emoji or showcase, as in data=NAME.")], debug: Debug = False
) -> None:
    """Build a data set that w2s makes from packages; one that lacks some of its sources is built again."""
    with one_line(debug):
        from w2s.config.load import load
        from w2s.data.builtin.builtin_sets import ensure_builtin
        from w2s.launch import show_notes

        show_notes()
        folder = ensure_builtin(load("mim", [f"data={name}"]).data, renew=True)
        for sizes in sorted(folder.glob("*/sizes.json")):
            print(f"{sizes.parent}: {sum(json.loads(sizes.read_text()).values())} pairs")


@data.command("index")
def data_index(overrides: Overrides = None, debug: Debug = False) -> None:
    """Count the samples of data.train and keep the result in data.index, where runs find it."""
    with one_line(debug):
        from w2s.config.load import load, refuse_expanded_braces
        from w2s.data.shards.sizes import index_shards
        from w2s.data.stream.sources import list_sources

        refuse_expanded_braces(overrides or [])
        section = load("mim", overrides or []).data
        for source in list_sources(section):
            sizes = index_shards(source.shards, Path(section.index))
            print(f"{source.name}: {sum(sizes.values())} samples in {len(sizes)} shards")


@data.command("check")
def data_check(
    shards: Shards,
    image_key: ImageKey = IMAGE_KEY,
    caption_key: CaptionKey = CAPTION_KEY,
    workers: Workers = 1,
    debug: Debug = False,
) -> None:
    """Read and decode every sample, and report what a run would skip; exit code 1 if there is something."""
    with one_line(debug):
        from w2s.data.making.shard_report import check_shards
        from w2s.data.samples.captions import NO_CAPTION
        from w2s.data.shards.listing import list_shards

        report = check_shards(list_shards(shards, "SHARDS"), image_key, caption_key or None, workers)
        print("\n".join(map(shown, report.lines())))
        if report.bad or report.wrong_sizes:
            # The masked stage needs none.
            fix = "; images alone are checked with --caption-key ''" if report.bad[NO_CAPTION] else ""
            raise W2SError(f"{sum(report.bad.values())} of {report.samples} samples are bad: see above{fix}")


@data.command("show")
def data_show(
    shards: Shards,
    out: Annotated[str, typer.Option(help="PNG file for a sheet of images with their captions.")] = "sheet.png",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Images in the sheet.")] = 24,
    image_key: ImageKey = IMAGE_KEY,
    caption_key: CaptionKey = CAPTION_KEY,
    debug: Debug = False,
) -> None:
    """Print what is inside of shards, and save a sheet of images with their captions."""
    with one_line(debug):
        from w2s.data.making.shard_report import describe_shards, draw_sheet
        from w2s.data.shards.listing import list_shards

        paths = list_shards(shards, "SHARDS")
        print("\n".join(map(shown, describe_shards(paths))))
        drawn = draw_sheet(paths, image_key, caption_key or None, count, Path(out))
        print(f"{drawn} samples drawn: {out}")
