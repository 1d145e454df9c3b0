"""Builds emulated device code into Python modules, with g++ alone: no nvcc, no GPU."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path("tests/cuda_on_cpu")  # paths are relative to ROOT, so that messages name files as the repository does
BUILD = Path("build/cuda_on_cpu")

COMMON_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-g1",  # line tables: reports name lines
    "-gno-column-info",  # and nothing else: objects of the same code are then the same
    "-fvisibility=hidden",
    "-march=haswell",  # half conversions (F16C) and FMA
    "-fno-strict-aliasing",  # kernels reinterpret vectors of one type as another
    "-DFSC_EMULATED",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-ffile-prefix-map=$$PWD=.",  # the shell's: a copy of the checkout then has the same commands, and its objects hold
]
# One instrumented access for one access of the source: merged or vectorised ones would blur sizes and alignments.
CHECKED_FLAGS = ["-fsanitize=thread,bounds", "-fno-tree-vectorize", "-fno-store-merging", "-Wno-tsan"]

# -O2 takes twice as long to compile and runs no test faster.
KERNEL_FLAGS = {"plain": ["-O1"], "checked": ["-O1", *CHECKED_FLAGS]}

# One header of each of the packages that CUDA's headers come in.
CUDA_HEADERS = ["vector_types.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h", "nv/target"]


def cuda_include_folders() -> list[Path]:
    """Folders that together hold CUDA's headers: a toolkit's, or those of the nvidia-cuda-* packages of PyPI."""
    toolkits = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    toolkits.append(Path("/usr/local/cuda"))
    for toolkit in toolkits:
        if folders := _folders_with_headers([toolkit / "include", toolkit / "include/cccl"]):
            return folders
    packages = [Path(path) / "nvidia" for path in sys.path]
    if folders := _folders_with_headers(
        [folder for nvidia in packages for folder in sorted(nvidia.glob("**/include")) + sorted(nvidia.glob("**/cccl"))]
    ):
        return folders
    raise RuntimeError(
        "CUDA's headers were not found in CUDA_HOME, /usr/local/cuda or the installed packages: "
        "pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def _folders_with_headers(candidates: Iterable[Path]) -> list[Path]:
    """The folders among the candidates that have the headers, each header's first; none if one header has no folder."""
    folders: list[Path] = []
    available = [folder for folder in candidates if folder.is_dir()]
    for header in CUDA_HEADERS:
        holder = next((folder for folder in available if (folder / header).is_file()), None)
        if holder is None:
            return []
        if holder not in folders:
            folders.append(holder)
    return folders


def build_native(flavour: str = "plain") -> Path:
    """Builds the emulated twin of the package's native module, "plain", "checked" or "null"; returns its absolute path.

    A launch of the null build is counted and runs nothing.
    """
    kernels = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").glob("*/*.cu"))
    return build_module("_native", kernels, [Path("csrc/bindings.cpp")], flavour)


def build_module(name: str, kernel_sources: list[Path], host_sources: list[Path], flavour: str = "plain") -> Path:
    """Builds a Python module of device code and its host code, where their sources or the emulator's have changed.

    The checked build instruments every memory access of `kernel_sources`. Sources are relative to the repository.
    """
    target = BUILD / flavour / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    folder = ROOT / BUILD / flavour
    folder.mkdir(parents=True, exist_ok=True)
    ninja_file = folder / f"{name}.ninja"
    text = _ninja_text(target, name, kernel_sources, host_sources, flavour)
    with open(ROOT / BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not expect a second one in its folder
        if not ninja_file.exists() or ninja_file.read_text() != text:
            ninja_file.write_text(text)
        command = [sys.executable, "-m", "ninja", "--quiet", "-f", str(ninja_file)]
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"building {target} failed:\n{result.stdout}")
    if result.stdout:
        print(result.stdout, file=sys.stderr)
    return ROOT / target


def _ninja_text(target: Path, name: str, kernel_sources: list[Path], host_sources: list[Path], flavour: str) -> str:
    includes = [EMULATOR, Path("csrc"), *cuda_include_folders(), Path(pybind11.get_include())]
    includes.append(Path(sysconfig.get_paths()["include"]))
    flags = [*COMMON_FLAGS, *(f"-I{folder}" for folder in includes[:2]), *(f"-isystem {f}" for f in includes[2:])]
    lines = [
        f"builddir = {BUILD}",  # one log for all modules, as they share the emulator's objects
        f"flags = {' '.join(flags)}",
        "rule compile",
        f"  command = {os.environ.get('CXX', 'g++')} $flags $more -MMD -MF $out.d -x c++ -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d",
        "rule link",
        f"  command = {os.environ.get('CXX', 'g++')} -shared -o $out $in -lpthread -ldl",
        "  description = $out",
    ]
    objects: list[Path] = []

    def compile_each(sources: Iterable[Path], folder: Path, more: list[str]) -> None:
        for source in sources:
            object_file = folder / source.with_suffix(".o")
            lines.extend([f"build {object_file}: compile {source}", f"  more = {' '.join(more)}"])
            objects.append(object_file)

    runtime = sorted(path.relative_to(ROOT) for path in (ROOT / EMULATOR / "runtime").glob("*.cpp"))
    # The emulator and host code are never instrumented, and their objects serve all modules.
    null = flavour == "null"
    kernels = "plain" if null else flavour
    compile_each(kernel_sources, BUILD / kernels / name, KERNEL_FLAGS[kernels])
    compile_each([*host_sources, EMULATOR / "bind_emulator.cpp"], BUILD / "host", ["-O1"])
    compile_each([EMULATOR / "launches_run.cpp"], BUILD / flavour, ["-DFSC_NULL"] if null else [])
    compile_each(runtime, BUILD / "runtime", ["-O3"])
    lines += [f"build {target}: link {' '.join(map(str, objects))}", f"default {target}"]
    return "\n".join(lines) + "\n"
