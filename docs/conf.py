"""Sphinx's configuration: ``make docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import chainer_ooc

project = "chainer_ooc"
author = "the chainer_ooc developers"
version = release = chainer_ooc.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"chainer_ooc {release}"
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
# Links to files beside the documentation are for readers of the repository.
suppress_warnings = ["myst.xref_missing"]
