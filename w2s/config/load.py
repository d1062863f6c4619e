"""Composition of the configuration from the YAML files of `configs/` and the overrides of a command line.

Later layers win: the defaults of the dataclasses, `stage/STAGE.yaml`, the chosen files of the groups in the order of
`GROUPS`, the overrides in the order in which they were given. Every file speaks of the whole configuration, so that
a teacher may set `mim.masked_patches` too.
"""

import copy
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from w2s.config.fields import (
    FIELDS,
    SECTIONS,
    advice,
    entry_hint,
    entry_section,
    expected,
    in_words,
    is_text,
    nearest,
    refuse_unknown,
)
from w2s.config.sections import Config, ModelConfig, TeacherEntry
from w2s.errors import ConfigError
from w2s.redaction import hide_variables, redacted

STAGES = ("mim", "clip", "eval")
GROUPS = ("model", "teacher", "data", "hardware")
TEACHERS = "teachers.of"
"""A list whose entries may be names of files of the group `teacher`."""
OF_ONE_TEACHER = ("teacher", "teacher.name", "teacher.source", "teacher.image_size", "teacher.target_norm")
"""What says which the only teacher is, and has no place beside `TEACHERS`."""
SHARD_KEYS = ("data.train", "eval.shards", "eval.knn_shards")

_MOST_NODES = 100_000
"""Values of a YAML file, those counted anew that an alias repeats."""
_UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError)
"""What the YAML reader and OmegaConf stumble with over text that is not a configuration."""


def load(stage: str, overrides: Sequence[str] = ()) -> Config:
    """Compose the configuration of a stage.

    Args:
        stage: one of `STAGES`.
        overrides: `key=value` with a full key, or `group=NAME` for a file of `configs/GROUP` (or any path that ends
            in `.yaml`).

    Raises:
        ConfigError: for an unknown key, group file or stage, a value of the wrong type, or a file that is not YAML.
    """
    hide_variables(" ".join(overrides))
    choices, assignments = _split(overrides)
    document = _stage_document(stage)
    choices = document.pop("defaults") | choices
    node: DictConfig = pickle.loads(_defaults())
    _merge(node, document, f"stage/{stage}.yaml")
    for group in GROUPS:
        document = read_document(group, choices[group])
        if document.get("stage", stage) != stage:
            raise ConfigError(f"{group}={choices[group]} is for stage {document['stage']}, not for {stage}")
        part = _on_stage(document.pop("on_stage", {}), stage, choices[group])
        _merge(node, document, choices[group])
        _merge(node, part, choices[group])
    for key, text in assignments:
        _assign(node, key, text if is_text(key) else _value(key, text), "")
    if node.teachers.of:
        _refuse_one_teacher(overrides)
    return _typed(node)


@cache
def _defaults() -> bytes:
    """The defaults of the dataclasses, pickled: a tenth of the time that it takes to make them, a fifth of a copy's."""
    return pickle.dumps(_structured(Config))


def _structured(section: type) -> DictConfig:
    """A section to be filled in: OmegaConf makes those of frozen dataclasses read-only, each for itself."""
    node: DictConfig = OmegaConf.structured(section)
    _make_writable(node)
    return node


def _make_writable(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, False)
    for child in node.values():
        if isinstance(child, DictConfig):
            _make_writable(child)


def named_model(name: str) -> ModelConfig:
    """The model of `configs/model/NAME.yaml`, or of a path that ends in `.yaml`.

    Raises:
        ConfigError: there is no such model.
    """
    return load("clip", [f"model={name}"]).model


def model_from(saved: Mapping[str, Any]) -> ModelConfig:
    """The model section of a configuration that a checkpoint holds.

    Raises:
        ConfigError: the section has keys that this release does not know, or lacks some.
    """
    try:
        section = saved["model"]
        if "${" in json.dumps(section):  # a file of somebody's may not ask for variables of this machine
            raise ValueError("it names variables")
        return cast(ModelConfig, OmegaConf.to_object(OmegaConf.merge(_structured(ModelConfig), section)))
    except (LookupError, TypeError, ValueError, ArithmeticError, OmegaConfBaseException) as error:
        raise ConfigError(f"the checkpoint's model section cannot be read: {_first_line(error)}") from error


