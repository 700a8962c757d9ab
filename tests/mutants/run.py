"""Plant errors in the package, one at a time, and see that the tests find each of them.

    python tests/mutants/run.py                    # the planted ones
    python tests/mutants/run.py --generic 60       # and 60 of the generic ones
    python tests/mutants/run.py --generic all      # an hour or two
    python tests/mutants/run.py --jobs 2           # two at a time

A mutant changes the syntax tree of one function. Planted ones are errors that a change could well
bring; generic ones leave out one statement or turn one condition around. Each is written to a copy of
the project, whose fast tests run until the first failure, those of the changed package first. What no
test finds, and is not in ``KNOWN`` with its reason, makes the script fail.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The fast ones of each package, those that find most first.
TESTS = {
    "graph": (
        "tests/graph/test_storages.py",
        "tests/graph/test_modes.py",
        "tests/graph/test_readers.py",
        "tests/graph/test_attributes.py",
        "tests/graph/test_death.py",
    ),
    "swap": (
        "tests/swap/test_manager.py",
        "tests/swap/test_space.py",
        "tests/swap/test_transfers.py",
        "tests/swap/test_ram.py",
    ),
    "all": ("tests/graph/test_random_programs.py", "tests/equality/test_programs.py"),
}

#: The functions in which generic mutants are made.
TARGETS = {
    "chainer_ooc/graph/attributes.py": (
        "PackedTuple.get",
        "_SavedAttribute.*",
        "save_*",
        "_save_list",
        "_descriptor",
    ),
    "chainer_ooc/graph/nodes.py": ("_get_*", "_set_*", "save_*", "_save_node"),
    "chainer_ooc/graph/hooks.py": (
        "_apply",
        "_backprop_step",
        "_fetch",
        "_by_manager",
        "adopt",
        "_save",
    ),
    "chainer_ooc/swap/manager.py": (
        "SwapManager.save",
        "SwapManager.read",
        "SwapManager.fetch",
        "SwapManager.finish",
        "SwapManager.expect",
        "SwapManager.prefetch",
        "SwapManager.move_all_out",
        "SwapManager._begin_in",
        "SwapManager.defer_free",
    ),
    "chainer_ooc/swap/eviction.py": ("Reclaimer.*",),
    "chainer_ooc/swap/prefetch.py": ("Forward.*", "UseOrder.*"),
    "chainer_ooc/swap/transfers.py": ("Mover.*",),
    "chainer_ooc/swap/storage.py": ("Storage.move_to", "Storage.held", "Saved.*"),
    "chainer_ooc/swap/devices/ram/device.py": (
        "RamDevice.locate",
        "RamDevice.view",
        "RamDevice.copy_*",
        "_dense_order",
        "_is_dense",
    ),
}

#: Generic mutants that the tests cannot find: a part of their name, and why.
KNOWN = {
    "self.counters.hits": "a figure for reports",
    "counters.storages_": "a figure for reports",
    "time.perf_counter()": "a figure for reports",
    "assert ": "it guards against errors of the callers",
    "stalled": "a figure for reports",
    "_join_arrival: leave out 'storage.transfer = None'": "a transfer that has ended changes nothing",
    "'if record is None and plenty:'": "what follows does nothing then, more slowly",
    "_is_dense: turn around": "the other branch gives the same, more slowly",
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        name: File, function and what was done there.
        path: The file, relative to the project.
        source: Its new text.
        line: Where.
    """

    name: str
    path: str
    source: str
    line: int


