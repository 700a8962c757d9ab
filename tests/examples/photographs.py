"""Real photographs: those that scikit-learn ships."""

from pathlib import Path

import pytest
from PIL import Image


def photographs() -> list[Path]:
    """Returns the paths of two JPEG files of 640 x 427 pixels; skips the test without them."""
    sklearn = pytest.importorskip("sklearn")
    folder = Path(sklearn.__file__).parent / "datasets" / "images"
    paths = [folder / "china.jpg", folder / "flower.jpg"]
    if not all(path.exists() for path in paths):
        pytest.skip("scikit-learn without its sample images")
    return paths


def write_class_folders(root: Path, n: int = 6, size: tuple[int, int] = (120, 90)) -> Path:
    """Writes ``n`` crops of each photograph as JPEG files into a folder of its own."""
    for path in photographs():
        folder = root / path.stem
        folder.mkdir(parents=True)
        with Image.open(path) as photo:
            for i in range(n):
                box = (20 * i, 10 * i, 20 * i + size[0], 10 * i + size[1])
                photo.crop(box).save(folder / f"{path.stem} {i}.jpg", quality=92)
    return root
