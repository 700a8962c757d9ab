"""The device that CuPy finds on the double, whichever version of CuPy and CUDA."""

from __future__ import annotations

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")


def test_properties_and_attributes_are_those_of_an_h200(cuda):
    found = cupy.cuda.runtime.getDeviceProperties(0)
    wanted = {
        "name": b"NVIDIA H200 (double)",
        "totalGlobalMem": 4 << 30,  # as the fixture says
        "warpSize": 32,
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "maxThreadsPerBlock": 1024,
        "sharedMemPerBlock": 49152,
        "totalConstMem": 65536,
        "integrated": 0,
        "canMapHostMemory": 1,
    }
    assert {name: found[name] for name in wanted} == wanted
    device = cupy.cuda.Device()
    assert device.compute_capability == "90"
    assert device.mem_info == ((4 << 30) - cuda.memory()["used"], 4 << 30)
    attributes = device.attributes
    assert (attributes["WarpSize"], attributes["MultiProcessorCount"]) == (32, 132)


def test_what_is_uploaded_comes_back():
    data = np.random.RandomState(0).randint(0, 256, 12345).astype(np.uint8)
    array = cupy.asarray(data)
    assert (array.get() == data).all()
    other = cupy.empty_like(array)
    other.data.copy_from_device(array.data, array.nbytes)
    assert (other[5:].get() == data[5:]).all()
    assert cupy.cuda.runtime.pointerGetAttributes(array.data.ptr).type == 2


def test_a_call_that_is_not_there_is_an_error_and_a_complaint(cuda):
    with pytest.raises(Exception, match="cudaErrorNotSupported"):
        cupy.cuda.runtime.ipcGetMemHandle(cupy.zeros(4).data.ptr)
    assert cuda.complaints() == ["cudaIpcGetMemHandle is not in the double"]
    cuda.reset()


def test_pools_of_cuda(cuda):
    before = cuda.memory()["pool_used"]
    pool = cupy.cuda.MemoryAsyncPool()
    pointer = pool.malloc(1 << 20)
    assert cuda.memory()["pool_used"] - before == 1 << 20
    del pointer
    assert cuda.memory()["pool_used"] == before


def test_a_stream_that_captures_is_seen(cuda):
    stream = cupy.cuda.Stream(non_blocking=True)
    array = cupy.zeros(4, "f")
    with stream:
        stream.begin_capture()
        assert stream.is_capturing()
        array += 1
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="StreamCaptureUnsupported"):
            stream.synchronize()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="StreamCaptureInvalidated"):
            stream.end_capture()
        stream.begin_capture()
        graph = stream.end_capture()
        graph.launch()


def test_unified_memory_takes_none_of_the_device(cuda):
    before = cuda.memory()["used"]
    pool = cupy.cuda.MemoryPool(cupy.cuda.malloc_managed)
    with cupy.cuda.using_allocator(pool.malloc):
        array = cupy.asarray(np.arange(12345, dtype="i4"))
        assert (array.get() == np.arange(12345)).all()
        more = cupy.cuda.alloc(2 * cuda.memory()["total"])
    assert cuda.memory()["used"] == before
    del array, more
    pool.free_all_blocks()
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="InvalidValue"):
        cupy.cuda.runtime.mallocManaged(512, 3)
    assert cuda.complaints() == ["cudaMallocManaged(512, flags 3)"]
    cuda.reset()
