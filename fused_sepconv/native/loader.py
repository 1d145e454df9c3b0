"""Finds and loads the native module, and says why there is none.

The module is looked for in three places: the file that FUSED_SEPCONV_NATIVE names; `lib/` beside this file, where
`pip install` puts it; and, where this file is in a checkout (a prompt in its folder imports the checkout's package
rather than the installed one), `lib/` of the installed distribution. A checkout takes only a module that was compiled
from the checkout's own `csrc/`: a stale one would run other kernels than those that the user reads and edits.

A module that can't be used never fails the import of the package, as everything works without kernels too. The one
exception is FUSED_SEPCONV_NATIVE, which asks for that file and no other.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fused_sepconv.native import sources

_PACKAGE = Path(__file__).resolve().parent


class _Search(NamedTuple):
    """How the search ended: a module, or why there is none."""

    module: ModuleType | None
    reason: str


def load() -> ModuleType | None:
    """The native module, or None: see `why_missing`."""
    return _search().module


def why_missing() -> str:
    """A sentence that says why there are no kernels; empty where there are."""
    return _search().reason


def path() -> str | None:
    """The file of the native module."""
    module = load()
    return None if module is None else module.__file__


def build_info() -> dict[str, Any] | None:
    """The origin of the native module: version, architectures, nvcc, sources, and whether it is emulated."""
    module = load()
    return None if module is None else dict(module.build_info())


def resources() -> dict[str, dict[str, dict[str, int | str]]]:
    """{architecture: {mangled kernel name: name, registers, spills, stack, shared and constant bytes}}, as compiled.

    Empty where there is no native module or its build left no report.
    """
    file = path()
    report = None if file is None else Path(file).with_name("_native_resources.json")
    return json.loads(report.read_text()) if report is not None and report.is_file() else {}


class Instance(NamedTuple):
    """A kernel of the native module as it was compiled; `registers` and `local_bytes` are None where nothing tells."""

    name: str
    spelling: str  # in C++
    threads: int  # a block, at most
    shared_bytes: int  # dynamic shared memory a block, at most
    registers: int | None  # a thread
    local_bytes: int | None  # a thread: spilled registers and arrays that did not fit into registers


def instances(architecture: str | None = None, ask_driver: bool = False) -> dict[str, Instance]:
    """Every kernel of the native module by name, with what the binary says of it.

    The compiler's report for `architecture` ("sm_90"); without an architecture, the most of any. With `ask_driver`
    the driver's figures (cudaFuncGetAttributes) for the current device, where there is a driver that runs the build:
    that loads every kernel, and where only PTX fits compiles it, which takes a minute.

    Empty where there is no native module. The emulation has neither registers nor local memory.
    """
    module = load()
    if module is None:
        return {}
    driver = _driver_figures(module) if ask_driver else {}
    reports = [report for name, report in resources().items() if architecture in (None, name)]
    compiled: dict[int | str, list[tuple[int, int]]] = {}
    for kernel in (kernel for report in reports for kernel in report.values()):
        local = kernel["stack"] + kernel["spill_stores"] + kernel["spill_loads"]
        compiled.setdefault(kernel["name"], []).append((kernel["registers"], local))
    found = {}
    for figures in module.instances():
        name, spelling = figures["name"], figures["spelling"]
        registers = local_bytes = None
        if name in driver:
            registers, local_bytes = driver[name]["registers"], driver[name]["local_bytes"]
        elif spelling in compiled:
            registers, local_bytes = (max(column) for column in zip(*compiled[spelling], strict=True))
        found[name] = Instance(name, spelling, figures["threads"], figures["shared_bytes"], registers, local_bytes)
    return found


def _driver_figures(module: ModuleType) -> dict[str, dict[str, int]]:
    try:
        return dict(module.attributes()) if module.driver_version() else {}
    except RuntimeError:  # a driver without a device, or one that the build has no code for
        return {}


class _Answer(NamedTuple):
    """A device's answer to the module's probe; empty where the build runs there."""

    module: ModuleType
    reason: str


_answers: dict[int, _Answer] = {}


def why_not_on(index: int) -> str:
    """A sentence that says why the build can't run on a CUDA device; empty where it can.

    The first call loads one small kernel there; others are loaded when they are first used. What can't change (the
    device or the driver is too old) is remembered, and asked again is what may: no memory left, say.
    """
    module = load()
    if module is None:
        return why_missing()
    known = _answers.get(index)
    if known is not None and known.module is module:
        return known.reason
    try:
        module.set_device(index)
        error, message, lasting = module.probe()
    except RuntimeError as failure:
        return str(failure)
    built = module.build_info()["architectures"]
    reason = f"the kernels, built for {built}, do not run on GPU {index}: {error}: {message}" if error else ""
    if not error or lasting:
        _answers[index] = _Answer(module, reason)
    if not error:
        figures = module.device_attributes(index)
        capability = (figures["major"], figures["minor"])
        if not has_code_for(built, capability):
            number = "".join(map(str, capability))
            warnings.warn(
                f"fused_sepconv was built for {built}, which has no machine code for GPU {index} of compute capability "
                f"{'.'.join(map(str, capability))}: the driver compiles each kernel when it is first used, which takes "
                f"seconds, and keeps it in its cache. FUSED_SEPCONV_ARCHS={number} builds machine code",
                stacklevel=2,
            )
    return reason


def has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for such as "80;90a;100+PTX" has machine code that runs on the capability.

    It runs on its own capability and on later ones of the same major number; that of an "a" on its own alone.
    """
    for item in architectures.split(";"):
        name = item.removesuffix("+PTX")
        major, minor = divmod(int(name.rstrip("af")), 10)
        if (major, minor) == capability or (major == capability[0] and minor < capability[1] and name[-1] != "a"):
            return True
    return False


