"""Adds ``chainer_ooc.pth`` to the normal and the editable wheel; the rest is in pyproject.toml."""

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PTH = Path(__file__).with_name("chainer_ooc.pth")


class BuildPy(build_py):
    """Copies the ``.pth`` file beside the packages: Python reads it there when it starts."""

    def run(self):
        super().run()
        if not self.editable_mode:
            Path(self.build_lib).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PTH, Path(self.build_lib, PTH.name))

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, PTH.name))]

    def get_source_files(self):
        return [*super().get_source_files(), PTH.name]


class EditableWheel(editable_wheel):
    """Adds the ``.pth`` file to the finished editable wheel, for which setuptools has no hook."""

    def run(self):
        super().run()
        (wheel,) = Path(self.dist_dir).glob("chainer_ooc-*.editable-*.whl")
        data = PTH.read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        with zipfile.ZipFile(wheel) as old:
            members = {info.filename: old.read(info) for info in old.infolist()}
        (record,) = (name for name in members if name.endswith(".dist-info/RECORD"))
        members[PTH.name] = data
        members[record] += f"{PTH.name},sha256={digest},{len(data)}\n".encode()
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in members.items():
                new.writestr(name, content)


setup(cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel})
