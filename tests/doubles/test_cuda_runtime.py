"""The double of CUDA: what NVIDIA's documentation says of the driver's virtual memory, pools, streams and errors."""

from __future__ import annotations

import ctypes
import functools
import shutil
import threading
from ctypes import byref, c_int, c_ulonglong, c_void_p

import pytest

from tests.doubles import cuda_runtime

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or not cuda_runtime.is_supported(),
    reason="needs a C compiler and Linux on x86-64",
)

MIB = 1 << 20
UNIT = 2 * MIB
INVALID, OUT_OF_MEMORY, BAD_HANDLE, NOT_READY = 1, 2, 400, 600


class Properties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location_type", c_int),
        ("location_id", c_int),
        ("windows", c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Access(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = (("location_type", c_int), ("location_id", c_int), ("flags", c_int))


PINNED = Properties(1, 0, 1, 0)
READ_WRITE = Access(1, 0, 3)


class Cuda:
    """The double's functions with Python's integers."""

    def __init__(self):
        self.library = cuda_runtime.library()

    def __getattr__(self, name):
        function = getattr(self.library, name)

        def call(*arguments):
            wrapped = [c_ulonglong(a) if isinstance(a, int) else a for a in arguments]
            return function(*wrapped)

        return call

    def new(self, name, *arguments):
        """Return the status, and what the function writes to its first argument."""
        made = c_ulonglong()
        return getattr(self, name)(byref(made), *arguments), made.value

    def made(self, name, *arguments):
        status, value = self.new(name, *arguments)
        assert status == 0
        return value


@pytest.fixture(params=[True, False], ids=["with data", "without data"])
def cuda(request):
    cuda_runtime.reset()
    before = cuda_runtime.memory()
    cuda_runtime.setup(total=before["used"] + 8 * UNIT, data=request.param)
    yield Cuda()
    cuda_runtime.reset()
    after = cuda_runtime.memory()
    cuda_runtime.setup()
    for name in ("used", "physical", "mapped", "reserved", "allocated", "pool_used", "pinned"):
        assert after[name] == before[name], name


def used():
    return cuda_runtime.memory()["physical"]


class Mapped:
    """Four handles mapped to the first half of a reservation of eight units."""

    def __init__(self, cuda):
        self.cuda = cuda
        self.start = cuda.made("cuMemAddressReserve", 8 * UNIT, 0, 0, 0)
        self.handles = [cuda.made("cuMemCreate", UNIT, byref(PINNED), 0) for _ in range(4)]
        for number, handle in enumerate(self.handles):
            assert cuda.cuMemMap(self.at(number), UNIT, 0, handle, 0) == 0
        assert cuda.cuMemSetAccess(self.start, 4 * UNIT, byref(READ_WRITE), 1) == 0

    def at(self, number):
        return self.start + number * UNIT


@pytest.fixture
def mapped(cuda):
    mapped = Mapped(cuda)
    yield mapped
    # Each test leaves what the driver would still have: the four mappings.
    assert cuda.cuMemUnmap(mapped.start, 4 * UNIT) == 0
    for handle in mapped.handles:
        assert cuda.cuMemRelease(handle) == 0
    assert cuda.cuMemAddressFree(mapped.start, 8 * UNIT) == 0


class TestVirtualMemory:
    def test_granularity(self, cuda):
        for option in (0, 1):
            assert cuda.new("cuMemGetAllocationGranularity", byref(PINNED), option) == (0, UNIT)
        on_host = Properties(1, 0, 3, 0)
        assert cuda.new("cuMemGetAllocationGranularity", byref(on_host), 0)[0] == INVALID

    @pytest.mark.parametrize("alignment", [0, UNIT, 16 * UNIT])
    def test_addresses_are_aligned(self, cuda, alignment):
        start = cuda.made("cuMemAddressReserve", 3 * UNIT, alignment, 0, 0)
        assert start % max(alignment, UNIT) == 0
        assert cuda_runtime.memory()["reserved"] == 3 * UNIT
        assert used() == 0
        assert cuda.cuMemAddressFree(start, 3 * UNIT) == 0

    @pytest.mark.parametrize(
        "arguments", [(0, 0, 0, 0), (UNIT + 4096, 0, 0, 0), (UNIT, 3, 0, 0), (UNIT, 0, 0, 1)]
    )
    def test_reservations_are_whole_units(self, cuda, arguments):
        assert cuda.new("cuMemAddressReserve", *arguments)[0] == INVALID

    @pytest.mark.parametrize("size", [0, 1, MIB, UNIT + 512])
    def test_physical_memory_is_whole_units(self, cuda, size):
        assert cuda.new("cuMemCreate", size, byref(PINNED), 0)[0] == INVALID
        assert used() == 0

    @pytest.mark.parametrize(
        "wrong", [Properties(0, 0, 1, 0), Properties(1, 0, 0, 0), Properties(1, 0, 1, 1)]
    )
    def test_physical_memory_is_of_the_device(self, cuda, wrong):
        assert cuda.new("cuMemCreate", UNIT, byref(wrong), 0)[0] == INVALID

    def test_no_more_physical_memory_than_the_device_has(self, cuda):
        handles = [cuda.made("cuMemCreate", 2 * UNIT, byref(PINNED), 0) for _ in range(4)]
        assert cuda.new("cuMemCreate", UNIT, byref(PINNED), 0)[0] == OUT_OF_MEMORY
        assert cuda.new("cudaMalloc", 512)[0] == OUT_OF_MEMORY
        assert cuda.cuMemRelease(handles.pop()) == 0
        handles.append(cuda.made("cuMemCreate", UNIT, byref(PINNED), 0))
        assert used() == 7 * UNIT
        assert cuda_runtime.memory()["peak"] - cuda_runtime.memory()["used"] == UNIT
        for handle in handles:
            assert cuda.cuMemRelease(handle) == 0

    def test_memory_is_freed_when_it_is_released_and_mapped_nowhere(self, cuda):
        start = cuda.made("cuMemAddressReserve", 2 * UNIT, 0, 0, 0)
        handle = cuda.made("cuMemCreate", UNIT, byref(PINNED), 0)
        for place in (start, start + UNIT):
            assert cuda.cuMemMap(place, UNIT, 0, handle, 0) == 0
        assert (used(), cuda_runtime.memory()["mapped"]) == (UNIT, 2 * UNIT)
        assert cuda.cuMemRelease(handle) == 0
        assert cuda.cuMemUnmap(start, UNIT) == 0
        assert used() == UNIT
        assert cuda.cuMemUnmap(start + UNIT, UNIT) == 0
        assert used() == 0
        assert cuda.cuMemAddressFree(start, 2 * UNIT) == 0

    def test_released_once(self, cuda):
        handle = cuda.made("cuMemCreate", UNIT, byref(PINNED), 0)
        start = cuda.made("cuMemAddressReserve", UNIT, 0, 0, 0)
        assert cuda.cuMemRelease(handle) == 0
        assert cuda.cuMemRelease(handle) == INVALID
        assert cuda.cuMemMap(start, UNIT, 0, handle, 0) == INVALID
        assert "after it was destroyed" in cuda_runtime.complaints()[0]
        assert cuda.cuMemAddressFree(start, UNIT) == 0

    @pytest.mark.parametrize("number", [0, 3])
    def test_nothing_is_mapped_over_a_mapping(self, mapped, number):
        other = mapped.cuda.made("cuMemCreate", UNIT, byref(PINNED), 0)
        assert mapped.cuda.cuMemMap(mapped.at(number), UNIT, 0, other, 0) == INVALID
        assert mapped.cuda.cuMemMap(mapped.at(4), UNIT, 0, other, 0) == 0
        assert mapped.cuda.cuMemUnmap(mapped.at(4), UNIT) == 0
        assert mapped.cuda.cuMemRelease(other) == 0

    @pytest.mark.parametrize(
        ("place", "size", "offset", "flags"),
        [
            (7, 2, 0, 0),
            (8, 1, 0, 0),
            (-1, 1, 0, 0),
            (4.5, 1, 0, 0),
            (4, 0.5, 0, 0),
            (4, 2, 0, 0),
            (4, 1, 1, 0),
            (4, 1, 0, 1),
        ],
        ids=[
            "over the end",
            "behind",
            "before",
            "address",
            "size",
            "more than the handle",
            "offset",
            "flags",
        ],
    )
    def test_mappings_are_whole_units_of_a_reservation(self, mapped, place, size, offset, flags):
        handle = mapped.handles[0]
        arguments = int(place * UNIT) + mapped.start, int(size * UNIT), offset * UNIT, handle, flags
        assert mapped.cuda.cuMemMap(*arguments) == INVALID

    @pytest.mark.parametrize(
        ("place", "size"), [(4, 1), (3, 2), (0, 0.5), (0.5, 1), (0, 0), (2.5, 1)]
    )
    def test_what_is_unmapped_is_whole_mappings(self, mapped, place, size):
        assert mapped.cuda.cuMemUnmap(mapped.start + int(place * UNIT), int(size * UNIT)) == INVALID
        assert cuda_runtime.memory()["mapped"] == 4 * UNIT

    def test_part_of_a_large_mapping_stays(self, cuda):
        start = cuda.made("cuMemAddressReserve", 2 * UNIT, 0, 0, 0)
        handle = cuda.made("cuMemCreate", 2 * UNIT, byref(PINNED), 0)
        assert cuda.cuMemMap(start, 2 * UNIT, 0, handle, 0) == 0
        for place in (start, start + UNIT):
            assert cuda.cuMemUnmap(place, UNIT) == INVALID
            assert cuda.cuMemSetAccess(place, UNIT, byref(READ_WRITE), 1) == INVALID
        assert cuda.cuMemUnmap(start, 2 * UNIT) == 0
        assert cuda.cuMemRelease(handle) == 0
        assert cuda.cuMemAddressFree(start, 2 * UNIT) == 0

    @pytest.mark.parametrize(("place", "size"), [(4, 1), (3, 2), (0, 0.5), (0, 0)])
    def test_access_is_given_to_whole_mappings(self, mapped, place, size):
        arguments = mapped.start + int(place * UNIT), int(size * UNIT), byref(READ_WRITE), 1
        assert mapped.cuda.cuMemSetAccess(*arguments) == INVALID

    @pytest.mark.parametrize("access", [Access(0, 0, 3), Access(1, 1, 3), Access(1, 0, 2)])
    def test_access_is_of_the_device(self, mapped, access):
        assert mapped.cuda.cuMemSetAccess(mapped.start, UNIT, byref(access), 1) == INVALID

    @pytest.mark.parametrize("wrong", [(0, 4), (0, 9), (1, 7)])
    def test_a_reservation_is_freed_whole_and_empty(self, mapped, wrong):
        start, size = mapped.at(wrong[0]), wrong[1] * UNIT
        assert mapped.cuda.cuMemAddressFree(start, size) == INVALID
        assert mapped.cuda.cuMemAddressFree(mapped.start, 8 * UNIT) == INVALID

    def test_copies_need_a_mapping_with_access(self, cuda):
        start = cuda.made("cuMemAddressReserve", 2 * UNIT, 0, 0, 0)
        handle = cuda.made("cuMemCreate", UNIT, byref(PINNED), 0)
        data = ctypes.create_string_buffer(b"some bytes")
        copy = (start, ctypes.addressof(data), 10, 1)
        assert cuda.cudaMemcpy(*copy) == INVALID
        assert cuda.cuMemMap(start, UNIT, 0, handle, 0) == 0
        assert cuda.cudaMemcpy(*copy) == INVALID
        assert cuda.cuMemSetAccess(start, UNIT, byref(READ_WRITE), 1) == 0
        assert cuda.cudaMemcpy(*copy) == 0
        assert ctypes.string_at(start, 10) == b"some bytes"
        assert (
            cuda.cudaMemcpy(start + UNIT - 5, ctypes.addressof(data), 10, 1) == INVALID
        )  # over the end
        assert cuda.cuMemUnmap(start, UNIT) == 0
        assert cuda.cudaMemcpy(*copy) == INVALID
        assert cuda.cuMemRelease(handle) == 0
        assert cuda.cuMemAddressFree(start, 2 * UNIT) == 0

    def test_bytes_stay_with_the_physical_memory(self, cuda, request):
        if "without" in request.node.name:
            pytest.skip("without data mappings are not made")
        start = cuda.made("cuMemAddressReserve", 4 * UNIT, 0, 0, 0)
        handles = [cuda.made("cuMemCreate", UNIT, byref(PINNED), 0) for _ in range(2)]
        for order in (handles, handles[::-1]):
            for number, handle in enumerate(order):
                assert cuda.cuMemMap(start + number * UNIT, UNIT, 0, handle, 0) == 0
            assert cuda.cuMemSetAccess(start, 2 * UNIT, byref(READ_WRITE), 1) == 0
            if order is handles:
                ctypes.memset(start, 1, UNIT)
                ctypes.memset(start + UNIT, 2, UNIT)
            else:
                assert ctypes.string_at(start, 2 * UNIT) == b"\2" * UNIT + b"\1" * UNIT
            assert cuda.cuMemUnmap(start, 2 * UNIT) == 0
        for handle in handles:
            assert cuda.cuMemRelease(handle) == 0
        assert cuda.cuMemAddressFree(start, 4 * UNIT) == 0

    def test_functions_are_found_by_name(self, cuda):
        place, status = c_void_p(), c_int()
        assert cuda.cuGetProcAddress_v2(b"cuMemMap", byref(place), 12000, 0, byref(status)) == 0
        assert place.value == ctypes.cast(cuda.library.cuMemMap, c_void_p).value
        assert cuda.cuGetProcAddress_v2(b"cuMemGetInfo", byref(place), 12000, 0, byref(status)) == 0
        assert place.value == ctypes.cast(cuda.library.cuMemGetInfo_v2, c_void_p).value
        assert cuda.cuGetProcAddress_v2(b"cuNothing", byref(place), 12000, 0, byref(status)) == 500


class TestMemory:
    def test_memory_is_not_freed_twice(self, cuda):
        pointer = cuda.made("cudaMalloc", MIB)
        assert cuda.cudaFree(pointer + 512) == INVALID
        assert cuda.cudaFree(pointer) == 0
        assert cuda.cudaFree(pointer) == INVALID
        assert cuda.cudaFree(0) == 0

    def test_page_locked_once(self, cuda):
        address = cuda.made("cudaHostAlloc", 8192, 0)
        assert cuda.cudaHostRegister(address + 4096, 8192, 0) == 712
        assert cuda.cudaHostUnregister(address) == 713
        assert cuda.cudaFreeHost(address) == 0
        assert cuda.cudaFreeHost(address) == INVALID

    @pytest.mark.parametrize("kind", [0, 2, 3])
    def test_copies_name_their_direction(self, cuda, kind):
        pointer, data = cuda.made("cudaMalloc", 64), ctypes.create_string_buffer(64)
        assert cuda.cudaMemcpy(pointer, ctypes.addressof(data), 64, kind) == INVALID
        assert cuda.cudaMemcpy(pointer, ctypes.addressof(data), 64, 1) == 0
        assert cuda_runtime.memory()["copied_pageable"] == 64
        assert cuda.cudaFree(pointer) == 0

    def test_a_pool_keeps_memory_until_a_synchronization(self, cuda):
        cuda_runtime.setup(total=cuda_runtime.memory()["used"] + 64 * MIB)
        pointers = [cuda.made("cudaMallocAsync", 20 * MIB, 0) for _ in range(2)]
        assert cuda.new("cudaMallocAsync", 30 * MIB, 0)[0] == OUT_OF_MEMORY
        for pointer in pointers:
            assert cuda.cudaFreeAsync(pointer, 0) == 0
        assert cuda_runtime.memory()["pool_used"] == 0
        assert cuda_runtime.memory()["pool_reserved"] == 64 * MIB
        pool = cuda.made("cudaDeviceGetDefaultMemPool", 0)
        reserved = c_ulonglong()
        assert cuda.cudaMemPoolGetAttribute(pool, 5, byref(reserved)) == 0
        assert reserved.value == 64 * MIB
        assert cuda.cudaStreamSynchronize(0) == 0
        assert cuda_runtime.memory()["pool_reserved"] == 0

    def test_a_pool_keeps_what_its_threshold_says(self, cuda):
        cuda_runtime.setup(total=cuda_runtime.memory()["used"] + 64 * MIB)
        pool = cuda.made("cudaDeviceGetDefaultMemPool", 0)
        threshold = c_ulonglong((1 << 64) - 1)
        assert cuda.cudaMemPoolSetAttribute(pool, 4, byref(threshold)) == 0
        pointer = cuda.made("cudaMallocAsync", 20 * MIB, 0)
        assert cuda.cudaFreeAsync(pointer, 0) == 0
        assert cuda.cudaStreamSynchronize(0) == 0
        assert cuda_runtime.memory()["pool_reserved"] == 32 * MIB
        assert cuda.cudaMemPoolTrimTo(pool, 0) == 0
        assert cuda_runtime.memory()["pool_reserved"] == 0
        threshold.value = 0
        assert cuda.cudaMemPoolSetAttribute(pool, 4, byref(threshold)) == 0


class TestStreams:
    def test_a_destroyed_stream_is_found(self, cuda):
        stream = cuda.made("cudaStreamCreate")
        assert cuda.cudaStreamDestroy(stream) == 0
        for call in ("cudaStreamSynchronize", "cudaStreamQuery", "cudaStreamDestroy"):
            assert getattr(cuda, call)(stream) == BAD_HANDLE
        event = cuda.made("cudaEventCreate")
        assert cuda.cudaEventRecord(event, stream) == BAD_HANDLE
        assert cuda.cudaEventDestroy(event) == 0
        assert cuda.cudaEventQuery(event) == BAD_HANDLE
        assert len(cuda_runtime.complaints()) == 5

    def test_with_a_lag_work_takes_a_while(self, cuda):
        cuda_runtime.setup(total=1 << 30, lag=2)
        event = cuda.made("cudaEventCreate")
        assert cuda.cudaEventRecord(event, 0) == 0
        assert [cuda.cudaEventQuery(event) for _ in range(3)] == [NOT_READY, NOT_READY, 0]
        assert cuda.cudaEventRecord(event, 0) == 0
        assert cuda.cudaEventSynchronize(event) == 0
        assert cuda.cudaEventQuery(event) == 0
        assert cuda.cudaEventDestroy(event) == 0

    def test_a_capture_forbids_what_waits(self, cuda):
        stream, event = cuda.made("cudaStreamCreate"), cuda.made("cudaEventCreate")
        assert cuda.cudaStreamBeginCapture(0, 0) == 900
        assert cuda.cudaStreamBeginCapture(stream, 0) == 0
        assert cuda.cudaEventRecord(event, stream) == 0
        assert cuda.cudaEventQuery(event) == 907
        status = c_int()
        assert cuda.cudaStreamIsCapturing(stream, byref(status)) == 0
        assert status.value == 1
        graph = c_void_p()
        assert cuda.cudaStreamEndCapture(stream, byref(graph)) == 0
        assert cuda.cudaStreamDestroy(stream) == 0

    @pytest.fixture
    def captured(self, cuda):
        """A function that makes calls during a capture in a mode, and says whether it went well."""

        def captured(mode, *calls, blocking=False, thread_mode=None):
            stream, graph = c_void_p(), c_void_p()
            assert cuda.cudaStreamCreateWithFlags(byref(stream), 0 if blocking else 1) == 0
            assert cuda.cudaStreamBeginCapture(stream, mode) == 0
            if thread_mode is not None:
                exchanged = c_int(thread_mode)
                assert cuda.cuThreadExchangeStreamCaptureMode(byref(exchanged)) == 0
            found = [call(stream) for call in calls]
            if thread_mode is not None:
                assert cuda.cuThreadExchangeStreamCaptureMode(byref(exchanged)) == 0
                assert exchanged.value == thread_mode
            ended = cuda.cudaStreamEndCapture(stream, byref(graph))
            assert ended in (0, 901)
            assert cuda.cudaStreamDestroy(stream) == 0
            return found, ended == 0

        return captured

    @pytest.fixture
    def unsafe(self, cuda, mapped):
        """Calls that a capture may forbid, and that change nothing."""
        other, event = cuda.made("cudaStreamCreate"), cuda.made("cudaEventCreate")
        assert cuda.cudaEventRecord(event, other) == 0
        return {
            "cudaMalloc": lambda _: cuda.new("cudaMalloc", 0)[0],
            "cudaFree": lambda _: cuda.cudaFree(0),
            "cudaHostAlloc": lambda _: cuda.new("cudaHostAlloc", 0, 0)[0],
            "cudaEventQuery": lambda _: cuda.cudaEventQuery(event),
            "cudaEventSynchronize": lambda _: cuda.cudaEventSynchronize(event),
            "cudaStreamQuery": lambda _: cuda.cudaStreamQuery(other),
            "cudaStreamSynchronize": lambda _: cuda.cudaStreamSynchronize(other),
            "cuMemSetAccess": lambda _: cuda.cuMemSetAccess(
                mapped.start, 4 * UNIT, byref(READ_WRITE), 1
            ),
        }

    @pytest.mark.parametrize("mode", [0, 1])
    def test_a_capture_forbids_what_is_unsafe(self, unsafe, captured, mode):
        for name, call in unsafe.items():
            assert captured(mode, call) == ([900], False), name

    @pytest.mark.parametrize(("mode", "thread_mode"), [(2, None), (0, 2), (1, 2)])
    def test_a_relaxed_capture_or_thread_allows_it(self, unsafe, captured, mode, thread_mode):
        for name, call in unsafe.items():
            assert captured(mode, call, thread_mode=thread_mode) == ([0], True), name

    @pytest.mark.parametrize(("mode", "right"), [(0, False), (1, True), (2, True)])
    def test_other_threads_spoil_global_captures_only(self, cuda, unsafe, captured, mode, right):
        def elsewhere(call, thread_mode=None):
            def run():
                if thread_mode is not None:
                    cuda.cudaThreadExchangeStreamCaptureMode(byref(c_int(thread_mode)))
                found.append(call(None))

            found = []
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return found[0]

        query = unsafe["cudaEventQuery"]
        expected = ([0 if right else 900], right)
        assert captured(mode, lambda _: elsewhere(query)) == expected
        for thread_mode in (1, 2):
            assert captured(mode, lambda _, own=thread_mode: elsewhere(query, own)) == ([0], True)

    @pytest.mark.parametrize("mode", [0, 1, 2])
    def test_no_mode_allows_to_wait_for_what_is_captured(self, cuda, captured, mode):
        event, other = cuda.made("cudaEventCreate"), cuda.made("cudaStreamCreate")
        assert cuda.cudaEventRecord(event, other) == 0
        for expected, call in (
            (905, lambda stream: cuda.cudaStreamWaitEvent(stream, event, 0)),
            (900, cuda.cudaStreamQuery),
            (900, cuda.cudaStreamSynchronize),
            (900, lambda _: cuda.cudaDeviceSynchronize()),
            (900, lambda _: cuda.cuCtxSynchronize()),
        ):
            assert captured(mode, call, thread_mode=2) == ([expected], False)

    def test_the_legacy_stream_comprises_blocking_streams(self, cuda, captured):
        event, status = cuda.made("cudaEventCreate"), c_int()
        ask = functools.partial(cuda.cudaStreamIsCapturing, 0, byref(status))
        record = functools.partial(cuda.cudaEventRecord, event, 0)
        for blocking, expected in ((False, 0), (True, 906)):
            assert captured(2, lambda _: ask(), blocking=blocking) == ([expected], True)
            assert captured(2, lambda _: record(), blocking=blocking) == ([expected], not expected)

    def test_captured_copies_are_made_when_the_graph_runs(self, cuda):
        memory, stream = cuda.made("cudaMalloc", 8), cuda.made("cudaStreamCreate")
        source, found = ctypes.create_string_buffer(b"1234567"), ctypes.create_string_buffer(8)
        graph = c_void_p()
        assert cuda.cudaMemcpy(memory, b"unknown", 8, 1) == 0
        assert cuda.cudaStreamBeginCapture(stream, 2) == 0
        assert cuda.cudaMemcpyAsync(memory, source, 8, 1, stream) == 0
        assert cuda.cudaStreamEndCapture(stream, byref(graph)) == 0
        for expected in (b"unknown", b"1234567"):
            assert cuda.cudaMemcpy(found, memory, 8, 2) == 0
            assert found.value == expected
            assert cuda.cudaGraphLaunch(graph, stream) == 0
        assert cuda.cudaFree(memory) == 0
        assert cuda.cudaGraphLaunch(graph, stream) == 1
        assert len(cuda_runtime.complaints()) == 1
        assert cuda.cudaStreamDestroy(stream) == 0


class TestFailures:
    def test_calls_fail_when_told(self, cuda):
        cuda_runtime.fail("cudaMalloc", at=2, times=2)
        found = [cuda.new("cudaMalloc", 512) for _ in range(4)]
        assert [status for status, _ in found] == [0, 2, 2, 0]
        assert cuda.cudaGetLastError() == 2
        assert cuda.cudaGetLastError() == 0
        for status, pointer in found:
            assert status or cuda.cudaFree(pointer) == 0

    def test_a_kernels_error_is_for_ever(self, cuda):
        event = cuda.made("cudaEventCreate")
        cuda_runtime.break_device()
        assert cuda.cudaEventQuery(event) == 719
        assert cuda.cudaStreamQuery(0) == 719
        assert cuda.new("cudaMalloc", 512)[0] == 719
        assert cuda.cudaGetLastError() == 719
        assert cuda.cudaGetLastError() == 719
        cuda_runtime.reset()
        assert cuda.cudaEventQuery(event) == 0

    def test_counts(self, cuda):
        for _ in range(3):
            cuda.cudaDeviceSynchronize()
        assert cuda_runtime.counts()["cudaDeviceSynchronize"] == 3
        cuda_runtime.reset()
        assert cuda_runtime.counts()["cudaDeviceSynchronize"] == 0

    def test_a_child_cannot_use_cuda(self, cuda):
        import os

        if not (child := os.fork()):
            os._exit(cuda.cudaStreamQuery(0))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
