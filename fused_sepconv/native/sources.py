"""The fingerprint of `csrc/`, which ties a native module to the sources that it was compiled from.

The build stamps the module with it, and the package compares it when it runs from a checkout. This file is the one
definition for both: setup.py loads it by path, so it must import neither torch nor the rest of the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = frozenset({".h", ".cuh", ".cu", ".cpp"})


def checkout_csrc() -> Path | None:
    """The `csrc/` folder beside this package, or None where the package is installed without its sources."""
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    return csrc if (csrc / "params.h").is_file() else None


def digest(csrc: Path) -> str:
    """A hex digest of the relative paths and contents of every C++ and CUDA source below `csrc`."""
    sources = {path.relative_to(csrc).as_posix(): path for path in csrc.rglob("*") if path.suffix in SUFFIXES}
    total = hashlib.sha256()
    for name, path in sorted(sources.items()):
        # Each file is hashed by itself, so that no text can pass for the end of one file and the name of the next.
        total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]
