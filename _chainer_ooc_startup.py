"""Makes ``import chainer`` work in every process, whoever imports it first.

``chainer_ooc.pth`` imports this module at the start of every interpreter.

It runs in processes that have nothing to do with Chainer, among them the children of
multiprocessing's forkserver and spawn methods. So it only puts a small finder into
``sys.meta_path``, which calls the real one at the first import of a package that chainer_ooc has
something to say about.
"""

import sys


class _FirstImport:
    """Hands over to ``chainer_ooc.compat`` at the first import of one of its packages."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname.partition(".")[0] not in ("chainer", "chainermn", "cupy", "onnx_chainer"):
            return None
        from chainer_ooc.compat import install

        return install().find_spec(fullname, path, target)  # install() has removed this finder


sys.meta_path.insert(0, _FirstImport)
