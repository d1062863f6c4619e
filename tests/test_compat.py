"""Private names of torch, pickle and timm do what `w2s/compat.py` says, and nothing else names one."""

import ast
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

import w2s
from w2s import compat

ROOT = Path(w2s.__file__).parent
SOURCES = [*ROOT.rglob("*.py"), *(ROOT / "stages").glob("*.py")]
"""A link leads to the stages, and globs do not follow one."""
PLACES = {ROOT / "compat.py", ROOT / "megatron" / "compat.py"}
FREE = {"_replace", "_exit", "_getframe", "_current_frames", "_dynamo", "_config"}
"""Documented, of named tuples, os, sys, torch; and the settings of multiprocessing, needed before torch is imported."""
OPERATORS = "_foreach_"
"""Torch documents these operators, and optimizers of others use them."""
QUOTED = re.compile(r"(torch|megatron|transformer_engine|mlflow|open_clip|timm)(\.\w+)+")
"""A dotted name of a library in a string, as pickles have them."""


def test_private_names_are_named_in_compat_alone() -> None:
    sources = {path: ast.parse(path.read_text()) for path in SOURCES}
    own = {name for tree in sources.values() for name in _defined(tree)}
    found = {path: list(_foreign(tree, own)) for path, tree in sources.items()}
    assert {path for path, names in found.items() if names} == PLACES, found


def _defined(tree: ast.AST) -> Iterator[str]:
    """The private names that a module of ours gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if _is_private(node.attr) and node.attr not in own and ast.unparse(node.value) not in ("self", "cls"):
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(each.name for each in node.names)]
            yield from (f"{node.module}: {name}" for name in names if _is_private(name))
        elif isinstance(node, ast.keyword) and _is_private(node.arg or ""):
            yield f"{node.arg}="
        elif isinstance(node, ast.Constant) and QUOTED.fullmatch(str(node.value)):
            yield from (str(node.value) for name in str(node.value).split(".") if _is_private(name))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", OPERATORS)) and name not in FREE


def test_fake_tensors_have_storages_that_are_told_apart() -> None:
    with compat.FakeTensorMode():
        one, other = torch.empty(3), torch.empty(3)
    assert isinstance(one, compat.FakeTensor)
    keys = [compat.storage_key(each.untyped_storage()) for each in (one, one[1:], other)]
    assert keys[0] == keys[1] != keys[2]
    with compat.FakeTensorMode(), compat.unset_fake_temporarily():
        assert not isinstance(torch.zeros(1), compat.FakeTensor)


def test_a_mode_sees_operators_and_knows_which_read_and_which_write() -> None:
    seen = []

    class Mode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append((func, compat.mutates(func), len(compat.tree_leaves((args, kwargs)))))
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add_(1).sum().item()
    names = [func.overloadpacket.__name__ for func, _, _ in seen]
    writes = dict(zip(names, [writes for _, writes, _ in seen], strict=True))
    assert writes["add_"] and not writes["sum"]
    assert seen[-1][0] is compat.READ_SCALAR


def test_a_product_in_fp8_is_that_of_the_scaled_factors() -> None:
    a, b = (torch.randint(-4, 5, (16, 16)).float() for _ in range(2))
    quantized = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    out = compat.scaled_mm(*quantized, torch.tensor(0.5), torch.tensor(2.0), torch.float32)
    torch.testing.assert_close(out, a @ b, atol=0, rtol=0)  # small whole numbers, which the format holds


def test_what_is_called_after_a_backward_pass_and_a_pass_of_our_own() -> None:
    order = list[str]()
    leaf = torch.ones(2, requires_grad=True)
    out = leaf * 3

    def note(gradient: Tensor) -> None:
        compat.after_backward(lambda: order.append("ended"))
        order.append("begun")

    out.register_hook(note)
    compat.run_backward([out], [torch.tensor([1.0, 2.0])])
    assert order == ["begun", "ended"]
    assert leaf.grad is not None and leaf.grad.tolist() == [3, 6]


def test_function_modes_are_listed_and_left_out() -> None:
    class Nothing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return None

    with Nothing() as outer, Nothing() as inner:
        assert compat.function_modes()[-2:] == [outer, inner]
        assert torch.zeros(2) is None
        with compat.no_function_modes():
            assert torch.zeros(2).tolist() == [0, 0]


def test_what_to_asks_for() -> None:
    assert compat.parse_to("cpu", torch.float64, non_blocking=True)[:3] == (torch.device("cpu"), torch.float64, True)


def test_own_parameters_and_buffers_are_changed_and_those_of_children_are_not() -> None:
    outer, inner = nn.BatchNorm1d(2), nn.Linear(1, 1)
    outer.add_module("inner", inner)
    before = inner.weight
    compat.apply_to_own_tensors(outer, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert outer.weight.dtype == torch.float64 and isinstance(outer.weight, nn.Parameter)
    assert outer.running_mean is not None and outer.running_mean.dtype == torch.float64
    assert inner.weight is before
    assert vars(nn.Module)[compat.MODULE_APPLY] is not None


def test_process_groups_in_the_order_of_their_making() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        made = dist.new_group([0])
        assert compat.process_groups() == [compat.world_group(), made]
        assert compat.group_name(made) == made.group_name
        parts = [torch.ones(2), torch.ones(3)]
        with compat.coalescing_manager(made, async_ops=True) as together:
            for part in parts:
                dist.all_reduce(part, group=made)
        together.wait()
        assert [part.sum().item() for part in parts] == [2, 3]
    finally:
        dist.destroy_process_group()
    dist.init_process_group("fake", store=compat.fake_store(), rank=3, world_size=8)
    assert (dist.get_rank(), dist.get_world_size()) == (3, 8)
    dist.destroy_process_group()


def test_the_processes_of_a_loader_end() -> None:
    assert compat.worker_processes(iter(DataLoader([1], batch_size=None))) == []  # type: ignore[arg-type]
    batches = iter(DataLoader(range(4), batch_size=None, num_workers=1))  # type: ignore[arg-type]
    (process,) = compat.worker_processes(batches)
    assert process.is_alive()
    compat.shut_down_workers(batches)
    assert not process.is_alive()


class Listed(nn.Module):
    """Has a list of one type, for TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [1, 2]