# Planted mutants: name, file, function, what to look for, what to put there instead.
PLANTED = (
    (
        "restore with swapped strides",
        "chainer_ooc/swap/devices/ram/device.py",
        "RamDevice.view",
        "layout.strides",
        "layout.strides[::-1]",
    ),
    (
        "restore at the start of the storage",
        "chainer_ooc/swap/devices/ram/device.py",
        "RamDevice.view",
        "origin + layout.offset",
        "origin",
    ),
    (
        "skip the look for an alias",
        "chainer_ooc/swap/manager.py",
        "SwapManager.save",
        "self._mover.find(location.owner)",
        "None",
    ),
    (
        "lose an attribute",
        "chainer_ooc/graph/attributes.py",
        "save_attributes",
        "attributes[name] = replacement",
        "attributes.pop(name)",
    ),
    (
        "lose an item of a tuple",
        "chainer_ooc/graph/attributes.py",
        "PackedTuple.get",
        "item.get() if type(item) is Saved else item",
        "None if type(item) is Saved else item",
    ),
    (
        "keep a stale copy after an edit",
        "chainer_ooc/swap/transfers.py",
        "Mover.mark_dirty",
        "storage.state is State.BOTH",
        "False",
    ),
    (
        "keep a stale copy after an edit while it is written",
        "chainer_ooc/swap/transfers.py",
        "Mover.end_out",
        "storage.tainted",
        "False",
    ),
    (
        "no fetch after disable()",
        "chainer_ooc/graph/nodes.py",
        "_get_data",
        "type(data) is Saved",
        "type(data) is Saved and __import__('chainer_ooc').is_enabled()",
    ),
    (
        "release what is held",
        "chainer_ooc/swap/storage.py",
        "Storage.held",
        'references.attribute_is_referenced_externally(self, "owner")',
        "False",
    ),
    (
        "do not wait for what comes in",
        "chainer_ooc/swap/transfers.py",
        "Mover._join_arrival",
        "transfer.join()",
        "None",
    ),
    (
        "never give the space of the dead back",
        "chainer_ooc/swap/transfers.py",
        "Mover.run_deferred_frees",
        "copy.free()",
        "None",
    ),
    (
        "trust everybody",
        "chainer_ooc/swap/manager.py",
        "SwapManager.read",
        "not trusted",
        "False",
    ),
    (
        "save leaves",
        "chainer_ooc/graph/nodes.py",
        "save_inputs",
        "node is not None and node._creator_node is not None",
        "node is not None",
    ),
    (
        "drop before the last use",
        "chainer_ooc/swap/manager.py",
        "SwapManager.finish",
        "drop and s.used and (not (s.kept or s.dependents))",
        "drop",
    ),
)


def main() -> int:
    options = arguments()
    mutants = list(planted())
    if options.generic:
        found = [m for m in generic() if not any(part in m.name for part in KNOWN)]
        random.Random(options.seed).shuffle(found)
        mutants += found if options.generic == "all" else found[: int(options.generic)]
    if options.only:
        mutants = [m for m in mutants if options.only in m.name]
    survivors = []
    with tempfile.TemporaryDirectory() as directory:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(options.jobs):
            copies.put(copy_to(Path(directory) / str(number) / "project"))

        def attempt(mutant: Mutant) -> tuple[Mutant, str | None, float]:
            copy, start = copies.get(), time.perf_counter()
            path = copy / mutant.path
            stock = path.read_text()
            path.write_text(mutant.source)
            try:
                by = killed(copy, mutant.path, options.timeout)
            finally:
                path.write_text(stock)
                copies.put(copy)
            return mutant, by, time.perf_counter() - start

        if not options.no_baseline:
            copy = copies.get()
            by = killed(copy, "", options.timeout)
            copies.put(copy)
            if by is not None:
                sys.exit(f"the tests fail without a mutant: {by}")
        with ThreadPoolExecutor(options.jobs) as pool:
            for number, (mutant, by, seconds) in enumerate(pool.map(attempt, mutants), 1):
                if by is None:
                    survivors.append(mutant)
                result = f"killed by {by}" if by else "SURVIVED"
                print(
                    f"{number}/{len(mutants)} {mutant.name} (line {mutant.line}): {result} ({seconds:.0f} s)",
                    flush=True,
                )
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed")
    for mutant in survivors:
        print(f"SURVIVED {mutant.path}:{mutant.line} {mutant.name}")
    return bool(survivors)


def copy_to(copy: Path) -> Path:
    """Copy what the tests need. Returns ``copy``."""
    for name in ("chainer_ooc", "tests"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.toml")):
        shutil.copy(path, copy)
    return copy


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generic", default="", help="how many generic mutants, or 'all'")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--only", default="", help="mutants with this in their name")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass")
    parser.add_argument("--timeout", type=int, default=240, help="seconds for the tests of one")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    return parser.parse_args()


