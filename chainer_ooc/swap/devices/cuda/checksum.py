"""Checksums of a GPU's memory, computed on the GPU.

Bytes are taken as words of 8, little-endian, the last one filled up with zeros. The checksum is the sum, modulo 2^64,
of a hash of each word and its number, and of the size. The sum does not depend on the order in which threads add. The
hash is the finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["NAME", "SLOT", "CudaChecksum", "SumKernel", "checksum_on_host"]

NAME = "chainer_ooc_checksum"
THREADS, MOST_BLOCKS = 256, 1024
#: The size of a slot (bytes): the sum of the hashes, the sum so far, and the number of blocks that have added to that.
#: The last two are 0 before and after each run, so that nothing has to be filled in between.
SLOT = 3 * 8

_CODE = """
extern "C" __global__ void chainer_ooc_checksum(
        unsigned long long address, unsigned long long nbytes, unsigned long long* slot) {
    const unsigned char* bytes = (const unsigned char*)address;
    const unsigned long long* words = (const unsigned long long*)address;
    const bool aligned = address % 8 == 0;
    const unsigned long long count = (nbytes + 7) / 8;
    const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    unsigned long long sum = 0;
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < count; i += step) {
        unsigned long long word = 0;
        if (aligned && 8 * i + 8 <= nbytes) {
            word = words[i];
        } else {
            for (int k = 0; k < 8 && 8 * i + k < nbytes; ++k) {
                word |= (unsigned long long)bytes[8 * i + k] << (8 * k);
            }
        }
        word += (i + 1) * 0x9e3779b97f4a7c15ULL;
        word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ULL;
        word = (word ^ (word >> 27)) * 0x94d049bb133111ebULL;
        sum += word ^ (word >> 31);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_down_sync(0xffffffff, sum, offset);
    }
    if (threadIdx.x % 32 == 0) {
        atomicAdd(slot + 1, sum);
        __threadfence();
    }
    __syncthreads();
    // atomicInc() returns to 0 after the last block.
    if (threadIdx.x == 0 && atomicInc((unsigned int*)(slot + 2), gridDim.x - 1) == gridDim.x - 1) {
        __threadfence();
        slot[0] = atomicExch(slot + 1, 0ULL);
    }
}
"""


class SumKernel:
    """Compute the sum of the hashes of some bytes into a slot, on the current GPU and stream.

    Args:
        cupy: CuPy, or a double of it.
    """

    def __init__(self, cupy: Any) -> None:
        self._kernel = cupy.RawKernel(_CODE, NAME)  # compiled when it is called first

    def __call__(self, address: int, nbytes: int, slot: int) -> None:
        """Queue the kernel for ``nbytes`` bytes and the slot at an address. The host does not wait."""
        blocks = min(max(nbytes // (8 * THREADS), 1), MOST_BLOCKS)
        arguments = np.uint64(address), np.uint64(nbytes), np.uint64(slot)
        self._kernel((blocks,), (THREADS,), arguments)


class CudaChecksum:
    """Compute checksums on the current GPU, on its current stream, one at a time.

    Args:
        cupy: CuPy, or a double of it.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._sum = SumKernel(cupy)
        self._slot: Any = None

    def __call__(self, address: int, nbytes: int) -> int:
        """Return the checksum of ``nbytes`` bytes of the GPU's memory. The host waits for it."""
        if self._slot is None:  # allocated once: later memory may be short
            self._slot = self._cupy.ndarray((SLOT // 8,), np.uint64)
            self._slot.fill(0)
        self._sum(address, nbytes, self._slot.data.ptr)
        return (int(self._cupy.asnumpy(self._slot)[0]) + nbytes) % (1 << 64)


def checksum_on_host(data: np.ndarray) -> int:
    """Return the checksum that the GPU would compute, of bytes in the host's memory (uint8)."""
    words = np.zeros(-(-data.size // 8), "<u8")
    words.view(np.uint8)[: data.size] = data
    words += np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    words ^= words >> np.uint64(31)
    return (int(words.sum(dtype=np.uint64)) + data.size) % (1 << 64)
