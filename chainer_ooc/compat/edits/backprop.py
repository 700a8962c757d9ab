"""Edits of ``chainer`` that keep its results: backward reads no array that it does not need.

Stock Chainer reads ``x.data`` of every input of every function, for hooks and to choose a device, and
refers to it while the function runs. Checks of gradients read it to compare types; setters test it for
``None``. Each of these reads would fetch an array that is outside of memory. The edited code asks
``chainer.variable._peek`` instead, which out-of-core mode replaces by a function that fetches nothing. If
there are hooks, ``_before_hooks`` runs before them and fetches the function's arrays, so that timers
measure computation, not waits.
"""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace

EDITS = (
    Edit(
        "chainer.variable",
        "what only looks at the type of a node's array, or whether there is one, must not read it",
        (
            Replace(
                "        x_data = x._data\n        x_layout = x._layout\n        x_shape = x.shape\n",
                "        x_data = _peek(x)\n        x_layout = x._layout\n        x_shape = x.shape\n",
            ),
            Replace(
                "update it as well.\n        if self._data is not None:\n",
                "update it as well.\n        if self.__dict__.get('_data') is not None:\n",
            ),
            Replace(
                "            if node._data is not None:\n                node.retain_data()\n",
                "            if node.__dict__.get('_data') is not None:\n                node.retain_data()\n",
            ),
            Replace(
                "def _create_variable(",
                "def _peek(node):\n    return node._data\n\n\n"
                "def _before_hooks(func):\n    pass\n\n\ndef _create_variable(",
            ),
        ),
    ),
    Edit(
        "chainer._backprop",
        "Variable.backward and chainer.backward read the inputs' arrays only for hooks",
        (
            Replace(
                "        in_data = [x.data for x in inputs]\n        out_grad_array",
                "        out_grad_array",
            ),
            Replace(
                "            hooks = base_hooks\n\n        with chainer.using_device(",
                "            hooks = base_hooks\n"
                "        if hooks:\n"
                "            chainer.variable._before_hooks(func)\n"
                "        in_data = [x.data if hooks else chainer.variable._peek(x) for x in inputs]\n"
                "        with chainer.using_device(",
            ),
            Replace(
                "            hooks = local_hooks.values()  # avoid six for performance\n",
                "            hooks = tuple(local_hooks.values())\n",
            ),
            Replace(
                "            hooks = base_hooks\n        if hooks:",
                "            hooks = tuple(base_hooks)\n        if hooks:",
            ),
        ),
    ),
    Edit(
        "chainer.function_node",
        "chainer.grad reads the inputs' arrays only for hooks",
        (
            Replace(
                "            hooks = local_hooks.values()  # avoid six for performance\n"
                "        else:\n"
                "            hooks = base_hooks\n\n"
                "        in_data = [x.data for x in func.inputs]\n",
                "            hooks = tuple(local_hooks.values())\n"
                "        else:\n"
                "            hooks = tuple(base_hooks)\n\n"
                "        if hooks:\n"
                "            variable._before_hooks(func)\n"
                "        in_data = [x.data if hooks else variable._peek(x) for x in func.inputs]\n",
            ),
        ),
    ),
    Edit(
        "chainer.functions.noise.dropout",
        "the mask is read only for a caller who asks for it",
        (
            Replace(
                "        mask = func.mask\n    else:\n",
                "        mask = func.mask if return_mask else None\n    else:\n",
            ),
        ),
    ),
)
