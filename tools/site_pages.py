"""The pages of the site that are made of the code: a page for each command, and one for each section of keys.

MkDocs calls the two functions at the end, as `mkdocs.yml` says; nothing is written to disk but the site.
CHANGELOG.md and CONTRIBUTING.md are pages too.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from typer.main import get_command

from w2s.cli import app
from w2s.config.fields import entry_section, expected
from w2s.config.load import GROUPS, STAGES, load, names_of
from w2s.config.sections import Config

ROOT = Path(__file__).parents[1]

GUIDES = {
    "stage": "runs",
    "run": "runs",
    "report": "runs",
    "tracking": "runs",
    "data": "data",
    "eval": "evaluation",
    "teacher": "teachers",
    "mim": "masked_stage",
    "clip": "contrastive_stage",
    "clip.distill": "contrastive_stage",
    "init": "starts",
    "optim": "starts",
    "import": "weights",
    "export": "weights",
    "inspect": "weights",
    "encode": "weights",
    "parallel": "cluster",
    "precision": "cluster",
    "plan": "plan",
    "rehearse": "plan",
    "checkpoint": "reliability",
    "bench": "bench",
}
"""The hand-written page beside a command, or beside a section of keys."""


def documentation(section: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, by the field's name."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def sections(section: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Give every section with its full name (`model`, `model.vision`), outer ones first."""
    hints = get_type_hints(section)
    for field in fields(section):
        if is_dataclass(hints[field.name]):
            yield f"{prefix}{field.name}", hints[field.name]
            yield from sections(hints[field.name], f"{prefix}{field.name}.")


def key_pages() -> dict[str, str]:
    """Return the pages of the configuration's keys: Markdown by path."""
    top = [name for name, _ in sections() if "." not in name]
    return {"keys/index.md": _key_index(top)} | {f"keys/{name}.md": _key_page(name) for name in top}


def _key_index(top: list[str]) -> str:
    by_name = dict(sections())
    rows = [f"| [`{name}`]({name}.md) | {inspect.getdoc(by_name[name])} |" for name in top]
    groups = [f"| `{group}=` | {', '.join(f'`{name}`' for name in names_of(group))} |" for group in GROUPS]
    groups.append(f"| `eval.suite=` | {', '.join(f'`{name}`' for name in names_of('suite'))} |")
    return "\n".join([_INDEX, *rows, _FILES, *groups, ""])


_INDEX = """# All keys

`key=value` on the command line of a stage sets a key: see [Runs](../runs.md). The default is
what a stage takes without an override; where the stages differ, each is named.

| section | what it is |
|---|---|"""

_FILES = """
## Files of `configs/`

A file sets several keys at once; any path that ends in `.yaml` does too.

| | names |
|---|---|"""


def _key_page(top: str) -> str:
    found = [(name, section) for name, section in sections() if name.split(".")[0] == top]
    return "\n".join([f"# Keys of `{top}`", "", *(line for each in found for line in _section(*each))])


def _section(name: str, section: type) -> Iterator[str]:
    hints, texts = get_type_hints(section), documentation(section)
    if "." in name:
        yield from (f"## `{name}`", "")
    yield from (str(inspect.getdoc(section)), "")
    if name in GUIDES:
        yield from (f"See also: [{_title(GUIDES[name])}](../{GUIDES[name]}.md).", "")
    for field in fields(section):
        if not is_dataclass(hints[field.name]):
            yield from _key(f"{name}.{field.name}", texts.get(field.name, ""))


def _key(key: str, text: str) -> Iterator[str]:
    yield from (
        f"### `{key}` {{ #{key} }}",
        "",
        f"{expected(key)}; default {_default(key)}",
        "{ .takes }",
        "",
        text,
        "",
    )
    entry = entry_section(key)
    if entry is not None:
        yield from ("Keys of an entry:", "")
        for name, document in documentation(entry).items():
            yield f"- `{name}`: {' '.join(document.split())}"
        yield ""


