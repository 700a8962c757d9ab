"""The same examples in the same order, whoever loads them, and no waiting for dead loaders."""

import itertools
import multiprocessing
import re
import time

import numpy
import psutil
import pytest
from datasets.build import build
from datasets.in_memory import InMemory
from datasets.iterators import make_iterator
from datasets.labeled import LabeledImages, read_list, shard_indices
from datasets.preprocessed import BadExample
from errors import InputError
from imagenet_cli import IMAGENET

SETUP = f"""
import os, sys
sys.path.insert(0, {str(IMAGENET)!r})
import chainer_ooc
from datasets.iterators import make_iterator, start_worker_server
"""


def share(lists, **changes):
    options = {"train": lists.train, "val": lists.val, "root": lists.root, "mean": lists.mean}
    return build(**{**options, "insize": 32, "n_classes": 3, "seed": 5, **changes})


def flat(batches):
    return [(int(label), x.tobytes()) for batch in batches for x, label in batch]


def test_order_and_augmentation_are_the_same_whoever_loads(lists, run_python, tmp_path):
    data = share(lists)
    serial = make_iterator(data.train, 8, seed=(5, 0))
    expected = flat(itertools.islice(serial, 7))
    assert len(set(expected)) > len(expected) // 2  # crops differ between the epochs
    thread = make_iterator(data.train, 8, iterator="thread", workers=3, seed=(5, 0))
    assert flat(itertools.islice(thread, 7)) == expected
    thread.finalize()
    # The loaders of processes start from a server, so in a process of its own.
    script = tmp_path / "script.py"
    script.write_text(SETUP + f"""
from datasets.build import build
import hashlib, itertools
if __name__ == "__main__":
    start_worker_server()
    for loadtype in ("original", "custom"):
        data = build(train={str(lists.train)!r}, val={str(lists.val)!r}, root={str(lists.root)!r},
                     mean={str(lists.mean)!r}, insize=32, n_classes=3, seed=5, loadtype=loadtype)
        for workers in (1, 3):
            it = make_iterator(data.train, 8, iterator="process", workers=workers, seed=(5, 0))
            batches = list(itertools.islice(it, 7))
            examples = [(int(y), x.tobytes()) for b in batches for x, y in b]
            print(loadtype, workers, hashlib.sha256(repr(examples).encode()).hexdigest())
            it.finalize()
        val = make_iterator(data.val, 4, iterator="process", workers=2, repeat=False)
        first = [int(y) for b in val for _, y in b]
        val.reset()
        assert [int(y) for b in val for _, y in b] == first
        print(first)
        val.finalize()
""")  # fmt: skip
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    import hashlib

    digest = hashlib.sha256(repr(expected).encode()).hexdigest()
    lines = done.stdout.splitlines()
    order = str([data.val[i][1].item() for i in range(6)])
    assert lines == [
        f"original 1 {digest}", f"original 3 {digest}", order,
        f"custom 1 {digest}", f"custom 3 {digest}", order,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["serial", "thread"])
def test_an_iterator_continues_where_another_was_saved(lists, kind):
    import chainer

    data = share(lists)
    first = make_iterator(data.train, 8, iterator=kind, workers=2, seed=(5, 0))
    for _ in range(4):
        first.next()
    serializer = chainer.serializers.DictionarySerializer()
    first.serialize(serializer)
    expected = flat(first.next() for _ in range(3))
    second = make_iterator(data.train, 8, iterator=kind, workers=3, seed=(5, 0))
    second.next()  # it had begun to read something else
    second.serialize(chainer.serializers.NpzDeserializer(serializer.target))
    assert flat(second.next() for _ in range(3)) == expected
    assert second.epoch_detail == first.epoch_detail


def test_a_killed_loader_is_noticed(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        SETUP
        + """
import signal, time
import numpy
class Data:
    def __len__(self):
        return 40
    def __getitem__(self, i):
        if i % 40 == 17 and i > 80:
            os.kill(os.getpid(), signal.SIGKILL)
        if i % 40 == 18:
            raise OSError("cannot be read")
        return numpy.zeros(3, numpy.float32), numpy.array(i, numpy.int32)
if __name__ == "__main__":
    start_worker_server()
    it = make_iterator(Data(), 4, iterator="process", workers=2, seed=(0,))
    for _ in range(30):
        batch = it.next()
        bad = [e for e in batch if not isinstance(e, tuple)]
        if len(batch) == 1:
            print(bad[0].message)
            break
        if bad:
            print(bad[0].message.split(": ", 1)[1])
    it.finalize()
    print("finished")
"""
    )
    done = run_python(script, timeout=60)
    lines = done.stdout.splitlines()[-3:]
    assert lines[::2] == ["OSError: cannot be read", "finished"], done.stdout + done.stderr
    assert re.fullmatch(
        r"loader process \d+ was killed, perhaps because memory ran out; use fewer of them "
        r"\(--loaderjob/-j\), or threads",
        lines[1],
    )