@functools.cache
def _search() -> _Search:
    if named := os.environ.get("FUSED_SEPCONV_NATIVE"):
        try:
            return _Search(_import(Path(named)), "")
        except Exception as error:
            raise ImportError(f"FUSED_SEPCONV_NATIVE names {named}, which can't be loaded: {error}") from error

    csrc = sources.checkout_csrc()
    folders = [_PACKAGE / "lib"]
    if csrc is not None:
        folders += _installed_folders()
    reasons = []
    stale = False
    for file in filter(None, map(_module_file, folders)):
        try:
            module = _import(file)
            built_from = module.build_info()["sources"]
        except Exception as error:  # a damaged file, another platform's, a newer glibc's, a missing symbol: all of them
            reasons.append(f"{file} can't be loaded: {error}")
            continue
        if csrc is None or built_from == sources.digest(csrc):
            return _Search(module, "")
        reasons.append(f"{file} was built from other sources than {csrc}")
        stale = True
    if stale:
        reasons.append("`pip install .` in the checkout rebuilds the kernels (`pip install -e .` those beside it)")
        warnings.warn(f"fused_sepconv runs without kernels: {'; '.join(reasons)}", stacklevel=2)
    return _Search(None, "; ".join(reasons) or _not_built(csrc))


def _not_built(csrc: Path | None) -> str:
    tags = ", ".join(sorted(file.name for file in (_PACKAGE / "lib").glob("_native.*.so")))
    if tags:
        return f"the native module was built for another Python: {tags}, where this one loads {_suffixes()[0]}"
    if csrc is not None:
        return f"the kernels of the checkout {csrc.parent} are not built; `pip install .` builds them where CUDA is"
    return (
        "the package was installed without kernels, as no CUDA toolkit was found or FUSED_SEPCONV_CUDA was 0; "
        "install again with CUDA_HOME set to a toolkit, and with FUSED_SEPCONV_CUDA=1 to be told what is missing"
    )


def _suffixes() -> list[str]:
    return importlib.machinery.EXTENSION_SUFFIXES


def _module_file(folder: Path) -> Path | None:
    """The native module for this Python in `folder`."""
    files = (folder / f"_native{suffix}" for suffix in _suffixes())
    return next((file for file in files if file.is_file()), None)


def _installed_folders() -> list[Path]:
    """Where installed distributions of this package keep their native module.

    There may be several: the metadata that a build leaves in the checkout hides the installed one's from a search that
    ends at the first.
    """
    found = importlib.metadata.distributions(name="fused_sepconv")
    folders = dict.fromkeys(Path(str(item.locate_file("fused_sepconv/native/lib"))).resolve() for item in found)
    return [folder for folder in folders if folder != _PACKAGE / "lib"]


def _import(file: Path) -> ModuleType:
    """Imports an extension module from a file of any name. Its own name carries its folder: pybind11 knows modules by
    name, and would give the first again for another file of the same one."""
    name = f"{file.parent}._native"
    loader = importlib.machinery.ExtensionFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
