"""Mutants of the CUDA device's code: each call, test or hold that keeps an order, taken away, one at a time.

``python tests/swap/cuda/mutants.py list`` names them, ``... kill N`` runs the tests against the N-th, and
exits with 0 if they notice. ``test_mutants.py`` does so for all.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MODULES = (
    "chainer_ooc.swap.devices.cuda",
    "chainer_ooc.swap.devices.cuda_streams",
    "chainer_ooc.swap.devices.cuda_host",
    "chainer_ooc.swap.devices.cuda_allocator",
)
#: Calls that keep an order, hold something or give something back. Taken away they become ``None``.
CALLS = {
    "wait_event",
    "synchronize",
    "note_current",
    "note_allocation",
    "let_compute_wait",
    "free",
    "join",
    "wait",
    "extend",
    "append",
    "retire",
    "exception",
    "make_room",
    "order_computing",
    "insert",
    "shutdown",
    "after_fork",
}
#: Attributes whose assignment holds something or lets it go.
HELD = {"_owner", "written", "read", "address", "offset", "_compute", "_peak", "_pool", "stand_in"}
#: Mutants that differ in nothing that can be observed here, and why.
EQUIVALENT: dict[str, str] = {}


def source(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def sites(tree: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST, str]]:
    """Yield what is mutated: the node, what becomes of it, its parent statement's function, a description."""
    function: list[str] = []

    def visit(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named:
            function.append(node.name)
        where = ".".join(function)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in CALLS:
                yield node, "pass", f"{where}: no {ast.unparse(node)}"
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            target = node.targets[0]
            if target.attr in HELD and function[-1:] != ["__init__"]:
                yield node, "pass", f"{where}: no {ast.unparse(node)}"
            elif target.attr == "_owner":
                yield node, "none", f"{where}: {ast.unparse(target)} = None"
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            for value in (True, False):
                if not (isinstance(node, ast.While) and value):
                    yield node, str(value), f"{where}: {value} for {ast.unparse(node.test)}"
        if isinstance(node, ast.For) and "event" in ast.unparse(node.target):
            yield node, "pass", f"{where}: no loop over {ast.unparse(node.iter)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)
        if named:
            function.pop()

    yield from visit(tree)  # type: ignore[misc]


def mutants() -> list[tuple[str, int, str]]:
    """Return all of them: module, number within it, description."""
    return [
        (module, number, f"{module.rsplit('.', 1)[1]}.{site[2]}")
        for module in MODULES
        for number, site in enumerate(sites(ast.parse(source(module).read_text())))
    ]


def mutate(module: str, number: int) -> ast.Module:
    """Return the module with the change."""
    tree = ast.parse(source(module).read_text())
    node, how, _ = list(sites(tree))[number]  # type: ignore[misc]

    class Change(ast.NodeTransformer):
        def visit(self, other: ast.AST) -> ast.AST:
            if other is not node:
                return self.generic_visit(other)
            if how == "pass":
                return ast.copy_location(ast.Pass(), other)
            if how == "none":
                other.value = ast.copy_location(ast.Constant(None), other)  # type: ignore[attr-defined]
            else:
                other.test = ast.copy_location(  # type: ignore[attr-defined]
                    ast.Constant(how == "True"),
                    other.test,  # type: ignore[attr-defined]
                )
            return other

    return ast.fix_missing_locations(Change().visit(tree))


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the mutant in the place of the module."""

    def __init__(self, module: str, number: int) -> None:
        self.module, self.number = module, number

    def find_spec(self, name, path, target=None):
        if name == self.module:
            return importlib.util.spec_from_file_location(name, source(name), loader=self)
        return None

    def exec_module(self, module) -> None:
        tree = mutate(self.module, self.number)
        exec(compile(tree, str(source(self.module)), "exec"), module.__dict__)


def kill(number: int) -> int:
    """Run the tests against a mutant. Returns 0 if they fail, as they should."""
    import pytest

    module, within, what = mutants()[number]
    sys.meta_path.insert(0, Finder(module, within))
    here = str(Path(__file__).parent)
    status = pytest.main(
        ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "--no-header", "--tb=line"]
        + [f"{here}/test_{name}.py" for name in ("device", "allocator", "schedules")]
    )
    print(f"{'SURVIVED' if status == 0 else 'killed'}: {what}")
    return int(status == 0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "list":
        for index, (_, _, description) in enumerate(mutants()):
            print(index, description)
    else:
        sys.exit(kill(int(sys.argv[2])))
