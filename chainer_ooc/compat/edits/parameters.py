"""Edits of ``chainer`` and ``chainermn`` that keep their results: what asks whether there is an array does not read it.

Links ask before each forward whether their parameters have been initialized, optimizers ask for each parameter whether
it has a gradient, communicators ask for both. Stock Chainer reads the array and compares it with ``None``, which would
fetch one that is outside of memory, and would count as code that may write to it. The edited code calls methods of
``Variable``, which out-of-core mode replaces by functions that fetch nothing.
"""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace

_REASON = "whether a parameter has an array, or a gradient, is asked without reading it"


def _links(
    *modules: str, name: str = "self.W", reads: str = "array", times: int = 1
) -> tuple[Edit, ...]:
    asks = "_has_array" if reads == "array" else "_has_raw_array"
    replace = Replace(f"if {name}.{reads} is None:", f"if not {name}.{asks}():", times)
    return tuple(Edit(f"chainer.links.{module}", _REASON, (replace,)) for module in modules)


EDITS = (
    Edit(
        "chainer.variable",
        _REASON,
        (
            Replace(
                "class _AllowArrayAccessWithNonstandardLayout:",
                "def _peek_variable(variable):\n    return variable._data[0]\n\n\n"
                "Variable._has_array = lambda self: self._get_array() is not None\n"
                "Variable._has_raw_array = lambda self: self.raw_array is not None\n"
                "Variable._has_grad = lambda self: self._get_grad() is not None\n\n\n"
                "class _AllowArrayAccessWithNonstandardLayout:",
            ),
            Replace(
                "        x_data = x._data[0]\n        x_layout",
                "        x_data = _peek_variable(x)\n        x_layout",
            ),
            Replace(
                "        if self.array is None:\n            self.initialize(var.shape)",
                "        if not self._has_array():\n            self.initialize(var.shape)",
            ),
        ),
    ),
    Edit(
        "chainer._backprop",
        "the type of a gradient is checked without reading it",
        (
            Replace(
                "                        func, x, True, gx_elem.raw_array)",
                "                        func, x, True, chainer.variable._peek_variable(gx_elem))",
            ),
        ),
    ),
    Edit(
        "chainer.link",
        _REASON,
        (
            Replace(
                "if include_uninit or d[name].data is not None:",
                "if include_uninit or d[name]._has_array():",
            ),
            Replace(
                "            if param.array is None:", "            if not param._has_array():"
            ),
        ),
    ),
    Edit(
        "chainer.optimizer",
        _REASON,
        (
            Replace("has_grad = param.grad is not None", "has_grad = param._has_grad()"),
            Replace(
                "        is_initialized = param.array is not None\n",
                "        is_initialized = param._has_array()\n",
            ),
        ),
    ),
    *_links(
        "activation.simplified_dropconnect",
        "connection.convolution_nd",
        "connection.deconvolution_2d",
        "connection.deconvolution_nd",
        "connection.deformable_convolution_2d",
        "connection.depthwise_convolution_2d",
        "connection.dilated_convolution_2d",
        "connection.linear",
        "connection.local_convolution_2d",
    ),
    *_links("connection.convolution_2d", reads="raw_array"),
    *_links("activation.swish", name="self.beta"),
    *_links(
        "normalization.group_normalization", "normalization.layer_normalization", name="self.gamma"
    ),
    *_links("rnn.lstm", name="self.upward.W", times=2),
    Edit(
        "chainermn.communicators._memory_utility",
        _REASON,
        (
            Replace("if param.data is not None]", "if param._has_array()]", 2),
            Replace(
                "if param.data is not None and param.grad is not None]",
                "if param._has_array() and param._has_grad()]",
            ),
        ),
    ),
    Edit(
        "chainermn.optimizers",
        _REASON,
        (
            Replace("(name, param.data is not None)", "(name, param._has_array())"),
            Replace(
                "(var1.data is None) != (var2.data is None)",
                "var1._has_array() != var2._has_array()",
            ),
        ),
    ),
)
