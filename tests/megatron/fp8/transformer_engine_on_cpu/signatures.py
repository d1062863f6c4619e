"""Each call of Transformer Engine that w2s makes, itself or through Megatron's classes, beside the release's signature.

    python -m tests.megatron.fp8.transformer_engine_on_cpu.signatures FOLDER

FOLDER holds an unpacked release. Prints the calls that were compared as JSON; one that does not fit is an error.
"""

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.megatron.fp8.transformer_engine_on_cpu import stub

stub.install(Path(sys.argv[1]))

import transformer_engine.pytorch as te  # noqa: E402
from megatron.core import fp8_utils  # noqa: E402
from megatron.core.extensions import transformer_engine as wrapped  # noqa: E402

from w2s.megatron.fp8 import transformer_engine  # noqa: E402

SOURCES = (
    (transformer_engine, transformer_engine._without_fp8),
    (wrapped, wrapped.TELinear),
    (wrapped, wrapped.TEColumnParallelLinear),
    (wrapped, wrapped.TERowParallelLinear),
    (wrapped, wrapped.TEDelayedScaling),
    (fp8_utils, fp8_utils.get_fp8_recipe),
    (fp8_utils, fp8_utils.get_fp8_context),
)
"""Where w2s, and Megatron for it, calls Transformer Engine: a module, and what of it."""

READ = {
    "module/linear.py": ("weight", "fp8_meta", "tp_group", "tp_size", "parallel_mode", "sequence_parallel"),
    "module/base.py": ("clear_high_precision_init_val", "get_high_precision_init_val", "scaling_fwd", "scaling_bwd"),
}
"""Names that `transformer_engine` reads of a linear and of its weights, by the file that gives them."""


def calls(module: ModuleType, source: Any) -> Iterator[tuple[str, Any, ast.Call]]:
    """The calls in some code whose target is Transformer Engine's: name, target and call."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(source)))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            target = meant(module, source, name)
            # The constructor of a dataclass belongs to no module.
            owner = source.__mro__[1] if name == "super().__init__" and inspect.isclass(source) else target
            if str(getattr(owner, "__module__", "")).startswith("transformer_engine"):
                yield name, target, node


def meant(module: ModuleType, source: Any, name: str) -> Any:
    """What a dotted name means in a module, or in a class of it; None for anything else."""
    first, *rest = name.split(".")
    found: Any = te if (module, first) == (transformer_engine, "te") else vars(module).get(first)
    if first == "super()" and inspect.isclass(source):
        found = source.__mro__[1]
    for part in rest:
        found = getattr(found, part, None)
    return found


def check(name: str, target: Any, call: ast.Call) -> None:
    """Fail if a call does not fit the signature; of what is handed on as `**more` nothing is known."""
    signature, named = inspect.signature(target), [each.arg for each in call.keywords]
    bind = signature.bind_partial if None in named else signature.bind
    itself = [None] if name.startswith("super()") else []
    bind(*itself, *call.args, **{name: None for name in named if name})


def main() -> None:
    compared = []
    for module, source in SOURCES:
        for name, target, call in calls(module, source):
            check(name, target, call)
            compared.append(f"{source.__name__}: {ast.unparse(call)}")
    for file, names in READ.items():
        text = (Path(te.__file__).parent / file).read_text()
        assert all(name in text for name in names), (file, names)
    print(json.dumps(sorted(compared)))


if __name__ == "__main__":
    main()
