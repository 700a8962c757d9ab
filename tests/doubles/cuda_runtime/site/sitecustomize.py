"""For the processes that tests start: with this folder in PYTHONPATH, CuPy runs on the double in each."""

from tests.doubles import cuda_runtime

if cuda_runtime.is_needed():
    cuda_runtime.install()
