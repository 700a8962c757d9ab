"""Edits of Chainer's and ChainerMN's GPU code for CuPy 14."""

from __future__ import annotations

from chainer_ooc.compat.edits import Edit, Replace

EDITS: tuple[Edit, ...] = (
    Edit(
        "chainer.functions.connection.deconvolution_2d",
        "a bug of the 7.8.1 release: arrays are passed where shapes are expected",
        (Replace("self._set_cover_all(x, W)", "self._set_cover_all(x.shape, W.shape)"),),
    ),
)
