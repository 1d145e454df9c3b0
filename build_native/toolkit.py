"""Finds the CUDA toolkit and chooses the architectures to compile for, without asking for a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

OLDEST_NVCC = (12, 1)  # has all intrinsics that csrc/ uses; 11.8 fails in the middle of the build
DEFAULT_ARCHITECTURES = ("80", "90", "100", "120")
# Machine code runs on its own major version: 80 runs on 8.6 and 8.9, 100 on 10.3, 120 on 12.1. PTX runs on every newer
# GPU: 100's also on 11.0, which has no machine code here, where 120's would leave it with nothing.
PORTABLE = "100"
OLDEST_ARCHITECTURE = 80  # has cp.async and mma.sync in bfloat16
CONVENTIONAL_ROOT = Path("/usr/local/cuda")
REMEDIES = (
    "set CUDA_HOME to a CUDA toolkit (the folder with bin/nvcc and include/cuda_runtime.h), or install one from "
    "https://developer.nvidia.com/cuda-downloads, or unset FUSED_SEPCONV_CUDA to install without kernels"
)


class BuildError(Exception):
    """The native module can't be built, for a reason that the user can read and act on."""


@dataclass(frozen=True)
class Toolkit:
    """The three places in a CUDA toolkit that a build needs."""

    nvcc: Path
    include: Path
    library: Path  # the folder of libcudart_static.a

    @classmethod
    def at(cls, root: Path) -> Toolkit:
        """The toolkit whose top folder is `root`; ValueError says what is missing there."""
        nvcc = root / "bin" / "nvcc"
        if not os.access(nvcc, os.X_OK):
            raise ValueError(f"{root} has no bin/nvcc")
        includes = [root / "include", *root.glob("targets/*/include")]
        include = next((folder for folder in includes if (folder / "cuda_runtime.h").is_file()), None)
        if include is None:
            raise ValueError(f"{root} has no include/cuda_runtime.h")
        libraries = [root / "lib64", root / "lib", *root.glob("targets/*/lib"), *root.glob("lib/*-linux-gnu")]
        library = next((folder for folder in libraries if (folder / "libcudart_static.a").is_file()), None)
        if library is None:
            raise ValueError(f"{root} has no libcudart_static.a")
        return cls(nvcc, include, library)

    @classmethod
    def usable_at(cls, root: Path) -> Toolkit:
        """The toolkit whose top folder is `root`, new enough; ValueError says what is missing there."""
        toolkit = cls.at(root)
        release = toolkit.version()
        if tuple(map(int, release.split("."))) < OLDEST_NVCC:
            raise ValueError(f"{root} has nvcc {release}, older than {'.'.join(map(str, OLDEST_NVCC))}")
        return toolkit

    def version(self) -> str:
        """The release that nvcc names, such as "13.0"."""
        output = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release (\d+\.\d+)", output)
        if found is None:
            raise BuildError(f"{self.nvcc} --version names no release: {output.strip()!r}")
        return found[1]

    def compresses(self) -> bool:
        """Whether nvcc can make the fat binary as small as can be (--compress-mode, since 12.8)."""
        run = subprocess.run([self.nvcc, "--help"], capture_output=True, text=True)
        return "--compress-mode" in run.stdout

    def known_architectures(self) -> set[int]:
        """The numbers that `nvcc --list-gpu-arch` prints."""
        output = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        return {int(number) for number in re.findall(r"compute_(\d+)", output)}


