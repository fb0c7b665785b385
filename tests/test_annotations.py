"""Everything public says its types: a signature tells what a function takes and what it gives."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxspec

PACKAGE = Path(jaxspec.__file__).parent
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def signatures(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The public functions of a module and methods of its public classes, by name; those with double underscores are
    public too, nested ones are not."""
    for each in body:
        if isinstance(each, ast.ClassDef) and not each.name.startswith("_"):
            yield from signatures(each.body, f"{owner}{each.name}.")
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(each.name):
            yield owner + each.name, each


def is_public(name: str) -> bool:
    return not name.startswith("_") or name.endswith("__")


def unannotated(source: str) -> list[str]:
    """What public signatures leave open: `function(parameter)` and `function -> ?`."""
    found = []
    for name, function in signatures(ast.parse(source).body):
        given = function.args
        parameters = [*given.posonlyargs, *given.args]
        static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
        if "." in name and not static:
            parameters = parameters[1:]  # self or cls
        parameters += [*given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        found += [f"{name}({each.arg})" for each in parameters if each.annotation is None]
        found += [f"{name} -> ?"] if function.returns is None else []
    return found


@pytest.mark.parametrize("module", MODULES)
def test_public_signatures_are_annotated(module):
    assert unannotated((PACKAGE / module).read_text(encoding="utf-8")) == []


def test_what_is_left_open_is_found():
    source = """
def function(a, /, b: int, *rest, c, **others): ...
def _private(a): ...
class Public:
    def __init__(self, a): ...
    @staticmethod
    def static(a) -> int: ...
    def method(self) -> int:
        def nested(a): ...
    class Inner:
        async def method(self, a: int): ...
class _Private:
    def method(self, a): ...
"""
    assert unannotated(source) == [
        *("function(a)", "function(c)", "function(rest)", "function(others)", "function -> ?"),
        *("Public.__init__(a)", "Public.__init__ -> ?", "Public.static(a)", "Public.Inner.method -> ?"),
    ]
