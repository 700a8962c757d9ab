"""Run a script, or ``-c CODE``, with real CuPy on the double: ``python -m tests.doubles.cuda_runtime SCRIPT ...``."""

import runpy
import sys

from tests.doubles import cuda_runtime

cuda_runtime.install()
if sys.argv[1] == "-c":
    code = sys.argv[2]
    sys.argv = ["-c", *sys.argv[3:]]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
else:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
