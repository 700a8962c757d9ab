"""Find the installed chainer_ooc and Chainer, and the commands that repair the installation.

chainer_ooc's wheel contains Chainer, as a distribution of its own whose files belong to chainer_ooc.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.metadata import Distribution

#: The one Chainer version whose source text the edits know.
CHAINER_VERSION = "7.8.1"

#: A folder for ``PYTHONPATH`` that does the work of ``chainer_ooc.pth`` where Python does not read that.
SITE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")


def reinstall() -> str:
    """Return the shell command that installs chainer_ooc, with its Chainer, again from the same source."""
    import json
    import shlex
    from urllib.parse import unquote, urlsplit

    found = _distribution()
    if found is None:  # imported from a directory
        above = os.path.dirname
        return f"pip install {shlex.quote(above(above(above(os.path.abspath(__file__)))))}"
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    url = origin.get("url", "chainer_ooc")  # without a URL it came from an index
    if url.startswith("file:"):
        url = unquote(urlsplit(url).path)
    elif "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    install = "uv pip install --reinstall" if _is_of_uv(found) else "pip install --force-reinstall"
    return f"{install} --no-deps {editable}{shlex.quote(url)}"


def replace() -> str:
    """Return the shell commands that remove every installed Chainer and install chainer_ooc's."""
    # The first command removes chainer_ooc with its Chainer, so the second finds the other Chainer.
    uninstall = "uv pip uninstall" if _is_of_uv(_distribution()) else "pip uninstall -y"
    return f"{uninstall} chainer_ooc; {uninstall} chainer; {reinstall()}"


def _distribution() -> Distribution | None:
    from importlib.metadata import distributions

    # A build leaves metadata in the clone, too, and Python may run there.
    installed = (d for d in distributions(name="chainer_ooc") if d.read_text("INSTALLER"))
    return next(installed, None)


def _is_of_uv(found: Distribution | None) -> bool:
    return found is not None and (found.read_text("INSTALLER") or "").strip() == "uv"


def other_versions(site_packages: str) -> list[str]:
    """Return the versions of Chainer other than 7.8.1 that have metadata in a directory."""
    import re

    is_chainer = re.compile(r"chainer-([^-]+)(-py[\d.]+)?\.(dist|egg)-info").fullmatch
    found = {match[1] for match in map(is_chainer, os.listdir(site_packages)) if match}
    return sorted(found - {CHAINER_VERSION})


def leftovers(site_packages: str) -> list[str]:
    """Return the files of an earlier Chainer 7.8.1 that would survive chainer_ooc's removal as broken metadata."""
    folder = os.path.join(site_packages, f"chainer-{CHAINER_VERSION}.dist-info")
    try:
        with open(os.path.join(folder, "INSTALLER"), encoding="utf-8") as file:
            if file.read().strip() != "chainer_ooc":
                return []
    except OSError:
        return []
    paths = [os.path.join(folder, name) for name in ("direct_url.json", "uv_cache.json")]
    return [path for path in paths if os.path.exists(path)]
