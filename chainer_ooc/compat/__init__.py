"""Stock Chainer 7.8.1 on today's Python, NumPy and CuPy, with none of its files touched.

An import hook edits the few modules that need it while they are loaded
(:mod:`chainer_ooc.compat.finder`); what is edited where, and why, is data in
:mod:`chainer_ooc.compat.edits`. Nothing here imports Chainer, NumPy or the rest of the package, so
that installing the hook costs next to nothing in a process that never imports Chainer.
"""

from chainer_ooc.compat.finder import install

__all__ = ["install"]
