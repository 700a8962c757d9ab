"""Train Chainer models that are larger than the memory they run in."""

__version__ = "0.1.0"

from chainer_ooc.compat import install as _install_import_hook

_install_import_hook()
