"""Which implementation a call asks for: the process-wide default that `use_backend` sets.

The default is read once, when a call is made, and travels from there as the op's `backend` argument: a backward runs
on another thread, possibly after the context has ended, and still does what its forward was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

BACKENDS = ("auto", "fused", "reference")

default = "auto"
"""The backend of a call made now: "auto", "fused" or "reference". Calls read it here, without a function's cost."""


def asks_the_plan(x: Tensor, backend: str) -> bool:
    """Whether a kernel could run: when it is asked for, or on a GPU; on the CPU a well-kept library beats our own."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    return backend == "fused" or (backend == "auto" and x.is_cuda)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the context, calls of this process run on `backend`.

    - "auto": on a GPU the fastest, as measured there from a problem's third call on, until then as predicted; PyTorch's
      own convolutions elsewhere, and where no kernel serves.
    - "fused": this package's kernels; raises, with the reason, where none serves.
    - "reference": PyTorch's own two convolutions.

    Like PyTorch's own backend flags it is one setting for all threads: contexts of several threads that overlap leave
    whichever default the last of them to end had found.
    """
    global default
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected one of {BACKENDS}, got {type(backend).__name__} {backend!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    previous, default = default, backend
    try:
        yield
    finally:
        default = previous
