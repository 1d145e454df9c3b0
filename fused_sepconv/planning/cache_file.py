"""The file that choices are remembered in from process to process: data only, of one environment.

Processes share it: writers take turns and lose nothing of one another's, readers see the old file or the new one, and
`measuring` lets one process at a time measure a problem.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Seconds = dict[str, float]  # seconds that the candidates of a problem took, by `choice.identity`


class Content(NamedTuple):
    measurements: dict[str, Seconds]  # by problem
    excluded: dict[str, str]  # why a candidate must not run, by what `choice` calls it


def folder() -> Path | None:
    """`fused_sepconv/` in the user's cache directory, as the XDG base directories have it; None without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "fused_sepconv"
    try:
        return Path.home() / ".cache" / "fused_sepconv"
    except RuntimeError:
        return None


class CacheFile:
    """{"environment": {...}, "measurements": {problem: {candidate: seconds}}, "excluded": {candidate: reason}}.

    Its name carries the environment, so that versions and GPUs do not touch one another's. What it can't use of a file
    it takes for not there.
    """

    def __init__(self, folder: Path, environment: Mapping[str, Any]) -> None:
        self._environment = dict(environment)
        text = json.dumps(self._environment, sort_keys=True)
        gpu = re.sub(r"\W+", "-", str(self._environment.get("gpu")))
        self.path = folder / f"autotune-{gpu}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
        self._parsed: tuple[tuple[int, ...], Content] | None = None

    def read(self) -> Content:
        """Its content; empty where there is no file, or where it is damaged or of another environment."""
        try:
            status = os.stat(self.path)
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._parsed is None or self._parsed[0] != version:
                self._parsed = version, self._content(json.loads(self.path.read_text(encoding="utf-8")))
            return self._parsed[1]
        except (OSError, ValueError, RecursionError):
            return Content({}, {})

    def _content(self, data: Any) -> Content:
        if not isinstance(data, dict) or data.get("environment") != self._environment:
            return Content({}, {})
        measurements, excluded = (
            found if isinstance(found, dict) else {} for found in (data.get("measurements"), data.get("excluded"))
        )
        return Content(
            {problem: seconds for problem, seconds in measurements.items() if _are_seconds(seconds)},
            {candidate: reason for candidate, reason in excluded.items() if isinstance(reason, str)},
        )

    def add(self, measurements: Mapping[str, Seconds] = {}, excluded: Mapping[str, str] = {}) -> None:
        """Writes these too; an OSError says why it can't."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A writer that was stopped while it held the lock must not stop the others: what is lost is measured again.
        with self._locked(0, patience=1.0):
            old = self.read()
            content = {
                "environment": self._environment,
                "measurements": {**old.measurements, **measurements},
                "excluded": {**old.excluded, **excluded},
            }
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                os.replace(name, self.path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise

    @contextmanager
    def measuring(self, problem: str, patience: float) -> Iterator[None]:
        """Keeps other processes from measuring a problem meanwhile; goes on without after so many seconds."""
        with self._locked(1 + int(hashlib.sha256(problem.encode()).hexdigest()[:7], 16), patience):
            yield

    @contextmanager
    def _locked(self, byte: int, patience: float) -> Iterator[None]:
        """A lock on one byte of a file beside this one; none where the file system has no locks.

        An "open file description" lock: unlike those of a process it also keeps threads apart, and is not lost when
        another handle of the file is closed.
        """
        handle = None
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):
                with suppress(OSError):
                    self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    handle = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
                    _lock(handle, byte, time.monotonic() + patience)
            yield
        finally:
            if handle is not None:
                os.close(handle)


def _lock(handle: int, byte: int, until: float) -> object:
    while True:
        try:
            # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid.
            return fcntl.fcntl(
                handle, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            )
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= until:
                return None
            time.sleep(0.01)


def _are_seconds(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(type(seconds) is float and 0 < seconds < math.inf for seconds in value.values())
    )
