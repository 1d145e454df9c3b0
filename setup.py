"""Builds the native module where a CUDA toolkit is found; all other metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip does not put the project's folder there

from build_native.compile import REPORT_NAME, build  # noqa: E402
from build_native.toolkit import BuildError, choose_toolkit  # noqa: E402

try:
    toolkit, why_without = choose_toolkit(os.environ)
except BuildError as error:
    raise SystemExit(f"fused_sepconv: {error}") from None


def missing_requirements() -> list[str]:
    """Requirements that a build without isolation (`pip install --no-build-isolation`) lacks: pip leaves that to it."""
    missing = []
    if int(setuptools.__version__.split(".")[0]) < 65:
        missing.append(f"setuptools>=65 (found {setuptools.__version__})")
    if not find_spec("setuptools.command.bdist_wheel") and not find_spec("wheel"):  # setuptools has it since 70.1
        missing.append("wheel")
    if toolkit is not None:
        missing += [name for name in ("pybind11", "ninja") if not find_spec(name)]
    return missing


if {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv) and (missing := missing_requirements()):
    quoted = " ".join(f'"{item.split(" (")[0]}"' for item in missing)
    raise SystemExit(f"fused_sepconv: this build lacks {', '.join(missing)}. `pip install {quoted}` brings it")


class BuildPython(build_py):
    """Says why there are no kernels, where there are none: every kind of installation passes here once."""

    def run(self) -> None:
        # Files that an earlier build left there would be shipped too, deleted modules included.
        shutil.rmtree(Path(self.build_lib) / "fused_sepconv", ignore_errors=True)
        super().run()
        if toolkit is None:
            print(f"fused_sepconv: installing without CUDA kernels: {why_without}", flush=True)


class BuildNative(build_ext):
    """Hands the extension to ninja; setuptools only says where the result goes."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp)
        if self.editable_mode:  # setuptools would have a temporary folder, and every file compiled each time
            folder = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        module = Path(self.get_ext_fullpath(ext.name))
        try:
            build(ROOT / "csrc", module, folder, toolkit, self.distribution.get_version(), os.environ)
        except BuildError as error:
            raise CompileError(f"fused_sepconv: {error}") from None

    def copy_extensions_to_source(self) -> None:
        """For editable installations: the module goes beside the package's sources, its resource report with it."""
        folder = Path("fused_sepconv") / "native" / "lib"
        (ROOT / folder).mkdir(exist_ok=True)
        super().copy_extensions_to_source()
        shutil.copyfile(Path(self.build_lib) / folder / REPORT_NAME, ROOT / folder / REPORT_NAME)


setup(
    # Here because [project] spells a licence differently for setuptools before and after 77, and an installation
    # without build isolation may meet either.
    license="Apache-2.0",
    # Without a toolkit there is no extension at all, so that the wheel is a plain Python one.
    ext_modules=[Extension("fused_sepconv.native.lib._native", sources=[])] if toolkit else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
