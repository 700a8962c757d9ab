"""Mutants: changes of the package's syntax trees, found by what the code does or planted by hand; made in memory."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import functools
import importlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tests.conftest import ROOT
from tests.mutation.targets import (
    ENGINE,
    EQUIVALENT,
    PLANTED,
    STATEMENTS,
    TELLING,
    TESTS,
    TOLD,
    Planted,
)

PACKAGE = ROOT / "chainer_ooc"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        module: The name of the module, from ``chainer_ooc`` on.
        function: The qualified name of the outermost function it is in; empty at the module's top.
        name: Where it is and what it does, in words.
        change: Changes the module's tree.
    """

    module: str
    function: str
    name: str
    change: Callable[[ast.Module], ast.Module]

    @property
    def part(self) -> str:
        """Whose tests must notice it: a key of ``TESTS``."""
        return max((part for part in TESTS if self.module.startswith(part)), key=len)

    @property
    def file(self) -> str:
        return str(PACKAGE.joinpath(*self.module.split(".")).with_suffix(".py"))

    def mutated(self) -> ast.Module:
        """Return the syntax tree of the module with the change."""
        return ast.fix_missing_locations(self.change(tree_of(self.module)))

    def reason(self) -> str | None:
        """Return why it cannot be noticed, ``None`` if it must be."""
        for begin, why in EQUIVALENT.items():
            # What else is called so in the function is numbered, and another change.
            if self.name.startswith(begin) and not self.name[len(begin) :].startswith(" ("):
                return why
        return None


def tree_of(module: str) -> ast.Module:
    """Return the syntax tree of a module, named from ``chainer_ooc`` on."""
    return ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())


def mutants() -> list[Mutant]:
    """Return all mutants: the planted ones first."""
    found = [planted(one) for one in PLANTED]
    for module in (*ENGINE, *STATEMENTS):
        seen: dict[str, int] = {}
        for number, (function, name, _, _) in enumerate(_sites(tree_of(module), module)):
            name = f"{module}.{name}"
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name += f" ({seen[name]})"
            change = functools.partial(_change_site, module=module, number=number)
            found.append(Mutant(module, function, name, change))
    return found


def planted(one: Planted) -> Mutant:
    """Return a mutant that was planted by hand."""
    name = f"planted: {one.name} [{one.function}]"
    return Mutant(one.module, one.function, name, functools.partial(_plant, one=one))


def _plant(tree: ast.Module, one: Planted) -> ast.Module:
    wanted, new = (ast.parse(text).body[0] for text in (one.old, one.new))
    found = 0

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            nonlocal found
            if ast.dump(ast.Expr(node) if isinstance(node, ast.expr) else node) == ast.dump(wanted):
                found += 1
                return new.value if isinstance(node, ast.expr) else new  # type: ignore[attr-defined]
            return self.generic_visit(node)

    *_, body = (node for name, node in functions(tree) if name == one.function)
    Replace().visit(body)
    if not found:
        where = f"{one.function} of {one.module}"
        raise LookupError(
            f"{one.name}: {where} has no {one.old!r}; change the mutant with the code"
        )
    return tree


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the functions of a module with their names, ``Class.method`` for methods."""
    for node in tree.body:
        for item in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(item, ast.FunctionDef):
                yield f"{node.name}.{item.name}" if item is not node else item.name, item  # type: ignore[attr-defined]


def _change_site(tree: ast.Module, module: str, number: int) -> ast.Module:
    *_, node, change = list(_sites(tree, module))[number]

    class Replace(ast.NodeTransformer):
        def visit(self, other: ast.AST) -> ast.AST:
            return change(other) if other is node else self.generic_visit(other)

    return Replace().visit(tree)


Change = Callable[[ast.AST], ast.AST]


def _becomes(text: str) -> Change:
    """Return what puts code in the place of a statement or an expression."""
    mode = "exec" if text in ("pass", "raise") else "eval"

    def change(node: ast.AST) -> ast.AST:
        new: Any = ast.parse(text, mode=mode)
        return ast.copy_location(new.body[0] if mode == "exec" else new.body, node)

    return change


def _without(field: str, index: int) -> Change:
    """Return what leaves out one of the node's children."""

    def change(node: Any) -> ast.AST:
        rest = getattr(node, field)[:index] + getattr(node, field)[index + 1 :]
        if isinstance(node, ast.BoolOp) and len(rest) == 1:
            return rest[0]
        setattr(node, field, rest)
        return node

    return change


def _test_becomes(value: bool) -> Change:
    def change(node: Any) -> ast.AST:
        node.test = ast.copy_location(ast.Constant(value), node.test)
        return node

    return change


def _body_becomes_raise(node: Any) -> ast.AST:
    node.body = [ast.copy_location(ast.Raise(), node.body[0])]
    return node


def _without_context(node: Any) -> ast.AST:
    always = ast.copy_location(ast.Constant(True), node)
    return ast.copy_location(ast.If(always, node.body, []), node)


def _value_becomes_none(node: Any) -> ast.AST:
    node.value = ast.copy_location(ast.Constant(None), node.value)
    return node


def _value_becomes(value: ast.expr) -> Change:
    def change(node: Any) -> ast.AST:
        node.value = value
        return node

    return change


