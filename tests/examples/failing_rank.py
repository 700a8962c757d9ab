"""train.py with a defect: rank 1 raises in its second iteration. Run by test_imagenet_runs.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "imagenet"))

import train
import training

update = training.Updater.update_core


def failing_update(self):
    if self._world.rank == 1 and self.iteration == 1:
        raise RuntimeError("a defect in one rank")
    update(self)


training.Updater.update_core = failing_update

if __name__ == "__main__":
    sys.exit(train.main())
