"""Reading what finished runs left behind, for the plots that compare runs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from errors import InputError

CONFIG_FILE = "config.resolved.yaml"
LOG_FILE = "log"


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        folder: Where it is.
        settings: The resolved configuration.
        log: Entries of LogReport, oldest first.
    """

    folder: Path
    settings: dict[str, Any]
    log: list[dict[str, Any]]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns epochs (fractions of one between them) and the values of a key of the log."""
        rows = [entry for entry in self.log if key in entry]
        per_epoch = self._iterations_per_epoch()
        epochs = np.array([entry["iteration"] / per_epoch for entry in rows])
        return epochs, np.array([float(entry[key]) for entry in rows])

    def _iterations_per_epoch(self) -> float:
        """Iterations of an epoch, from the log's entries at the ends of epochs."""
        whole = [e["iteration"] / e["epoch"] for e in self.log if e.get("epoch")]
        return float(min(whole)) if whole else 1.0

    @property
    def error(self) -> float:
        """Validation error after the last epoch, in percent."""
        return 100 * (1 - float(self.series("validation/main/accuracy")[1][-1]))

    @property
    def training_loss(self) -> float:
        """Training loss of the last entry of the log."""
        return float(self.series("main/loss")[1][-1])

    @property
    def depth(self) -> int:
        """Number of layers, from the network's name.

        Raises:
            InputError: The name has no number.
        """
        arch = str(self.settings.get("arch", ""))
        found = re.search(r"\d+", arch.replace("cifar10", ""))
        if found is None:
            raise InputError(f"{self.folder}: network {arch!r} has no depth in its name; plot "
                             f"results of networks such as preresnet110")  # fmt: skip
        return int(found[0])

    @property
    def method(self) -> str:
        """The optimizer's name."""
        return str(self.settings.get("optimizer", "?"))

    @property
    def first_restart(self) -> int:
        """F1, the first restart period of SRSGD in iterations.

        Raises:
            InputError: The run had none.
        """
        restarts = self.settings.get("restarts")
        if not restarts:
            raise InputError(f"{self.folder}: has no setting `restarts`; plot results of srsgd")
        return int(restarts[0])

    @property
    def epochs(self) -> int:
        """Number of epochs that the run was set to."""
        return int(self.settings["epoch"])


def read(folder: Path) -> Result:
    """Reads a folder of results.

    Raises:
        InputError: It is none, or it is damaged, or nothing was validated yet.
    """
    try:
        settings = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        log = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(
            f"{folder}: {Path(e.filename).name} cannot be read ({e.strerror}); give folders of "
            f"results of train.py"
        ) from e
    except (yaml.YAMLError, ValueError) as e:
        raise InputError(f"{folder}: is damaged ({str(e).splitlines()[0]}); run it again") from e
    result = Result(folder, settings, log)
    if not isinstance(settings, dict) or not isinstance(log, list):
        raise InputError(f"{folder}: {CONFIG_FILE} or {LOG_FILE} is not one of train.py")
    if not any("validation/main/accuracy" in entry for entry in log):
        raise InputError(f"{folder}: nothing was validated yet; let the run finish an epoch")
    return result
