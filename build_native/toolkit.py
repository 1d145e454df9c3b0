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

DEFAULT_ARCHITECTURES = ("80", "90a", "100", "120")
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

    def version(self) -> str:
        """The release that nvcc names, such as "13.0"."""
        output = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release (\d+\.\d+)", output)
        if found is None:
            raise BuildError(f"{self.nvcc} --version names no release: {output.strip()!r}")
        return found[1]

    def known_architectures(self) -> set[int]:
        """The numbers that `nvcc --list-gpu-arch` prints: it names 90 where it can compile for 90 and for 90a."""
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
            return Toolkit.at(root)
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
    """A GPU architecture to compile for: "90a" is machine code, with `ptx` also portable code for later GPUs."""

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


def parse_architectures(text: str) -> list[Architecture]:
    """Reads "80;90a" or "8.0,9.0a+PTX"."""
    architectures = []
    for item in filter(None, (item.strip() for item in re.split("[;,]", text))):
        found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item, re.IGNORECASE)
        if found is None:
            raise BuildError(
                f'FUSED_SEPCONV_ARCHS: {item!r} is no architecture. Name each by its number, as in "80;90a;100+PTX" '
                "('native' and the like are not supported, as a build never asks for a GPU)"
            )
        architectures.append(Architecture(found[1] + found[2] + found[3].lower(), ptx=found[4] is not None))
    return list(dict.fromkeys(architectures))


def choose_architectures(environ: Mapping[str, str], known: set[int]) -> list[Architecture]:
    """What FUSED_SEPCONV_ARCHS names, or the default list as far as nvcc knows it with PTX of the highest."""
    listed = ", ".join(map(str, sorted(known)))
    chosen = parse_architectures(environ.get("FUSED_SEPCONV_ARCHS", ""))
    if chosen:
        if unknown := [architecture.name for architecture in chosen if architecture.number not in known]:
            raise BuildError(f"FUSED_SEPCONV_ARCHS: this nvcc does not know {', '.join(unknown)}; it knows {listed}")
        return chosen
    chosen = [architecture for architecture in map(Architecture, DEFAULT_ARCHITECTURES) if architecture.number in known]
    if not chosen:
        raise BuildError(f"this nvcc knows none of {', '.join(DEFAULT_ARCHITECTURES)} (it knows {listed})")
    highest = max(chosen, key=lambda architecture: architecture.number)
    return [Architecture(item.name, ptx=item is highest) for item in chosen]