def refuse_expanded_braces(arguments: Sequence[str]) -> None:
    """Refuse a list of shards that the shell has torn into one argument a shard, of which only the last would count.

    Raises:
        ConfigError: with the key and two of its values.
    """
    for first, second in pairwise(arguments):
        key, _, value = second.partition("=")
        if key.endswith(SHARD_KEYS) and first.startswith(f"{key}="):
            values = f"{first.partition('=')[2]} and {value}"
            raise ConfigError(f"{key} is given twice ({values}): quote braces, as in {key}='{{00..09}}.tar'")


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, in the order of the sections, without credentials."""
    return OmegaConf.to_yaml(OmegaConf.create(redacted(asdict(config))))


def read_document(group: str, name: str) -> dict[str, Any]:
    """The content of `configs/GROUP/NAME.yaml`, or of the file that a path ending in `.yaml` names.

    Raises:
        ConfigError: when there is no such file or it holds no YAML mapping.
    """
    path = Path(name).expanduser() if name.endswith(".yaml") else _find(group, name)
    try:
        text = path.read_text(encoding="utf-8")
        hide_variables(text)
        content = copy.deepcopy(_parsed(text))
    except OSError as error:
        raise ConfigError(f"{group}={name} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path} is not valid YAML: {error.problem}{line}") from error
    except _UNREADABLE as error:
        raise ConfigError(f"{path} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a list: write `key: value` lines")
    return cast("dict[str, Any]", content)


@lru_cache(64)
def _parsed(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(_unfolded(text)))


def names_of(group: str) -> list[str]:
    """The names of the files in `configs/GROUP`."""
    entries = (files("w2s.configs") / group).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def _find(group: str, name: str) -> Traversable:
    path = files("w2s.configs") / group / f"{name}.yaml"
    if not path.is_file():
        names = names_of(group)
        raise ConfigError(
            f"{group}={name} does not exist: did you mean {group}={nearest(name, names)}? "
            f"There are {', '.join(names)}, and any path that ends in .yaml"
        )
    return path


def _stage_document(stage: str) -> dict[str, Any]:
    if stage not in STAGES:
        raise ConfigError(
            f"stage {stage} does not exist: did you mean {nearest(stage, STAGES)}? There are {', '.join(STAGES)}"
        )
    return read_document("stage", stage)


def _on_stage(parts: Any, stage: str, name: str) -> dict[str, Any]:
    if not isinstance(parts, dict) or not set(parts) <= set(STAGES):
        raise ConfigError(f"{name}: on_stage takes sections below {', '.join(STAGES)}, not {parts}")
    return cast("dict[str, Any]", parts.get(stage, {}))


def _split(overrides: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Chosen group files, and the other overrides as (key, text)."""
    choices: dict[str, str] = {}
    assignments = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, such as train.steps=100")
        if key == "stage":
            raise ConfigError(f"{override}: the stage is chosen by the command, as in `w2s stage {text}`")
        if key in GROUPS:
            choices[key] = text
        else:
            assignments.append((key, text))
    return choices, assignments


def _refuse_one_teacher(overrides: Sequence[str]) -> None:
    for override in overrides:
        if override.partition("=")[0] in OF_ONE_TEACHER:
            raise ConfigError(f"{override} does nothing beside several teachers: put it into teachers=[...]")


