"""A stand-in for the Python interpreter: what a script imports is there already, in a process that forks for it.

The folder of :func:`installed` holds an executable ``python``. It asks a server, which has imported what it was
told to, to fork: the child gets the caller's arguments, working directory, environment and standard streams, and
runs the script as ``__main__``, to the interpreter's regular end. What the server cannot do justice is run by the
real interpreter: options (``-c``, ``-m``), and other variables for Python or threads than the server has.

The process that the caller sees only waits. So tests that look at a process, or send it signals, take the real
interpreter; one that is killed takes the child with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import stat
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: The client. It starts without ``site``, in a few hundredths of a second.
CLIENT = """#!{real} -ISB
import json, os, signal, socket, sys
real, address, fixed = {real!r}, {address!r}, {fixed!r}
prefixes = {prefixes!r}
mine = {{k: v for k, v in os.environ.items() if k.startswith(prefixes)}}
if len(sys.argv) < 2 or sys.argv[1].startswith("-") or mine != fixed:
    os.execv(real, [real, *sys.argv[1:]])
fds = [0, 1, 2]
if os.environ.get("PMI_FD", "").isdigit():  # mpiexec's end of a socket
    fds.append(int(os.environ["PMI_FD"]))
request = json.dumps([sys.argv[0], sys.argv[1:], os.getcwd(), dict(os.environ), fds]).encode()
connection = socket.socket(socket.AF_UNIX)
connection.connect(address)
socket.send_fds(connection, [len(request).to_bytes(8, "little")], fds)
connection.sendall(request)
for fd in fds:
    os.close(fd)  # who reads what the script prints waits for nobody else
status = int(connection.recv(16) or 255)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""

#: Variables that an interpreter reads when it starts, or a library when it is loaded.
PREFIXES = ("PYTHON", "LD_", "OMP_", "OPENBLAS_", "MKL_", "MPL", "CHAINER", "_CHAINER")


@contextlib.contextmanager
def installed(
    directory: Path, modules: Sequence[str], path: Sequence[Path], environment: Mapping[str, str]
) -> Iterator[Path]:
    """Start a server that has imported modules. Yield the executable that takes the interpreter's place.

    Args:
        directory: An empty folder, with a path of less than 90 characters.
        modules: What is imported, in this order.
        path: Where modules are looked for, besides the usual places, while they are imported.
        environment: The server's environment; :data:`PREFIXES` tell what scripts must have in common with it.
    """
    if "COVERAGE_PROCESS_START" in environment:  # which looks on from an interpreter's start
        yield Path(sys.executable)
        return
    address = str(directory / "socket")
    fixed = {k: v for k, v in environment.items() if k.startswith(PREFIXES)}
    program = directory / "python"
    program.write_text(
        CLIENT.format(real=sys.executable, address=address, fixed=fixed, prefixes=PREFIXES)
    )
    mpiexec = Path(sys.executable).with_name("mpiexec")
    beside = directory / "mpiexec"  # where a script looks for it
    beside.write_text(f'#!/bin/sh\nexec "{mpiexec}" "$@"\n')
    for file in (program, beside) if mpiexec.exists() else (program,):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    command = [sys.executable, __file__, address, json.dumps([str(p) for p in path]), *modules]
    server = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert server.stdout.readline() == b"ready\n", (
            "the server of forked processes did not start"
        )  # type: ignore[union-attr]
        yield program
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()  # type: ignore[union-attr]


def serve(address: str) -> dict[str, Any]:
    """Fork for each connection until SIGTERM. In a child, return what it is to do."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    gc.collect()
    gc.freeze()  # the children need not look at what is there already
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection = listener.accept()[0]
                request = receive(connection)
                if not (pid := os.fork()):
                    selector.close()
                    listener.close()
                    connection.close()
                    return request
                for fd in request["received"]:
                    os.close(fd)
                child = os.pidfd_open(pid)
                selector.register(connection, selectors.EVENT_READ, (pid, child))
                selector.register(child, selectors.EVENT_READ, (pid, connection))
            elif type(key.fileobj) is socket.socket:  # the caller has been killed
                selector.unregister(key.fileobj)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(key.data[0], signal.SIGKILL)
            else:
                pid, connection = key.data
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                selector.unregister(key.fileobj)
                os.close(key.fd)
                if connection in selector.get_map():
                    selector.unregister(connection)
                    connection.sendall(str(status).encode())
                connection.close()


def receive(connection: socket.socket) -> dict[str, Any]:
    """Return a request, with the files that came with it."""
    length, received, *_ = socket.recv_fds(connection, 8, 4)
    text = connection.recv(int.from_bytes(length, "little"), socket.MSG_WAITALL)
    program, argv, directory, environment, numbers = json.loads(text)
    return {
        "program": program,
        "argv": argv,
        "directory": directory,
        "environment": environment,
        "numbers": numbers,
        "received": received,
    }


def become(request: dict[str, Any]) -> types.CodeType:
    """Make this process the one that was asked for. Return what is to run in ``__main__``, which is empty then."""
    os.setsid()
    # Their numbers may be those of others of them, or of what the server has open.
    received = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1000) for fd in request["received"]]
    os.closerange(3, 1000)
    for fd, number in zip(received, request["numbers"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    script = request["argv"][0]
    sys.argv = request["argv"]
    sys.executable = request["program"]
    sys.path[0] = str(Path(script).resolve().parent)
    code = compile(Path(script).read_bytes(), script, "exec")
    names = vars(sys.modules["__main__"])
    for name in [name for name in names if not name.startswith("__")]:
        del names[name]  # also this function's
    names.update(__file__=script, __doc__=None)
    return code


if __name__ == "__main__":
    folders = json.loads(sys.argv[2])
    sys.path[1:1] = folders
    for module in sys.argv[3:]:
        importlib.import_module(module)
    for folder in folders:
        sys.path.remove(folder)
    exec(become(serve(sys.argv[1])))
