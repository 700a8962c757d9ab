"""A network whose results are known without computing: each function uploads its own, backward looks at all bits."""

from __future__ import annotations

import chainer
import cupy
import numpy as np

KIB = 1 << 10


def bits_of(number, nbytes):
    """Return the bytes of the number-th array."""
    return np.random.RandomState(number).randint(0, 256, nbytes).astype(np.uint8)


class Upload(chainer.FunctionNode):
    """Gives an array of known bytes, and keeps it and its input for backward."""

    def __init__(self, number, nbytes, layout, seen):
        self.number, self.nbytes, self.layout, self.seen = number, nbytes, layout, seen

    def forward(self, inputs):
        self.retain_inputs((0,))
        self.retain_outputs((0,))
        flat = cupy.asarray(bits_of(self.number, self.nbytes).view("f4"))
        return (self.layout(flat),)

    def backward(self, indexes, gradients):
        (x,), (y,) = self.get_retained_inputs(), self.get_retained_outputs()
        for number, kept in ((self.number - 1, x), (self.number, y)):
            # As they lie in memory, since no kernel would bring them into order.
            flat = cupy.ndarray((self.nbytes // 4,), "f4", kept.array.data)
            self.seen[number] = self.seen.get(number, True) and (
                flat.get().tobytes() == bits_of(number, self.nbytes).tobytes()
            )
        return gradients


LAYOUTS = {
    "flat": lambda array: array,
    "rows": lambda array: array.reshape(4, -1),
    "columns": lambda array: array.reshape(4, -1).T,
    "view": lambda array: array.reshape(2, -1)[:, ::2],
}


def step(count=12, nbytes=256 * KIB, layout="flat", wait=False):
    """Run forward and backward. Return by array whether it had its bytes whenever backward looked.

    Args:
        count: The number of functions.
        nbytes: The size of each array (bytes).
        layout: How the arrays lie in their memory.
        wait: Wait for all copies before backward begins.
    """
    seen = {}
    variable = chainer.Variable(LAYOUTS[layout](cupy.asarray(bits_of(0, nbytes).view("f4"))))
    for number in range(1, count + 1):
        variable = Upload(number, nbytes, LAYOUTS[layout], seen).apply((variable,))[0]
    if wait:
        cupy.cuda.Device().synchronize()
    variable.grad = cupy.empty(variable.shape, "f4")
    variable.backward()
    return seen
