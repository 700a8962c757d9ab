"""The networks that users can name on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chainer_ooc.estimating.errors import EstimateError
from chainer_ooc.estimating.inputs import Inputs, images, parse
from chainer_ooc.estimating.ledger import Ledger
from chainer_ooc.estimating.without_data import without_data

__all__ = ["Net", "find", "names"]


@dataclasses.dataclass(frozen=True)
class Net:
    """A network that can be built.

    Attributes:
        name: The name that the user gave.
        source: The place that defines it.
        build: Takes (insize, batchsize) and returns a model and its inputs. No memory is taken.
        check: Takes an insize and raises :class:`EstimateError` if the network does not accept it.
        multiple: The network's insize must be a multiple of this.
    """

    name: str
    source: str
    build: Callable[[int, int], tuple[Any, Inputs]]
    check: Callable[[int], None]
    multiple: int = 1


def names() -> list[str]:
    """Return the names that :func:`find` knows."""
    return sorted({*_examples(), *_VISION})


def find(name: str) -> Net:
    """Return a network by its name, ``module:callable`` or ``file.py:callable``.

    Raises:
        EstimateError: If there is no such network.
    """
    if ":" in name:
        return _of_user(name)
    key = name.strip().lower()
    examples = _examples()
    if key in examples:
        return _of_examples(key)
    if key in _VISION:
        return _of_vision(key)
    known = sorted({*examples, *_VISION})
    near = difflib.get_close_matches(key, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise EstimateError(
        f"there is no network {name!r}{hint}; choose one of {', '.join(known)}, or name your own as "
        "module:callable or file.py:callable, which returns a chainer.Link that returns its loss"
    )


# chainer.links.model.vision: class, the layer of scores, and the only insize it takes.
_VISION: dict[str, tuple[str, str, int | None]] = {
    "vgg16": ("VGG16Layers", "fc8", 224),
    "vgg19": ("VGG19Layers", "fc8", 224),
    "googlenet": ("GoogLeNet", "loss3_fc", 224),
    "resnet50": ("ResNet50Layers", "fc6", None),
    "resnet101": ("ResNet101Layers", "fc6", None),
    "resnet152": ("ResNet152Layers", "fc6", None),
}


def _of_vision(name: str) -> Net:
    class_name, layer, only = _VISION[name]

    def check(insize: int) -> None:
        if only is not None and insize != only:
            raise EstimateError(f"insize={insize}: {name} takes {only} pixels only; give {only}")
        if insize < 32:
            raise EstimateError(
                f"insize={insize}: {name} takes 32 or more pixels; give a larger one"
            )

    def build(insize: int, batchsize: int) -> tuple[Any, Inputs]:
        import chainer
        import chainer.links as L

        check(insize)

        class Layer(chainer.Chain):
            def __init__(self) -> None:
                super().__init__()
                with self.init_scope():
                    self.network = getattr(L, class_name)(pretrained_model=None)

            def forward(self, x: Any) -> Any:
                return self.network(x, [layer])[layer]

        with without_data(Ledger()):
            return L.Classifier(Layer()), images(insize, batchsize)

    return Net(name, f"chainer.links.{class_name}", build, check)


def _roots() -> list[Path]:
    own = Path(__file__).resolve().parents[2]
    return [base / "examples" / "imagenet" for base in (Path.cwd(), own)]


def _examples() -> dict[str, Any]:
    """Return the networks of examples/imagenet, if this is a checkout."""
    for root in _roots():
        if (root / "models" / "__init__.py").is_file():
            try:
                with _importing_from(root):
                    return dict(importlib.import_module("models").ARCHS)
            except ImportError:
                continue
    return {}


@contextlib.contextmanager
def _importing_from(root: Path) -> Iterator[None]:
    """Import the trainer's modules, which have common names, without replacing other modules of these names."""
    own = {p.stem for p in root.glob("*.py")} | {p.name for p in root.iterdir() if p.is_dir()}
    others = {}
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None) or ""
        if name.split(".")[0] in own and not origin.startswith(str(root)):
            others[name] = sys.modules.pop(name)
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        sys.modules.update(others)


def _of_examples(name: str) -> Net:
    cls = _examples()[name]
    multiple = getattr(cls, "insize_multiple", 1)
    least = getattr(cls, "insize_min", 1)
    root = next(root for root in _roots() if (root / "models" / "__init__.py").is_file())

    def check(insize: int) -> None:
        if insize % multiple or insize < max(multiple, least):
            allowed = (
                f"multiples of {multiple} ({multiple}, {2 * multiple}, ...)"
                if multiple > 1
                else f"{least} or more pixels"
            )
            raise EstimateError(f"insize={insize}: {name} takes {allowed}; choose one of them")

    def build(insize: int, batchsize: int) -> tuple[Any, Inputs]:
        check(insize)
        with _importing_from(root), without_data(Ledger()):
            return cls(insize, 1000), images(insize, batchsize)

    return Net(name, "examples/imagenet", build, check, multiple)


def _of_user(name: str) -> Net:
    module_name, _, attribute = name.rpartition(":")
    try:
        if module_name.endswith(".py"):
            module = _load(Path(module_name))
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise EstimateError(f"{name!r}: {module_name} cannot be imported: {error}") from error
    make = getattr(module, attribute, None)
    if not callable(make):
        have = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise EstimateError(
            f"{name!r}: {module_name} has no callable {attribute!r}; it has {', '.join(have) or 'none'}"
        )

    def build(insize: int, batchsize: int) -> tuple[Any, Inputs]:
        import chainer

        with without_data(Ledger()):
            given = (
                make if isinstance(make, chainer.Link) else make(**_wanted(make, insize, batchsize))
            )
        model, *inputs = given if isinstance(given, tuple) else (given,)
        if not isinstance(model, chainer.Link):
            raise EstimateError(
                f"{name!r} returned {type(model).__name__}; it must return a chainer.Link, or a tuple of one and "
                "its inputs"
            )
        if len(inputs) == 1 and isinstance(inputs[0], tuple) and inputs[0]:
            (inputs,) = inputs  # (model, (x, t)), as estimate() takes them
        return model, parse(inputs) if inputs else images(insize, batchsize)

    return Net(name, module_name, build, lambda insize: None)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _wanted(make: Any, insize: int, batchsize: int) -> dict[str, int]:
    """Return those of the arguments insize and batchsize that a callable accepts."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return {}
    return {k: v for k, v in (("insize", insize), ("batchsize", batchsize)) if k in parameters}
