"""Checksums of a GPU's memory, computed on the GPU.

Bytes are taken as words of 8, little-endian, the last one filled up with zeros. The checksum is the sum, modulo 2^64,
of a hash of each word and its number, and of the size. The sum does not depend on the order in which threads add. The
hash is the finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["NAME", "CudaChecksum", "checksum_on_host"]

NAME = "chainer_ooc_checksum"
THREADS, MOST_BLOCKS = 256, 1024

_CODE = """
extern "C" __global__ void chainer_ooc_checksum(
        unsigned long long address, unsigned long long nbytes, unsigned long long* total) {
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
        atomicAdd(total, sum);
    }
}
"""


class CudaChecksum:
    """Compute checksums on the current GPU, on its current stream, one at a time.

    Args:
        cupy: CuPy, or a double of it.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._kernel = cupy.RawKernel(_CODE, NAME)  # compiled when it is called first
        self._total: Any = None

    def __call__(self, address: int, nbytes: int) -> int:
        """Return the checksum of ``nbytes`` bytes of the GPU's memory. The host waits for it."""
        if self._total is None:  # allocated once: later memory may be short
            self._total = self._cupy.ndarray((1,), np.uint64)
        total = self._total
        total.fill(0)
        blocks = min(max(nbytes // (8 * THREADS), 1), MOST_BLOCKS)
        self._kernel((blocks,), (THREADS,), (np.uint64(address), np.uint64(nbytes), total))
        return (int(self._cupy.asnumpy(total)[0]) + nbytes) % (1 << 64)


def checksum_on_host(data: np.ndarray) -> int:
    """Return the checksum that the GPU would compute, of bytes in the host's memory (uint8)."""
    words = np.zeros(-(-data.size // 8), "<u8")
    words.view(np.uint8)[: data.size] = data
    words += np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    words ^= words >> np.uint64(31)
    return (int(words.sum(dtype=np.uint64)) + data.size) % (1 << 64)
