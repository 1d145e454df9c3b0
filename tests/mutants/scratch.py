"""A copy of the checkout in which kernels may be broken, and the emulated module of each mutant built there.

A fresh copy is made for every mutant, from one whose objects are up to date, and the kernels that include the changed
file are compiled there one after the other. To make that quick the copies keep two instances of a family, `INSTANCES`.
"""

from __future__ import annotations

import fcntl
import filecmp
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.cuda_on_cpu.build import BUILD, ROOT

from .mutate import KERNELS, Mutant

# Both layouts, both arithmetics. A family that has neither dtype wants another entry here: the judge runs each, and
# tests/test_mutants.py asks that all the instances that are left are executed.
INSTANCES = (("float64", "nhwc"), ("float32", "nchw"))

# Of the kernels that are compiled for a kernel size and a stride: these are enough for every line. What is left of the
# depthwise ones is float32 and bfloat16, of the tensor-core ones bfloat16 and TF32, in every shape of tiles and slabs.
_OTHER_KERNELS = re.compile(
    r"^.*<Family, (?:3, 2|5, 1|7, \d)>.*\n|^.*\bmake<Scalar, [57], [^>]*>.*\n|^.*\badd_kinds<__half>.*\n", re.MULTILINE
)

_MADE = re.compile(
    r"(?:[\w:]+ )?[\w:]*make<[^<>]*>\([^()\"]*\"(?:\w*?_)??(?P<dtype>float64|float32|float16|bfloat16)"
    r"(?:_(?P<layout>nhwc|nchw))?\"\),?"
)


class DoesNotCompile(Exception):
    """The mutant is no program."""


class Scratch:
    """The copies under `folder`: `pristine`, which is built but never changed, and one a name for mutants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pristine = folder / "pristine"
        ignored = shutil.ignore_patterns("__pycache__", "lib", "_emulator_tests*", "lock")
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        with open(ROOT / BUILD / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # not while a build is under way
            for part in ("csrc", "fused_sepconv", "tests", BUILD):
                shutil.copytree(ROOT / part, self.pristine / part, ignore=ignored)
        for path in sorted((self.pristine / "csrc/launch").iterdir()):
            path.write_text(_with_few_instances(path.read_text()))
        self.native = {checked: _build(self.pristine, checked) for checked in (False, True)}

    def copy(self, name: str, mutant: Mutant) -> Path:
        """A copy of `pristine`, in place of the last one of this name, with the mutant in it, which looks no newer."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.pristine, root)
        path = root / KERNELS / mutant.file
        times = path.stat()
        path.write_text(mutant.apply(path.read_text()))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return root

    def build(self, root: Path, checked: bool, kernel: str) -> Path:
        """The emulated native module of a copy, with the mutant in one kernel more."""
        (root / _object(checked, kernel)).unlink()
        return _build(root, checked)

    def has_the_same_code(self, root: Path, kernel: str) -> bool:
        """Whether the compiler has made the same of this kernel in a copy as in `pristine`."""
        return filecmp.cmp(self.pristine / _object(False, kernel), root / _object(False, kernel), shallow=False)

    def kernels_with(self, file: str) -> frozenset[str]:
        """The kernels whose code has that of a kernel file in it, by the names of the files that launch them."""
        launching = (self.pristine / "csrc/launch").glob("*.cu")
        return frozenset(path.stem for path in launching if file in _files_in(path))


def _object(checked: bool, kernel: str) -> Path:
    return BUILD / ("checked" if checked else "plain") / f"_native/csrc/launch/{kernel}.o"


def _with_few_instances(text: str) -> str:
    def kept(match: re.Match[str]) -> str:
        dtype, layout = match.group("dtype", "layout")
        keep = any(dtype == wanted[0] and layout in (None, wanted[1]) for wanted in INSTANCES)
        keep |= (dtype, layout) == ("bfloat16", None)  # 16 bits of the depthwise kernels, and what adds parts of them
        return match.group() if keep else ""

    return _OTHER_KERNELS.sub("", _MADE.sub(kept, text))


@functools.cache
def _files_in(path: Path) -> frozenset[str]:
    """The names of a file of csrc, and of all that it includes from there."""
    included = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    here = [(path.parent / name).resolve() for name in included]
    return frozenset({path.name}.union(*(_files_in(other) for other in here if other.exists())))


def _build(root: Path, checked: bool) -> Path:
    command = [sys.executable, "-m", "tests.cuda_on_cpu", *(["--checked"] if checked else [])]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode != 0:
        raise DoesNotCompile(result.stderr)
    return Path(result.stdout.splitlines()[-1])