def _value(key: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={_unfolded(text)}"]))["value"]  # type: ignore[index, call-overload]
    except _UNREADABLE as error:
        raise ConfigError(f"{key}={text[:80]} is not valid YAML: {_first_line(error)}") from error


def _unfolded(text: str) -> str:
    """Return YAML as it is, if what its `*names` stand for has an end, and is not too much, when it is written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_NODES  # in case that it is met inside itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(node)] = 1 + sum(map(size, pairs))
        return sizes[id(node)]

    root = yaml.compose(text) if "*" in text and "&" in text else None
    if root is not None and size(root) > _MOST_NODES:
        raise ValueError("a list or mapping names itself, or too many others")
    return text


def _merge(node: DictConfig, document: dict[str, Any], origin: str) -> None:
    for key, value in _flatten(document, ""):
        _assign(node, key, value, f"{origin}: ")


def _flatten(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in FIELDS:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _assign(node: DictConfig, key: str, value: Any, origin: str) -> None:
    if key in SHARD_KEYS:
        value = _joined(value)
    if key == "teachers" and isinstance(value, list):
        key = TEACHERS
    if key.startswith("teachers.") and key not in FIELDS:
        _assign_teacher(node, key, value, origin)
        return
    if key in SECTIONS:
        raise ConfigError(f"{origin}{key}={value}: {key} is a section, set one of its keys, such as {_key_in(key)}")
    if key not in FIELDS:
        known = FIELDS if origin else [*FIELDS, *GROUPS]  # a file of a group does not choose another
        raise ConfigError(f"{origin}unknown key {key}: did you mean {nearest(key, known)}?")
    try:
        OmegaConf.update(node, key, _entries(key, value, origin), merge=False)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{origin}{key}={value} is not {expected(key)}{advice(key, value)}") from error


def _entries(key: str, value: Any, origin: str) -> Any:
    """A list of sections as OmegaConf wants it; any other value as it is."""
    entry_type = entry_section(key)
    if entry_type is None or not isinstance(value, list):
        return value
    if key == TEACHERS:
        value = [_teacher_of_file(entry, origin) if isinstance(entry, str) else entry for entry in value]
    for entry in value:
        refuse_unknown(entry, entry_type, f"{origin}{key}")
    entries = [
        {name: _joined(part) if f"data.{name}" in SHARD_KEYS else part for name, part in entry.items()}
        if isinstance(entry, dict)
        else entry
        for entry in value
    ]
    return [OmegaConf.merge(_structured(entry_type), entry) for entry in entries]


def _teacher_of_file(name: str, origin: str) -> Any:
    """The entry that a file of the group `teacher` describes."""
    document = read_document("teacher", name)
    if set(document) != {"teacher"}:
        keys = ", ".join(document)
        raise ConfigError(f"{origin}teachers: {name} sets {keys}: in a list a file may have the section teacher alone")
    return document["teacher"]


def _assign_teacher(node: DictConfig, key: str, value: Any, origin: str) -> None:
    """Set a key of one of several teachers, `teachers.NAME.KEY` or `teachers.NUMBER.KEY`."""
    _, which, field = (*key.split(".", 2), "")[:3]
    names, keys = [entry.name for entry in node.teachers.of], [each.name for each in fields(TeacherEntry)]
    given = [*names, *map(str, range(len(names)))]
    if field not in keys:
        shown = f"teachers.{which}.{nearest(field or which, keys)}" if field else "teachers.NAME.KEY"
        raise ConfigError(f"{origin}unknown key {key}: did you mean {shown}?")
    if which not in given:
        near = f"did you mean teachers.{nearest(which, names)}.{field}?" if names else ""
        fix = near or "give teachers=[...] before it"
        raise ConfigError(f"{origin}{key}: there is no teacher {which}: {fix}")
    try:
        OmegaConf.update(node, f"{TEACHERS}[{given.index(which) % len(names)}].{field}", value, merge=False)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{origin}{key}={value} is not {in_words(entry_hint(TeacherEntry, field))}") from error


def _joined(shards: Any) -> Any:
    """A list of sources as the text of one value; any other value as it is."""
    return "::".join(map(str, shards)) if isinstance(shards, list) else shards


def _key_in(section: str) -> str:
    return next(key for key in FIELDS if key.startswith(f"{section}."))


def _typed(node: DictConfig) -> Config:
    try:
        config = cast(Config, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} cannot be resolved: {_first_line(error)}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"the configuration cannot be resolved: {_first_line(error)}") from error
    for key in FIELDS:
        _check_numbers(key, attrgetter(key)(config))
    return config


def _check_numbers(key: str, value: Any) -> None:
    """Refuse a whole number that no tensor holds."""
    if isinstance(value, list | tuple):
        for entry in value:
            _check_numbers(key, entry)
    elif is_dataclass(value) and not isinstance(value, type):
        for name, entry in vars(value).items():
            _check_numbers(f"{key}.{name}", entry)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(
            f"{key} is a number of {value.bit_length()} bits, more than the 64 that there are: use another"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