def test_pickles_of_tensors_and_archives(tmp_path: Path) -> None:
    named = pickle.dumps(torch.ones(2))
    assert [name for name in compat.TENSOR_FUNCTIONS if name.rpartition(".")[2].encode() in named]
    found = compat.PythonUnpickler(io.BytesIO(pickle.dumps({"a": 1}))).load()
    assert found == {"a": 1} and not isinstance(compat.PythonUnpickler, pickle.Unpickler)
    assert compat.storage_types()["BFloat16Storage"] == torch.bfloat16
    bytes_of_ones = torch.ones(2).untyped_storage()
    assert compat.typed_storage(bytes_of_ones, torch.float32).dtype == torch.float32
    # Megatron-Core 0.19 puts its own in torch's place, wherever it has been imported.
    names = (compat.STORAGE_FROM_BYTES, "megatron.core.safe_globals.safe_load_from_bytes")
    functions = ["c{0}\n{2}\n".format(*name.rpartition(".")).encode() for name in names]
    assert any(function in pickle.dumps(bytes_of_ones, protocol=2) for function in functions)
    scripted = torch.jit.script(Listed())
    scripted.save(str(tmp_path / "z.pt"))  # type: ignore[no-untyped-call]
    assert compat.SCRIPTED_LISTS.encode() in compat.TorchFileReader(str(tmp_path / "z.pt")).get_record("data.pkl")
    torch.save(torch.ones(2), tmp_path / "x.pt")
    assert compat.TorchFileReader(str(tmp_path / "x.pt")).get_record("data.pkl").startswith(b"\x80")
    (tmp_path / "y.pt").write_bytes(b"no archive")
    with pytest.raises(RuntimeError, match=compat.NOT_A_TORCH_FILE):
        torch.load(tmp_path / "y.pt", mmap=True, weights_only=True)


def test_what_needs_a_gpu_is_there() -> None:
    for name in ("_record_memory_history", "_dump_snapshot"):
        assert callable(getattr(torch.cuda.memory, name))


def test_positions_of_timm() -> None:
    timm = pytest.importorskip("timm")
    trunk = timm.create_model("test_vit", img_size=32, num_classes=0)
    patches = trunk.patch_embed(torch.zeros(1, 3, 32, 32))
    assert compat.positioned(trunk, patches).shape == (1, trunk.num_prefix_tokens + 4, trunk.embed_dim)