def killed(copy: Path, path: str, timeout: int) -> str | None:
    """Run the tests in ``copy``, those of the package of ``path`` first. Returns the first that failed."""
    own = "swap" if "/swap/" in path else "graph"
    tests = sorted(TESTS, key=lambda name: (name == "all", name != own))
    env = dict(os.environ, PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        *(test for name in tests for test in TESTS[name]),
    ]
    try:
        done = subprocess.run(
            command, cwd=copy, env=env, timeout=timeout, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return "the timeout"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split()[1] if failed else f"exit status {done.returncode}"


def planted() -> Iterator[Mutant]:
    """Yield the planted mutants. What is looked for must be there exactly as often as it is replaced."""
    for name, path, function, old, new in PLANTED:
        wanted = ast.dump(ast.parse(old).body[0])
        tree = ast.parse((ROOT / path).read_text())
        body = dict(functions(tree))[function]
        replaced = _Replace(wanted, ast.parse(new).body[0])
        replaced.visit(body)
        if not replaced.lines:
            sys.exit(
                f"{name}: {function} of {path} has no {old!r}; change the mutant with the code"
            )
        yield Mutant(f"{name} [{function}]", path, ast.unparse(tree), replaced.lines[0])


class _Replace(ast.NodeTransformer):
    """Replaces one statement or expression wherever it is."""

    def __init__(self, wanted: str, new: ast.stmt) -> None:
        self.wanted, self.new, self.lines = wanted, new, list[int]()

    def visit(self, node: ast.AST) -> ast.AST:
        statement = ast.Expr(node) if isinstance(node, ast.expr) else node
        if _as_loaded(statement) == self.wanted:
            self.lines.append(node.lineno)  # type: ignore[attr-defined]
            return self.new.value if isinstance(node, ast.expr) else self.new  # type: ignore[attr-defined]
        return self.generic_visit(node)


def _as_loaded(node: ast.AST) -> str:
    return ast.dump(node)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the functions of a module with their names, ``Class.method`` for methods."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    yield f"{node.name}.{item.name}", item


def generic() -> Iterator[Mutant]:
    """Yield a mutant for each statement left out and each condition turned around in ``TARGETS``."""
    for path, patterns in TARGETS.items():
        source = (ROOT / path).read_text()
        count = sum(1 for _ in sites(ast.parse(source), patterns))
        for index in range(count):
            tree = ast.parse(source)
            name, line, change = list(sites(tree, patterns))[index]
            change()
            yield Mutant(
                f"{path}: {name}", path, ast.unparse(ast.fix_missing_locations(tree)), line
            )


def sites(
    tree: ast.Module, patterns: tuple[str, ...]
) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Yield what can be changed in the functions of those names: what is done, the line, and how to do it."""
    for name, function in functions(tree):
        if not any(Path(name).match(pattern) for pattern in patterns):
            continue
        for node in ast.walk(function):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list):
                    for index, statement in enumerate(block):
                        if _can_go(statement):
                            text = ast.unparse(statement).splitlines()[0]
                            yield (
                                f"{name}: leave out {text!r}",
                                statement.lineno,
                                _drop(block, index),
                            )
            if isinstance(node, ast.If | ast.IfExp | ast.While):
                text = ast.unparse(node.test)
                yield f"{name}: turn around {text!r}", node.lineno, _negate(node)


def _can_go(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return not isinstance(
        statement, ast.Pass | ast.Global | ast.Return | ast.Raise | ast.FunctionDef | ast.Import
    )


def _drop(block: list[ast.stmt], index: int) -> Callable[[], None]:
    def change() -> None:
        block[index] = ast.Pass()

    return change


def _negate(node: ast.If | ast.IfExp | ast.While) -> Callable[[], None]:
    def change() -> None:
        node.test = ast.UnaryOp(ast.Not(), node.test)

    return change


if __name__ == "__main__":
    sys.exit(main())
