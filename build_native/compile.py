"""Writes a ninja file for the native module and runs it.

bindings.cpp is the only source that the host compiler and pybind11 see; every csrc/*/*.cu goes to nvcc. Objects
depend on the headers that their compiler reports, so a change of one file compiles that file and links.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from .resources import Report, add_readable_names, merge, parse_ptxas
from .toolkit import BuildError, Toolkit, choose_architectures

ROOT = Path(__file__).resolve().parent.parent
REPORT_NAME = "_native_resources.json"

NINJA_FILE = """\
# Written by setup.py. To run it by hand: ninja -C <this folder>
cxx = {cxx}
nvcc = {nvcc}
cxxflags = {cxxflags}
nvccflags = {nvccflags}
ldflags = {ldflags}

rule cxx
  command = $cxx $cxxflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = g++ $in

# The log keeps what ptxas says about each kernel, for the resource report; only the other lines are shown.
rule nvcc
  command = $nvcc $nvccflags -MD -MF $out.d -c $in -o $out > $out.log 2>&1; $
      status=$$?; grep -v -e '^ptxas info' -e 'bytes stack frame' $out.log; exit $$status
  depfile = $out.d
  deps = gcc
  description = nvcc $in

rule link
  command = $cxx -shared $in -o $out $ldflags
  description = link $out

{objects}
build _native.so: link {inputs}
default _native.so
"""

# Every macro but the last is a literal. The sources' digest changes with every edit, so it is compiled on its own and
# bindings.cpp, which takes long to compile, only refers to it.
BUILD_INFO_HEADER = """\
#pragma once
#define FUSED_SEPCONV_VERSION "{version}"
#define FUSED_SEPCONV_ARCHITECTURES "{architectures}"
#define FUSED_SEPCONV_NVCC "{nvcc}"
extern const char* const fused_sepconv_sources;
#define FUSED_SEPCONV_SOURCES fused_sepconv_sources
"""
BUILD_INFO_SOURCE = """\
#include "build_info.h"
const char* const fused_sepconv_sources = "{digest}";
"""


def sources_digest(csrc: Path) -> str:
    """The digest of fused_sepconv/native/sources.py, loaded by path because the package itself imports torch."""
    spec = importlib.util.spec_from_file_location("_sources", ROOT / "fused_sepconv" / "native" / "sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest(csrc)


def kernel_sources(csrc: Path) -> list[Path]:
    """The sources that nvcc compiles."""
    return sorted(csrc.glob("*/*.cu"))


def jobs(environ: Mapping[str, str]) -> int:
    """How many compilers run at a time: MAX_JOBS, or one a processor."""
    text = environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        raise BuildError(f"MAX_JOBS must be a positive whole number, not {text!r}")
    return int(text)


def write_if_changed(path: Path, text: str) -> None:
    """Leaves the time of a file alone whose text is the same already, as ninja goes by times."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def ninja_path(path: Path | str) -> str:
    """A path as ninja reads it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_words(*words: str) -> str:
    """Words of a command as ninja's shell reads them."""
    return shlex.join(words).replace("$", "$$")


