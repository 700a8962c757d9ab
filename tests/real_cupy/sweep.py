"""Let the k-th call of a function of CUDA fail while a network trains out of core, for many k: a process for each.

    python -m tests.real_cupy.sweep FUNCTION HOST_LIMIT TIMES MOST

Whatever fails, there is an error of a known kind or the right bits; after it training works, and nothing is lost. With
0 TIMES all calls after the k-th fail, for ever, as after a kernel's illegal access: training ends soon, with the error.
Prints what it finds wrong, and at the end how often which outcome was.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import os
import signal
import sys
import tempfile

import chainer_ooc.api
from tests.doubles import cuda_runtime
from tests.real_cupy.known_net import KIB, bits_of, step

COUNT, NBYTES = 12, 256 * KIB
#: Seconds for one process.
PATIENCE = 30


def trains(folder, host_limit, steps):
    """Train; return whether all bits were right."""
    given = {"limit": 5 * NBYTES, "min_bytes": 1, "host_limit": host_limit, "swap_dir": folder}
    with chainer_ooc.out_of_core_mode(**given):
        right = dict.fromkeys(range(COUNT + 1), True)
        return [step(COUNT, NBYTES) for _ in range(steps)] == [right] * steps


def attempt(function, number, times, folder, host_limit):
    """Return the calls of the function, the outcome, and what is wrong with it."""
    import cupy

    signal.alarm(PATIENCE)
    cuda_runtime.allow_in_child()
    cuda_runtime.reset()
    cuda_runtime.setup(total=1 << 30)
    if number and times:
        cuda_runtime.fail(function, at=number, times=times)
    elif number:
        cuda_runtime.break_device(700, after=(function, number))
    wrong = []
    try:
        outcome = "right" if trains(folder, host_limit, 2) else "wrong bits"
    except (MemoryError, OSError, cupy.cuda.runtime.CUDARuntimeError) as error:
        outcome = type(error).__name__
    if outcome == "wrong bits":
        wrong.append(outcome)
    calls = cuda_runtime.counts()[function]
    wrong += cuda_runtime.complaints()
    if number and not times:
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            trains(folder, host_limit, 1)  # the last calls may have been the last of the training
            wrong.append("the error was not told")
        gc.collect()
        chainer_ooc.disable()
        return calls, outcome, wrong
    cuda_runtime.fail(function, times=0)
    gc.collect()
    try:
        if not trains(folder, host_limit, 1):
            wrong.append("wrong bits afterwards")
    except Exception as error:
        wrong.append(f"afterwards {error!r}")
    gc.collect()
    cupy.cuda.Device().synchronize()
    used = cupy.get_default_memory_pool().used_bytes()
    if used:
        wrong.append(f"{used} bytes of the pool are lost")
    return calls, outcome, wrong


def forked(*arguments):
    """Do that in a forked process."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, json.dumps(attempt(*arguments)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(told) if told else (0, "died", [f"the process ended with status {status}"])


def main(function, host_limit, times, most):
    """Return 1 if anything is wrong."""
    outcomes: collections.Counter[str] = collections.Counter()
    failed = False
    # What all processes have in common is done once.
    for number in range(COUNT + 1):
        bits_of(number, NBYTES)
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        calls, outcome, wrong = forked(function, 0, 1, folder, host_limit)
        assert (outcome, wrong) == ("right", []), wrong
        for number in range(1, calls + 1, max(calls // most, 1)):
            _, outcome, wrong = forked(function, number, times, folder, host_limit)
            outcomes[outcome] += 1
            for one in wrong:
                failed = True
                print(f"call {number} of {calls}: {outcome}: {one}")
    print(dict(outcomes))
    return failed


if __name__ == "__main__":
    function, host_limit, times, most = sys.argv[1:]
    sys.exit(main(function, json.loads(host_limit), int(times), int(most)))
