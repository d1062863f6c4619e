"""Names of classes from a file that maps folders, numbers or other labels to them: `w2s data make --class-names`."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from w2s.errors import DataError


def named_classes(labels: Sequence[str], path: Path) -> tuple[dict[str, int], list[str]]:
    """Number and name the classes of a source by a file.

    It is JSON (`{"n01440764": "tench"}`, `{"0": ["n01440764", "tench"]}` as ImageNet's index, `{"tench": 0}`, or a
    list), a `.csv` or `.tsv` table of a label and a name in its first columns, or a text with a label and a name, or a
    name alone, a line. Of names without labels the first is that of class 0, and all of them are classes, whether the
    source has images of them or not.

    Args:
        labels: what the source calls its classes, in the order of their numbers.
        path: the file.

    Returns:
        The number of each label, and the names by number.

    Raises:
        DataError: the file cannot be read, or lacks a label, or there are no labels.
    """
    if not labels:
        raise DataError(f"--class-names {path} has nothing to name: the images have no classes, see --class-column")
    try:
        pairs, listed = _read(path)
    except (OSError, ValueError, TypeError, LookupError, RecursionError, csv.Error) as error:
        raise DataError(f"--class-names {path} cannot be read: {error}") from error
    missing = [label for label in labels if label not in pairs]
    if not missing:
        return {label: number for number, label in enumerate(labels)}, [pairs[label] for label in labels]
    if listed and all(label.isdecimal() and int(label) < len(listed) for label in labels):
        return {label: int(label) for label in labels}, listed
    raise DataError(
        f"--class-names {path} has no name for {len(missing)} of {len(labels)} classes, such as {missing[0]}"
    )


def _read(path: Path) -> tuple[Mapping[str, str], list[str]]:
    """Names by label, and names without labels in their order."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        document = json.loads(text)
        return ({}, [str(name) for name in document]) if isinstance(document, list) else (_of_mapping(document), [])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix in (".csv", ".tsv"):
        return _of_pairs(csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")), []
    return _of_pairs(line.split("\t") if "\t" in line else line.split(maxsplit=1) for line in lines), lines


def _of_pairs(records: Iterable[Sequence[str]]) -> dict[str, str]:
    return {record[0].strip(): record[1].strip() for record in records if len(record) > 1}


def _of_mapping(document: Mapping[str, object]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for label, name in dict(document).items():
        if isinstance(name, list):
            pairs |= dict.fromkeys((label, str(name[0])), str(name[-1]))
        elif isinstance(name, int):
            pairs[str(name)] = label
        else:
            pairs[label] = str(name)
    return pairs