def ninja_file(csrc: Path, toolkit: Toolkit, gencode: list[str], pybind11: str, environ: Mapping[str, str]) -> str:
    """The text of build.ninja, which makes `_native.so` in the folder that ninja runs in."""
    includes = [csrc, toolkit.include, pybind11, sysconfig.get_path("include")]
    cxx = environ.get("CXX") or "c++"
    # bindings.cpp first: it takes long, and at the end the other processors would wait for it.
    objects = {"bindings.cpp.o": ("cxx", csrc / "bindings.cpp"), "build_info.cpp.o": ("cxx", "build_info.cpp")}
    objects |= {f"{source.relative_to(csrc)}.o": ("nvcc", source) for source in kernel_sources(csrc)}
    return NINJA_FILE.format(
        cxx=cxx,
        nvcc=ninja_words(str(toolkit.nvcc)),
        cxxflags=ninja_words(
            *["-O2", "-std=c++17", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"],
            *["-include", "build_info.h", *(f"-I{include}" for include in includes)],
        ),
        nvccflags=ninja_words(
            *["-O3", "-std=c++17", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"],
            # Without -lineinfo, which makes the module larger: NVCC_APPEND_FLAGS=-lineinfo adds it, so that profilers
            # and compute-sanitizer name source lines.
            *(["--compress-mode=size"] if toolkit.compresses() else ["-Xfatbin=-compress-all"]),
            *[f"-I{csrc}", *gencode],
            # nvcc's host compiler is the one that the user chose, unless that is more than a compiler's name.
            *([f"-ccbin={cxx}"] if "CXX" in environ and " " not in cxx else []),
        ),
        # The process may hold another CUDA runtime, torch's: --exclude-libs binds this module's calls to its own.
        ldflags=ninja_words(
            *[f"-L{toolkit.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"],
        ),
        objects="\n".join(
            f"build {ninja_path(target)}: {rule} {ninja_path(source)}" for target, (rule, source) in objects.items()
        ),
        inputs=" ".join(map(ninja_path, objects)),
    )


def run_ninja(folder: Path, jobs: int, environ: Mapping[str, str]) -> int:
    """Builds what is out of date with `jobs` processes in all; returns ninja's exit status.

    Where fewer sources than that wait for nvcc, each nvcc compiles several architectures at a time. It learns so from
    the environment: as a part of its command, the number would make every object out of date.
    """
    ninja = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(jobs)]
    plan = subprocess.run([*ninja, "-n"], capture_output=True, text=True).stdout
    waiting = sum(" nvcc " in line for line in plan.splitlines())
    threads = max(1, jobs // max(1, waiting))
    nvcc_flags = f"{environ.get('NVCC_APPEND_FLAGS', '')} --threads={threads}"
    return subprocess.run(ninja, env={**environ, "NVCC_APPEND_FLAGS": nvcc_flags}).returncode


def resource_report(csrc: Path, folder: Path) -> Report:
    """The report of ptxas on every kernel when its source was compiled, in this build or an earlier one."""
    logs = [(folder / f"{source.relative_to(csrc)}.o.log").read_text() for source in kernel_sources(csrc)]
    report = merge(map(parse_ptxas, logs))
    add_readable_names(report)
    return report


def build(csrc: Path, module: Path, folder: Path, toolkit: Toolkit, version: str, environ: Mapping[str, str]) -> None:
    """Compiles `csrc` in `folder` and puts the native module at `module`, its resource report beside it."""
    import pybind11  # a build requirement: here, so that the tests of all the rest need only Python

    architectures = choose_architectures(environ, toolkit.known_architectures())
    info = {
        "version": version,
        "architectures": ";".join(map(str, architectures)),
        "nvcc": toolkit.version(),
        "digest": sources_digest(csrc),
    }
    gencode = [flag for architecture in architectures for flag in architecture.flags()]
    print(f"fused_sepconv: compiling with {toolkit.nvcc} {info['nvcc']} for {info['architectures']}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    write_if_changed(folder / "build_info.h", BUILD_INFO_HEADER.format(**info))
    write_if_changed(folder / "build_info.cpp", BUILD_INFO_SOURCE.format(**info))
    write_if_changed(folder / "build.ninja", ninja_file(csrc, toolkit, gencode, pybind11.get_include(), environ))
    if run_ninja(folder, jobs(environ), environ) != 0:
        raise BuildError("the native module did not build, for the reason above (FUSED_SEPCONV_CUDA=0 leaves it out)")

    module.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "_native.so", module)
    report = json.dumps(resource_report(csrc, folder), indent=1, sort_keys=True)
    (module.parent / REPORT_NAME).write_text(report + "\n")