def toolkit_roots(environ: Mapping[str, str], conventional: Path) -> Iterator[tuple[str, Path | None]]:
    """The places to look for a toolkit, best first: a name to tell the user, and the folder if there is one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        yield variable, Path(environ[variable]) if environ.get(variable) else None
    yield "the conventional place", conventional
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    yield "nvcc on PATH", Path(nvcc).resolve().parent.parent if nvcc else None
    if nvcc:
        yield "where nvcc on PATH leads", root_by_dryrun(nvcc, environ)


def root_by_dryrun(nvcc: str, environ: Mapping[str, str]) -> Path | None:
    """The toolkit that an nvcc on PATH belongs to in its own words, as it may be a script that runs another nvcc."""
    with tempfile.TemporaryDirectory() as scratch:  # a dry run leaves temporary files behind too
        command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
        try:
            run = subprocess.run(command, capture_output=True, text=True, env={**environ, "TMPDIR": scratch})
        except OSError:
            return None
    top = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


def find_toolkit(environ: Mapping[str, str], conventional: Path = CONVENTIONAL_ROOT) -> Toolkit:
    """The first complete toolkit; LookupError tells, for each place, why there is none."""
    refused = []
    for name, root in toolkit_roots(environ, conventional):
        if root is None:
            refused.append(f"{name}: none")
            continue
        try:
            return Toolkit.usable_at(root)
        except ValueError as missing:
            refused.append(f"{name}: {missing}")
    raise LookupError("no CUDA toolkit found (" + "; ".join(refused) + ")")


def choose_toolkit(environ: Mapping[str, str], conventional: Path = CONVENTIONAL_ROOT) -> tuple[Toolkit | None, str]:
    """The toolkit to build with, or None and the reason why the package is installed without kernels."""
    switch = environ.get("FUSED_SEPCONV_CUDA", "")
    if switch not in ("", "0", "1"):
        raise BuildError(f"FUSED_SEPCONV_CUDA must be 0 or 1 or unset, not {switch!r}")
    if switch == "0":
        return None, "FUSED_SEPCONV_CUDA=0"
    try:
        return find_toolkit(environ, conventional), ""
    except LookupError as missing:
        if switch == "1":
            raise BuildError(f"FUSED_SEPCONV_CUDA=1, but {missing.args[0]}. Remedies: {REMEDIES}.") from None
        return None, missing.args[0]


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture to compile for: "90" is machine code, with `ptx` also portable code for later GPUs."""

    name: str
    ptx: bool = False

    def __str__(self) -> str:
        return self.name + ("+PTX" if self.ptx else "")

    @property
    def number(self) -> int:
        return int(self.name.rstrip("af"))

    def flags(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{self.name},code=sm_{self.name}"]
        if self.ptx:  # of the plain architecture, as PTX of 90a runs on no later GPU
            flags.append(f"-gencode=arch=compute_{self.number},code=compute_{self.number}")
        return flags


# The generations that PyTorch's list may name, as far as the kernels run there.
GENERATIONS = {"ampere": "80;86", "ada": "89", "hopper": "90", "blackwell+tegra": "110", "blackwell": "100;103;120;121"}


def parse_architectures(text: str, variable: str = "FUSED_SEPCONV_ARCHS") -> list[Architecture]:
    """Reads "80;90" or "8.0,9.0+PTX"."""
    architectures = []
    for item in filter(None, (item.strip() for item in re.split("[;,]", text))):
        found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item, re.IGNORECASE)
        if found is None:
            raise BuildError(
                f'{variable}: {item!r} is no architecture. Name each by its number, as in "80;90;100+PTX" '
                "('native' and the like are not supported, as a build never asks for a GPU)"
            )
        architectures.append(Architecture(found[1] + found[2] + found[3].lower(), ptx=found[4] is not None))
    return list(dict.fromkeys(architectures))


def pytorch_architectures(text: str) -> list[Architecture]:
    """Reads PyTorch's TORCH_CUDA_ARCH_LIST: "7.5;8.0 9.0+PTX" or "Ampere;Hopper+PTX". Drops what is too old for the
    kernels: the list is often one for all extensions of a machine."""
    variable, numbers = "TORCH_CUDA_ARCH_LIST", []
    for item in re.split(r"[;,\s]+", text.strip()):
        name, ptx = re.fullmatch(r"(.*?)(\+PTX)?", item, re.IGNORECASE).groups()
        named = GENERATIONS.get(name.lower(), name).split(";")
        numbers += [*named[:-1], named[-1] + (ptx or "")]
    listed = parse_architectures(";".join(numbers), variable)
    chosen = [architecture for architecture in listed if architecture.number >= OLDEST_ARCHITECTURE]
    if listed and not chosen:
        raise BuildError(
            f"{variable} is {text!r}, but the kernels need {OLDEST_ARCHITECTURE} or newer. FUSED_SEPCONV_ARCHS names "
            "others than PyTorch's, FUSED_SEPCONV_CUDA=0 installs without kernels"
        )
    return chosen


def choose_architectures(environ: Mapping[str, str], known: set[int]) -> list[Architecture]:
    """Architectures by FUSED_SEPCONV_ARCHS, TORCH_CUDA_ARCH_LIST, or the default list as far as nvcc knows it."""
    listed = ", ".join(map(str, sorted(known)))
    variable = "FUSED_SEPCONV_ARCHS"
    chosen = parse_architectures(environ.get(variable, ""))
    if not chosen:
        variable = "TORCH_CUDA_ARCH_LIST"
        chosen = pytorch_architectures(environ.get(variable, ""))
    if chosen:
        if unknown := [architecture.name for architecture in chosen if architecture.number not in known]:
            raise BuildError(f"{variable}: this nvcc does not know {', '.join(unknown)}; it knows {listed}")
        return chosen
    names = [name for name in DEFAULT_ARCHITECTURES if int(name) in known]
    if not names:
        raise BuildError(f"this nvcc knows none of {', '.join(DEFAULT_ARCHITECTURES)} (it knows {listed})")
    portable = PORTABLE if PORTABLE in names else names[-1]
    return [Architecture(name, ptx=name == portable) for name in names]