def _default(key: str) -> str:
    """What a key is where nothing sets it, stage by stage where they differ."""
    values = {stage: _written(_value(_configuration(stage), key)) for stage in STAGES}
    first = next(iter(values.values()))
    if all(value == first for value in values.values()):
        return first
    return ", ".join(f"{value} ({stage})" for stage, value in values.items())


@cache
def _configuration(stage: str) -> Mapping[str, Any]:
    return asdict(load(stage))


def _value(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _written(value: Any) -> str:
    if value == "":
        return "empty"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    return f"`{text}`"


def command_pages() -> dict[str, str]:
    """Return a page for each command, groups of commands together: Markdown by path."""
    main = get_command(app)
    rows = [f"| [`w2s {name}`]({name}.md) | {_first_line(command.help)} |" for name, command in main.commands.items()]
    index = ["# Commands", "", str(main.help), "", "| command | what it does |", "|---|---|", *rows, ""]
    index += ["## Options of `w2s` itself", "", *_options(main.params)]
    pages = {"commands/index.md": "\n".join(index)}
    for name, command in main.commands.items():
        pages[f"commands/{name}.md"] = "\n".join(_command_page(name, command))
    return pages


def _command_page(name: str, command: Any) -> Iterator[str]:
    yield from (f"# `w2s {name}`", "", inspect.cleandoc(command.help), "")
    if name in GUIDES:
        yield from (f"See also: [{_title(GUIDES[name])}](../{GUIDES[name]}.md).", "")
    inner = getattr(command, "commands", {})
    for each, sub in inner.items():
        yield from (f"## `w2s {name} {each}`", "", inspect.cleandoc(sub.help), "", *_usage(f"w2s {name} {each}", sub))
    if not inner:
        yield from _usage(f"w2s {name}", command)


def _usage(name: str, command: Any) -> Iterator[str]:
    usage = command.get_usage(command.context_class(command, info_name=name)).removeprefix("Usage: ")
    yield from ("```text", " ".join(usage.split()), "```", "")
    yield from _options(command.params)


def _options(parameters: list[Any]) -> Iterator[str]:
    for parameter in parameters:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        if not parameter.opts[0].startswith("-"):
            names = f"`{(parameter.metavar or parameter.name).upper()}`"
        yield from (names, f":   {parameter.help}{_taken(parameter)}", "")


def _taken(parameter: Any) -> str:
    """What a parameter takes and what it is without being given, in words, as far as its help leaves it open."""
    hint = parameter.type_descriptor.annotation
    choices = [str(each) for part in (hint, *get_args(hint)) if _is_literal(part) for each in get_args(part)]
    words = [f"One of {', '.join(f'`{choice}`' for choice in choices)}."] if choices else []
    if parameter.required:
        words.append("Required.")
    elif parameter.default not in (None, "") and parameter.default is not False:
        words.append(f"Default `{parameter.default}`.")
    return "".join(f" {word}" for word in words)


def _is_literal(hint: Any) -> bool:
    return bool(get_args(hint)) and str(get_origin(hint)) == "typing.Literal"


def _first_line(text: str) -> str:
    return inspect.cleandoc(text).partition("\n")[0]


def _title(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def root_pages() -> dict[str, str]:
    """Return the pages that lie at the root of the repository, their links as the site has them."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
    return {page: text.replace("](docs/", "](").replace("](README.md", "](index.md") for page, text in texts.items()}


def on_config(config: Any) -> Any:
    """Add what is generated to the navigation: a hook of MkDocs."""
    for title, pages in (("Commands", command_pages()), ("Keys", key_pages())):
        config.nav.append({title: [{Path(path).stem: path} for path in pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages: a hook of MkDocs."""
    from mkdocs.structure.files import File

    for path, text in (root_pages() | command_pages() | key_pages()).items():
        files.append(File.generated(config, path, content=text))
    return files
