"""What torch declares of its private operations, held against the calls in the code, for every version promised.

The calls are read out of the sources, and so is whether an operation of that kind is missing in the table.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads(Path(__file__).with_name("torch_schemas.toml").read_text())
OPERATIONS: dict[str, dict[str, str]] = TABLE["operations"]
PYTHON: dict[str, list[str] | str] = TABLE["python"]

# These have no underscore, but torch calls them prototypes or hardly documents them.
UNSTABLE = (
    "torch.nn.attention.activate_flash_attention_impl",
    "torch.nn.attention.restore_flash_attention_impl",
    "torch.segment_reduce",
)

MODULE_ATTRIBUTES = {name for name in dir(torch.nn.Module()) if name.startswith("_") and not name.startswith("__")}


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


READ = {minor(version): version for version in TABLE["read"]}
INSTALLED = minor(torch.__version__)


def schema(operation: str, version: tuple[int, ...]) -> Any:
    """The operation's schema in a version of torch; in one newer than all that were read, that of the newest."""
    since = max(known for known in map(minor, OPERATIONS[operation]) if known <= version)
    return torch._C.parse_schema(operation + OPERATIONS[operation][".".join(map(str, since))])


@dataclass(frozen=True)
class Use:
    """A private name of torch in the code; of a call, how many arguments it gives by position and which by name."""

    name: str
    file: str
    line: int
    call: tuple[int, tuple[str, ...]] | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def operation(self) -> str | None:
        """torch.ops.mkldnn.x.binary → mkldnn::x.binary, torch.x → aten::x; None for what is no operation."""
        parts = self.name.split(".")[1:]
        if parts[0] == "ops":
            return f"{parts[1]}::{'.'.join(parts[2:])}"
        return f"aten::{parts[0]}" if len(parts) == 1 else None


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    """`torch.ops.x` of an attribute or a name, through the file's own names for parts of torch; "" of anything else."""
    if isinstance(node, ast.Name):
        return known.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value, known)):
        return f"{owner}.{node.attr}"
    return ""


def private(name: str) -> bool:
    inner = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    return name.startswith("torch.") and (inner or name.startswith("torch.ops.") or name in UNSTABLE)


def own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def uses_in(source: str, file: str) -> Iterator[Use]:
    """Every private name of torch, whole; a call through a name of the file's own is one of the operation."""
    tree = ast.parse(source)
    known = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and dotted(node.value, known):
            known[node.targets[0].id] = dotted(node.value, known)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    owners = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name) or id(node) in owners:
            continue
        name = dotted(node, known)
        if isinstance(node, ast.Attribute) and node.attr in MODULE_ATTRIBUTES and not name and not own(node.value):
            yield Use(f"torch.nn.Module.{node.attr}", file, node.lineno)
        elif private(name):
            call = calls.get(id(node))
            given = None
            if call and not any(isinstance(argument, ast.Starred) for argument in call.args):
                given = (len(call.args), tuple(keyword.arg or "**" for keyword in call.keywords))
            yield Use(name, file, node.lineno, given)


USES = [
    use
    for package in ("model_store", "service", "bench")
    for path in sorted((ROOT / package).rglob("*.py"))
    for use in uses_in(path.read_text(), str(path.relative_to(ROOT)))
]
CALLS = [use for use in USES if use.operation in OPERATIONS and use.call]


def bound(call: tuple[int, tuple[str, ...]], schema: Any) -> list[tuple[str, str]]:
    """The schema's arguments that a call gives, by name and type.

    Raises:
        TypeError: if the call does not fit.
    """
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    count, names = call
    if count > len(positional):
        raise TypeError(f"takes {len(positional)} arguments by position, not {count}")
    given = positional[:count]
    left = {argument.name: argument for argument in schema.arguments if argument not in given}
    for name in names:
        if name not in left:
            raise TypeError(f"has no argument {name} left to give by name")
        given.append(left.pop(name))
    if lacking := [name for name, argument in left.items() if not argument.has_default_value()]:
        raise TypeError(f"needs {', '.join(lacking)}")
    return [(argument.name, str(argument.type)) for argument in given]


@pytest.mark.parametrize("version", READ, ids=READ.values())
@pytest.mark.parametrize("use", CALLS, ids=str)
def test_a_call_means_the_same_in_every_version(use: Use, version: tuple[int, ...]) -> None:
    assert use.operation
    assert use.call
    here = bound(use.call, schema(use.operation, INSTALLED))
    assert bound(use.call, schema(use.operation, version)) == here, f"{use}: {use.name} is another in {READ[version]}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_installed_torch_declares_what_the_table_says(operation: str) -> None:
    if operation.startswith("mkldnn::") and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    name, _, overload = operation.partition(".")
    declared = {str(one) for one in torch._C._jit_get_schemas_for_operator(name) if one.overload_name == overload}
    assert declared == {str(schema(operation, INSTALLED))}, (
        f"torch {torch.__version__} declares {operation} in another way than torch_schemas.toml: read its calls in the "
        "code anew, then add the new line there"
    )


@pytest.mark.parametrize("name", PYTHON)
def test_the_installed_torch_has_the_name(name: str) -> None:
    owner, _, last = name.rpartition(".")
    found = getattr(torch.nn.Module if owner == "torch.nn.Module" else importlib.import_module(owner), last)
    assert PYTHON[name] == (list(inspect.signature(found).parameters) if inspect.isfunction(found) else "a value")


def test_a_private_name_in_use_is_in_the_table() -> None:
    lacking = {use.name: str(use) for use in USES if (use.operation or use.name) not in OPERATIONS | PYTHON}
    assert not lacking, "read these in every version of torch that pyproject.toml promises: see torch_schemas.toml"


def test_the_lowest_version_promised_is_the_first_that_was_read() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>=" + ".".join(map(str, min(READ))) in dependencies


def test_calls_are_found_through_names_and_bound_as_torch_binds_them() -> None:
    source = """
import torch
import torch._dynamo.utils as dynamo
pointwise = torch.ops.mkldnn._linear_pointwise
pointwise.binary(x, y, w, None, "mul")
torch._int_mm(*both)
torch._scaled_mm(a, b, one, scale_b=two, **more)
layer._compiled_call_impl = None
dynamo.counters.clear()
"""
    found = {(use.operation or use.name, use.call) for use in uses_in(source, "a.py")}
    assert found == {
        ("mkldnn::_linear_pointwise", None),
        ("mkldnn::_linear_pointwise.binary", (5, ())),
        ("aten::_int_mm", None),
        ("aten::_scaled_mm", (3, ("scale_b", "**"))),
        ("torch.nn.Module._compiled_call_impl", None),
        ("torch._dynamo.utils.counters.clear", (0, ())),
    }
    line = torch._C.parse_schema("x::y(Tensor a, Tensor b, *, int c, int d=0) -> Tensor")
    assert bound((2, ("c",)), line) == [("a", "Tensor"), ("b", "Tensor"), ("c", "int")]
    for call, wrong in (((3, ("c",)), "2 arguments"), ((2, ("b", "c")), "no argument b"), ((1, ("c",)), "needs b")):
        with pytest.raises(TypeError, match=wrong):
            bound(call, line)
