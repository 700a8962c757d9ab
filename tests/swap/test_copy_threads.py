"""The threads that copy: every job is run, nothing of it is kept, and they end."""

import errno
import gc
import threading
import weakref

import pytest

from chainer_ooc.swap.devices.copy_threads import CopyThreads, FileTransfer


def names():
    return {t.name for t in threading.enumerate() if t.name.startswith("copying")}


def test_close_waits_for_all_jobs():
    threads = CopyThreads(3, "copying")
    assert not names()  # they begin with the first job
    done = []
    for number in range(100):
        threads.submit(lambda number=number: done.append(number))
        assert len(names()) == 3
    threads.close()
    assert sorted(done) == list(range(100))
    assert not names()
    threads.close()


def test_threads_end_when_nobody_refers_to_them():
    threads = CopyThreads(2, "copying")
    threads.submit(int)
    ended = [t for t in threading.enumerate() if t.name in names()]
    del threads
    gc.collect()
    for thread in ended:
        thread.join(30)
    assert not names()


def test_a_thread_that_waits_refers_to_no_job():
    class Job:
        def __call__(self):
            ran.set()

    ran, threads = threading.Event(), CopyThreads(1, "copying")
    job = Job()
    reference = weakref.ref(job)
    threads.submit(job)
    del job
    assert ran.wait(30)
    again = threading.Event()
    threads.submit(again.set)  # begins when the first is forgotten
    assert again.wait(30)
    assert reference() is None
    threads.close()


def test_a_transfer_is_done_with_its_last_piece_and_raises_what_one_raised():
    def fail():
        raise OSError(errno.EIO, "broken")

    transfer = FileTransfer(None, 3)
    transfer.run(lambda: (2.0, 3.0))
    transfer.run(lambda: (1.0, 2.0))
    assert not transfer.done()
    assert transfer.span() is None
    transfer.run(lambda: (4.0, 5.0))
    assert transfer.done()
    assert transfer.span() == (1.0, 5.0)
    assert transfer.arrival() == 5.0
    transfer.join()

    transfer = FileTransfer(None, 2)
    transfer.run(fail)
    assert not transfer.done()
    transfer.run(lambda: (4.0, 5.0))
    transfer.wait()
    assert transfer.span() is None
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            transfer.join()


def test_a_failed_transfer_goes_with_its_last_reference():
    def fail():
        raise OSError(errno.EIO, "broken")

    class Block:
        pass

    block = Block()
    reference = weakref.ref(block)
    transfer = FileTransfer(block, 1)
    transfer.run(fail)
    gc.disable()
    try:
        with pytest.raises(OSError, match="broken"):
            transfer.join()
        del block, transfer
        assert reference() is None
    finally:
        gc.enable()


def test_a_transfer_without_pieces_is_done():
    transfer = FileTransfer(None, 0)
    transfer.join()
    assert transfer.done()
    assert transfer.span() is None
