"""A process that has imported Chainer and forks a child for each program.

It reads a request from each line of its standard input, JSON with ``directory`` (which has the program,
and takes what it prints), ``contender`` and ``timeout`` (seconds), and answers with the child's exit status.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import resource
import select
import signal
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import chainer_ooc
from chainer_ooc.errors import OutOfMemoryError
from tests.differential import engine, tools

MIB = 1 << 20


def serve() -> dict[str, Any] | None:
    """Answer requests to the end of the input. In a child: return the request."""
    gc.collect()
    gc.freeze()  # the children need not look at what is there already
    for line in sys.stdin.buffer:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            return request
        print(wait(pid, request["timeout"]), flush=True)
    return None


def wait(pid: int, timeout: float) -> str:
    """Return the exit status of a child: it, and what it has started, is ended when it takes too long."""
    descriptor = os.pidfd_open(pid)
    late = ""
    for patience, number in ((timeout, signal.SIGABRT), (5, signal.SIGKILL)):
        if select.select([descriptor], [], [], patience)[0]:
            break
        late = "timeout: "
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(descriptor)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its children
    return f"{late}{status}"


def redirect(directory: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    faulthandler.enable()


class Modes:
    """What a program may call of chainer_ooc: nothing happens where it runs on stock Chainer."""

    def __init__(self, is_on: bool, directory: Path) -> None:
        self.is_on, self.directory = is_on, str(directory)

    def enable(self, **settings: Any) -> None:
        if self.is_on:
            chainer_ooc.enable(**self._resolved(settings))
            engine.be_quiet()

    def disable(self) -> None:
        if self.is_on:
            chainer_ooc.disable()

    @contextlib.contextmanager
    def mode(self, enabled: bool = True, **settings: Any) -> Iterator[None]:
        if not self.is_on:
            yield
            return
        with chainer_ooc.out_of_core_mode(enabled, **self._resolved(settings)):
            engine.be_quiet()
            yield

    def slow_copies(self, above: int) -> Any:
        """Return a mode in which plans run functions again; ``above`` bytes of saved arrays may be in memory."""
        return engine.slow_copies(self.directory, above) if self.is_on else contextlib.nullcontext()

    def strictly(self, function: Any, **settings: Any) -> Any:
        """Call ``function``; where it does not fit under a limit that is strict, call it again without."""
        if not self.is_on:
            return function()
        try:
            with chainer_ooc.out_of_core_mode(strict=True, **self._resolved(settings)):
                return function()
        except OutOfMemoryError as error:
            if " more, and " not in str(error):
                raise
        with chainer_ooc.out_of_core_mode(False):
            return function()

    def _resolved(self, settings: dict[str, Any]) -> dict[str, Any]:
        """``above`` is a limit so many bytes above what is in use now; the swap file is the program's own."""
        settings = dict(settings)
        if (above := settings.pop("above", None)) is not None:
            settings["limit"] = engine.resident_bytes() + above
        return {"swap_dir": self.directory, **settings}


def run(request: dict[str, Any]) -> None:
    """Run a program, the last step as a script runs."""
    directory = Path(request["directory"])
    program = json.loads((directory / "program.json").read_text())
    redirect(directory)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    contender = request["contender"]
    is_on = contender != "stock"
    modes = Modes(is_on, directory)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    names = vars(module)
    names.update({name: getattr(tools, name) for name in tools.__all__})
    for name in ("enable", "disable", "mode", "slow_copies", "strictly"):
        names[name] = getattr(modes, name)
    given = set(names)
    np.random.seed(0)
    if is_on:
        engine.prepare(contender, program["constants"])
        if request.get("plant"):
            from tests.differential import planted

            planted.PLANTED[request["plant"]]()
        if program["settings"] is not None:
            modes.enable(**program["settings"])
    record = os.open(directory / "record", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(entry: Any) -> None:
        os.write(record, (json.dumps(entry) + "\n").encode())

    for number, step in enumerate(program["steps"]):
        tools.seen.clear()
        error = place = None
        try:
            exec(compile(step, f"<step {number}>", "exec"), names)
        except tools.Leave:
            raise
        except BaseException as caught:
            error, place = tools.describe(caught), tools.place_of(caught)
            del caught
        gc.collect()  # a finalizer that runs functions, inside of one of Chainer's, makes that one fail on stock, too
        note([list(tools.seen), error, place])
    leaks = None
    gc.collect()
    if not program["keeps"]:
        for name in [name for name in names if name not in given]:
            del names[name]
        gc.collect()
        leaks = engine.leaks() if is_on else []
    note(["the end", leaks])
    os.close(record)
    warnings.resetwarnings()
    if program["last"]:
        exec(compile(program["last"], "<step last>", "exec"), names)


if __name__ == "__main__":
    request = serve()
    if request is not None:
        run(request)