IDLE = (
    SETUP
    + """
import multiprocessing, signal, time
import numpy
class Data:
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return numpy.zeros(3, numpy.float32), numpy.array(i, numpy.int32)
def workers_of_an_idle_iterator():
    start_worker_server()
    it = make_iterator(Data(), 4, iterator="process", workers=2, seed=(0,))
    it.next()
    time.sleep(0.5)  # what is fetched ahead is there: the workers wait
    return it, multiprocessing.active_children()
"""
)


@pytest.mark.parametrize("which", [0, 1])
def test_a_loader_that_is_killed_while_it_waits_is_named(run_python, tmp_path, which):
    script = tmp_path / "script.py"
    script.write_text(
        IDLE
        + f"""
if __name__ == "__main__":
    it, workers = workers_of_an_idle_iterator()
    workers[{which}].kill()
    while len(batch := it.next()) == 4:
        pass
    print(batch == it.next(), str(workers[{which}].pid) in batch[0].message)
    it.finalize()
    print(any(worker.is_alive() for worker in workers))
"""
    )
    done = run_python(script, timeout=60)
    assert done.stdout.split() == ["True", "True", "False"], done.stdout + done.stderr


@pytest.mark.parametrize("end", ["sys.exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_loaders_end_with_a_process_that_does_not_end_them(run_python, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(
        IDLE
        + f"""
if __name__ == "__main__":
    it, workers = workers_of_an_idle_iterator()
    print(*(worker.pid for worker in workers), flush=True)
    {end}
"""
    )
    pids = [int(pid) for pid in run_python(script, timeout=60).stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_loader_processes_leave_signals_to_the_training_process_from_their_first_moment(
    run_python, tmp_path
):
    script = tmp_path / "script.py"
    script.write_text(
        SETUP
        + """
import multiprocessing, signal, threading
from launcher import STOP_SIGNALS
def survive():
    for number in STOP_SIGNALS:  # the worker's, its server's
        os.kill(os.getpid(), number)
        os.kill(os.getppid(), number)
    print("alive", flush=True)
if __name__ == "__main__":
    def states():
        return [*map(signal.getsignal, STOP_SIGNALS), *signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    before = states()
    start_worker_server()
    print(states() == before, flush=True)
    for _ in range(2):
        process = multiprocessing.Process(target=survive)
        process.start()
        process.join()
"""
    )
    done = run_python(script, timeout=60)
    assert done.stdout.split() == ["True", "alive", "alive"], done.stdout + done.stderr


LEFT_TO_THE_TRAINER = """
import psutil
from launcher import STOP_SIGNALS
def print_children():
    for child in psutil.Process().children(recursive=True):
        with open(f"/proc/{child.pid}/status") as f:
            masks = dict(line.split(":", 1) for line in f)
        masks = int(masks["SigBlk"], 16) | int(masks["SigIgn"], 16)
        print(child.pid, [number.name for number in STOP_SIGNALS if not masks >> number - 1 & 1])
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_loaders_that_an_iterator_starts_itself_leave_signals_too(run_python, tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(
        IDLE.replace("start_worker_server()", "")
        + LEFT_TO_THE_TRAINER
        + f"""
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    it, workers = workers_of_an_idle_iterator()
    print_children()
    it.finalize()
"""
    )
    done = run_python(script, timeout=60)
    children = done.stdout.splitlines()
    # The resource tracker, perhaps the server, two loaders.
    assert len(children) == (4 if method == "forkserver" else 3), done.stdout + done.stderr
    assert all(child.endswith(" []") for child in children), done.stdout


@pytest.mark.parametrize(
    "use",
    [
        "multiprocessing.get_context('forkserver').Lock()",
        "multiprocessing.get_context('spawn').Queue(3)",
        "shared_memory.SharedMemory(create=True, size=64)",
        "tqdm.tqdm.get_lock()",
        "tensorboardX.SummaryWriter(sys.argv[0] + '.events')",
    ],
)
def test_the_resource_tracker_outlives_the_signals(run_python, tmp_path, use):
    script = tmp_path / "script.py"
    script.write_text(
        SETUP
        + LEFT_TO_THE_TRAINER
        + f"""
import multiprocessing, stop_signals, tensorboardX, tqdm
from multiprocessing import resource_tracker, shared_memory
if __name__ == "__main__":
    stop_signals.start_resource_tracker()
    [tracker] = psutil.Process().children()
    used = {use}
    for number in STOP_SIGNALS:
        tracker.send_signal(number)
    used = [used, {use}]
    print_children()
    print([tracker] == psutil.Process().children())
    for one in used:
        for end in ("close", "unlink"):
            if hasattr(one, end):
                getattr(one, end)()
"""
    )
    done = run_python(script, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stdout + done.stderr
    assert done.stdout.splitlines()[0].endswith(" []"), done.stdout
    assert not done.stderr


@pytest.mark.mpi
def test_loader_processes_under_mpi(lists, run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        SETUP
        + f"""
from datasets.build import build
if __name__ == "__main__":
    start_worker_server()
    from mpi4py import MPI
    world = MPI.COMM_WORLD
    data = build(train={str(lists.train)!r}, val={str(lists.val)!r}, root={str(lists.root)!r},
                 mean={str(lists.mean)!r}, insize=32, n_classes=3, rank=world.rank, size=world.size)
    it = make_iterator(data.train, 5, iterator="process", workers=2, seed=(0, world.rank))
    for _ in range(4):
        batch = it.next()
        assert len(batch) == 5
        world.Barrier()
    it.finalize()
    names = world.gather([data.train.images.name(i) for i in range(len(data.train))])
    if world.rank == 0:
        print(len(set(sum(names, []))), [len(n) for n in names])
"""
    )
    done = run_python(script, ranks=2, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "20 [10, 10]"


def test_forking_under_mpi_is_refused(run_python, tmp_path):
    pytest.importorskip("mpi4py")
    script = tmp_path / "script.py"
    script.write_text(
        SETUP
        + """
import multiprocessing, types
multiprocessing.set_start_method("fork")
sys.modules["mpi4py.MPI"] = types.ModuleType("mpi4py.MPI")
try:
    make_iterator([(0, 0)] * 4, 2, iterator="process", workers=1)
except ValueError as e:
    print(e)
"""
    )
    assert "call start_worker_server() before" in run_python(script).stdout


def test_images_in_memory_are_those_of_the_files(lists):
    source = LabeledImages(read_list(lists.train), lists.root)
    memory = InMemory(source, workers=2)
    for i in range(len(source)):
        numpy.testing.assert_array_equal(memory.image(i), source.image(i))
        assert memory.label(i) == source.label(i)
    with pytest.raises(ValueError, match="read-only"):
        memory.image(0)[:] = 0


@pytest.mark.parametrize("error", [InputError("damaged"), KeyboardInterrupt()])
def test_an_error_ends_the_decoding_into_memory_at_once(lists, error):
    class Source(LabeledImages):
        decoded = 0

        def image(self, i, need=None):
            if i == 1:
                raise error
            Source.decoded += 1
            return super().image(i, need)

    with pytest.raises(type(error)):
        InMemory(Source(read_list(lists.train) * 10, lists.root), workers=2)
    assert Source.decoded < 20  # of 200


def test_custom_loading_decodes_once_and_augments_as_randomly(lists, monkeypatch):
    original, custom = share(lists), share(lists, loadtype="custom", workers=2)
    for name in lists.root.glob("*.jpg"):
        name.unlink()  # nobody reads them any more
    n = len(custom.train)
    crops = {custom.train[visit * n + 3][0].tobytes() for visit in range(1, 9)}
    assert len(crops) == 8
    assert isinstance(original.train[3], BadExample)


def test_custom_loading_needs_the_memory(lists, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 100_000}))
    with pytest.raises(InputError, match=r"loadtype custom: .* use loadtype original"):
        share(lists, loadtype="custom")


def test_enlarged_while_reading(lists, tmp_path):
    numpy.save(tmp_path / "mean.npy", numpy.zeros(3, numpy.float32))
    for loadtype in ("original", "custom"):
        data = share(lists, enlarge=(200, 100), insize=96, mean=tmp_path / "mean.npy",
                     loadtype=loadtype)  # fmt: skip
        assert data.train[0][0].shape == (3, 96, 96)
        assert data.train.images.image(0).shape == (100, 200, 3)


@pytest.mark.parametrize(("n", "size"), [(20, 1), (20, 3), (7, 4), (2, 5)])
def test_shares_of_the_ranks(n, size):
    val = [shard_indices(n, rank, size, None) for rank in range(size)]
    assert numpy.concatenate(val).tolist() == list(range(n))
    train = [shard_indices(n, rank, size, 3) for rank in range(size)]
    assert {len(indices) for indices in train} == {-(-n // size)}
    assert set(numpy.concatenate(train)) == set(range(n))
    again = shard_indices(n, 0, size, 3).tolist()
    assert again == train[0].tolist()
    if n > 10:
        assert again != shard_indices(n, 0, size, 4).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loadtype": "memory"}, r"loadtype 'memory': allowed are original, custom"),
        ({"insize": 46}, r"less than --insize 46"),
        ({"root": "nowhere"}, r"no such file; correct the list file or --root/-R"),
        ({"n_classes": 2}, r"label 2 of .* is out of range"),
    ],
)
def test_build_finds_mistakes_at_once(lists, changes, message):
    with pytest.raises(InputError, match=message):
        share(lists, **changes)


def test_make_iterator_names_what_is_allowed(lists):
    with pytest.raises(InputError, match=r"iterator 'fork': allowed are serial, thread, process"):
        make_iterator(share(lists).train, 2, iterator="fork")
    with pytest.raises(InputError, match=r"loaderjob 0: iterator thread needs 1 or more"):
        make_iterator(share(lists).train, 2, iterator="thread", workers=0)
