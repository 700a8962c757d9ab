"""SciPy and h5py are imported when Chainer first uses them, and missed as on stock Chainer."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from chainer_ooc.compat.later import Later, later

USES = {
    "h5py": "chainer.serializers.save_hdf5('file.h5', chainer.links.Linear(2, 2))",
    "scipy.special": "print(F.erfinv(x).array, F.erfcinv(x).array, F.erfcx(x).array, F.ndtri(x).array)",
    "scipy.linalg": "print(chainer.distributions.MultivariateNormal(\n"
    "    loc=x, scale_tril=np.eye(2, dtype='f')).log_prob(x).array)",
    "scipy.sparse": "print(F.sparse_matmul(chainer.utils.to_coo(np.eye(2, dtype='f')), x.reshape(2, 1)).array)",
}
PROGRAM = """
import sys, numpy as np
for missing in sys.argv[1:]:
    sys.modules[missing] = None
import chainer_ooc, chainer, chainer.functions as F
print([name for name in ('scipy', 'h5py') if sys.modules.get(name)])
x = np.array([0.25, 0.5], 'f')
{use}
"""


@pytest.mark.parametrize("name", USES)
def test_a_library_is_imported_at_its_first_use(run_python, tmp_path, name):
    (tmp_path / "main.py").write_text(
        PROGRAM.format(use=USES[name]) + f"assert {name!r} in sys.modules"
    )
    result = run_python(tmp_path / "main.py")
    assert (result.returncode, result.stderr, result.stdout[:3]) == (0, "", "[]\n")
    assert (name == "h5py") == (tmp_path / "file.h5").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h5py", "h5py is not installed on your environment"),
        (
            "scipy.special",
            "SciPy is not available. Forward computation of erfinv in CPU cannot be done.",
        ),
        ("scipy.sparse", "SciPy seems to be unavailable on your system"),
    ],
)
def test_a_library_that_is_missing_is_missed_as_on_stock_chainer(
    run_python, tmp_path, name, message
):
    (tmp_path / "main.py").write_text(PROGRAM.format(use=USES[name]))
    result = run_python(tmp_path / "main.py", name.partition(".")[0])
    assert result.returncode == 1 and message in result.stderr


def test_chainers_modules_have_the_names_that_they_had():
    from chainer.functions.math import erfinv

    assert not hasattr(erfinv, "later")


def test_a_library_that_is_there_is_taken_as_it_is():
    assert later("numpy.linalg") is np.linalg


def test_nobody_waits_for_what_is_not_installed():
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        later("no_such_library.part")


def test_what_stands_in_gives_attributes_and_modules_below():
    sys.modules.pop("xml.dom.minidom", None)
    assert Later("xml.dom").minidom is sys.modules["xml.dom.minidom"]
    assert not hasattr(Later("xml.dom"), "nothing")
    assert not hasattr(Later("xml.dom"), "__wrapped__")
    with pytest.raises(AttributeError, match="nothing"):
        Later("math").nothing  # noqa: B018  no package: there is nothing below it