def _called(node: ast.AST) -> str:
    """Return the name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", "") or getattr(function, "id", "")


def _sites_at(node: Any, in_init: bool) -> Iterator[tuple[str, Change]]:
    """Yield the mutants of one node: the name of the change, and what makes it."""
    text = ast.unparse(node).splitlines()[0] if isinstance(node, ast.stmt | ast.expr) else ""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if _called(node.value) not in TOLD:
            yield f"no {text}", _becomes("pass")
        if isinstance(inner := getattr(node.value.func, "value", None), ast.Call):
            yield f"only {ast.unparse(inner)}", _value_becomes(inner)
    elif isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        target = targets[0].elts[0] if isinstance(targets[0], ast.Tuple) else targets[0]
        plain = ast.unparse(target)
        if isinstance(target, ast.Attribute) and in_init:
            if plain == "self._owner":
                yield f"{plain} = None", _value_becomes_none
        elif isinstance(target, ast.Attribute | ast.Subscript) and "counters" not in plain:
            yield f"no {text}", _becomes("pass")
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        pass
    elif isinstance(node, ast.If | ast.IfExp):
        yield f"True for {ast.unparse(node.test)}", _test_becomes(True)
        yield f"False for {ast.unparse(node.test)}", _test_becomes(False)
    elif isinstance(node, ast.With):
        if _called(node.items[0].context_expr) in ("on_device", "Device"):
            yield f"not {text}", _without_context
    elif isinstance(node, ast.While):
        if not isinstance(node.test, ast.Constant):
            yield f"False for while {ast.unparse(node.test)}", _test_becomes(False)
    elif isinstance(node, ast.BoolOp):
        for index, value in enumerate(node.values):
            yield f"no {ast.unparse(value)} in {text}", _without("values", index)
    elif isinstance(node, ast.comprehension):
        for index, value in enumerate(node.ifs):
            yield f"no if {ast.unparse(value)}", _without("ifs", index)
    elif isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
        kind = ast.unparse(node.type) if node.type else ""
        yield f"raise in except {kind}", _body_becomes_raise
    elif isinstance(node, ast.Raise) and node.exc is not None:
        yield f"no {text}", _becomes("pass")
    elif isinstance(node, ast.Set):
        for index, value in enumerate(node.elts):
            if len(node.elts) > 1:
                yield f"no {ast.unparse(value)} in {text}", _without("elts", index)
    elif isinstance(node, ast.Call) and _called(node) in ("computed", "allocated"):
        yield f"[] for {text}", _becomes("[]")
    elif isinstance(node, ast.Call) and _called(node) == "record" and node.args:
        yield f"never recorded: {text}", lambda call: call.args[0]


def _turned_around(node: Any) -> ast.AST:
    node.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
    return node


def _statements_at(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """Yield the mutants of one node where each statement is left out and each condition turned around."""
    stays = ast.Pass | ast.Global | ast.Nonlocal | ast.Return | ast.Raise
    defined = ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
    documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.stmt) and not isinstance(node, stays | defined) and not documents:
        yield f"leave out {ast.unparse(node).splitlines()[0]!r}", _becomes("pass")
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield f"turn around {ast.unparse(node.test)!r}", _turned_around


def _sites(tree: ast.Module, module: str) -> Iterator[tuple[str, str, ast.AST, Change]]:
    """Yield the generic mutants of a module: the outermost function, the name, the node and the change."""
    patterns = STATEMENTS.get(module)
    names: list[str] = []
    functions: list[str] = []

    def visit(node: ast.AST) -> Iterator[tuple[str, str, ast.AST, Change]]:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named:
            names.append(node.name)  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef):
            functions.append(".".join(names))
        outermost = functions[0] if functions else ""
        found: Iterable[tuple[str, Change]] = ()
        if patterns is None:
            if not (names and names[-1] in TELLING):
                found = _sites_at(node, names[-1:] == ["__init__"])
        elif any(fnmatch.fnmatchcase(outermost, pattern) for pattern in patterns):
            found = _statements_at(node)
        for what, change in found:
            yield outermost, f"{'.'.join(names)}: {what}", node, change
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr_context | ast.Assert):
                yield from visit(child)
        if isinstance(node, ast.FunctionDef):
            functions.pop()
        if named:
            names.pop()

    return visit(tree)


def apply(mutant: Mutant) -> None:
    """Change the module that is imported."""
    module = importlib.import_module(f"chainer_ooc.{mutant.module}")
    code = compile(mutant.mutated(), mutant.file, "exec")
    if not mutant.function:  # a table at the top, in which functions look things up
        namespace: dict[str, Any] = dict(module.__dict__)
        exec(code, namespace)
        table = {
            name: namespace[name] for name, value in module.__dict__.items() if type(value) is dict
        }
        for name, value in table.items():
            if name != "__builtins__":
                by_name = {getattr(key, "name", key): item for key, item in value.items()}
                for key in module.__dict__[name]:
                    _replace_set(module.__dict__[name], key, by_name[getattr(key, "name", key)])
        return
    target = function_of(mutant)
    while hasattr(target, "__wrapped__"):
        target = target.__wrapped__
    target.__code__ = _code_of(code, mutant.function)


def function_of(mutant: Mutant) -> Any:
    """Return the function that is changed, as it is called."""
    target: Any = importlib.import_module(f"chainer_ooc.{mutant.module}")
    for name in mutant.function.split("."):
        target = target.__dict__[name]
    return target.fget if isinstance(target, property) else target


def _replace_set(table: dict[Any, Any], key: Any, value: Any) -> None:
    if isinstance(value, set):  # of members of an enum, which the new module has of its own
        kept = {item.name for item in value}
        table[key] = {item for item in table[key] if item.name in kept}


def _code_of(code: types.CodeType, name: str) -> types.CodeType:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_qualname == name:
                return constant
            if name.startswith(constant.co_qualname + "."):
                return _code_of(constant, name)
    raise LookupError(name)
