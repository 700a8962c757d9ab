"""Train Chainer models that are larger than the memory they run in.

>>> import chainer_ooc
>>> chainer_ooc.enable(limit="8GiB")

and the script that follows trains out of core, with the results of stock Chainer bit for bit.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from chainer_ooc.compat import install as _install_import_hook

if TYPE_CHECKING:  # the names that __getattr__ loads: type checkers see them and refuse others
    from chainer_ooc import errors as errors
    from chainer_ooc import extensions as extensions
    from chainer_ooc import serializers as serializers
    from chainer_ooc import testing as testing
    from chainer_ooc.api import disable, enable, is_enabled, out_of_core_mode
    from chainer_ooc.estimating.estimator import estimate
    from chainer_ooc.graph.attributes import saved_attributes
    from chainer_ooc.graph.recompute import recomputable
    from chainer_ooc.report.explain import explain
    from chainer_ooc.report.plans import PlanReport, plans
    from chainer_ooc.statistics import Stats, stats

__version__ = "0.1.0"

__all__ = [
    "PlanReport",
    "Stats",
    "disable",
    "enable",
    "estimate",
    "explain",
    "is_enabled",
    "out_of_core_mode",
    "plans",
    "recomputable",
    "saved_attributes",
    "stats",
]

_install_import_hook()

# Loaded on first use: every Python process of the environment imports this module for the import hook.
_LAZY = dict.fromkeys(__all__, "chainer_ooc.api") | {
    "estimate": "chainer_ooc.estimating.estimator",
    "explain": "chainer_ooc.report.explain",
    "PlanReport": "chainer_ooc.report.plans",
    "plans": "chainer_ooc.report.plans",
    "recomputable": "chainer_ooc.graph.recompute",
    "Stats": "chainer_ooc.statistics",
    "stats": "chainer_ooc.statistics",
    "saved_attributes": "chainer_ooc.graph.attributes",
}


_MODULES = ("errors", "extensions", "serializers", "testing")


if not TYPE_CHECKING:

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
