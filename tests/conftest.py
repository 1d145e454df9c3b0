"""Where the tests run: every test that asks for ``target`` runs on each place there is.

The CPU is always there. A GPU joins by itself where PyTorch sees one, with each family of kernels by name; where there
is none the kernels run too, emulated on the CPU. All run the same tests. A test may also ask for

- ``dtype``: each dtype that the target computes in, or those of ``@pytest.mark.dtypes(...)`` among them; with
  ``@pytest.mark.gradients``, each that it has gradients in;
- ``case``: each case of ``@pytest.mark.cases(...)`` that the target can run in reasonable time.

What a target does not run is never collected, so nothing is ever skipped.

Tests of one family's kernels run emulated in either place: ``native`` is both builds in turn, ``plain`` and ``checked``
are one each. ``FAMILY`` in their file is whose kernels "fused" then runs, where they can.

Tests come in three tiers: ``pytest -m quick``, ``pytest`` (all but ``full``) and ``pytest -m full`` (the rest). A test
has its tier by a marker, or a part of its cases has: ``cases(..., quick=..., full=...)`` and ``checked_on``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fused_sepconv
import tests.support.torchvision_operators  # noqa: F401 - xdist imports the modules of warnings here, Lightning among them
from fused_sepconv.ops import launching
from tests.accuracy import allowing_tf32
from tests.support.cases import CASES, FEATURES, Case
from tests.support.emulation import emulated_kernels

EVERY_DTYPE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A device, the backend asked for there, and what it can do."""

    device: str
    backend: str
    dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE
    gradient_dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE
    patience: dict[torch.dtype, float] = field(default_factory=dict)  # multiplications of the largest case it runs
    family: str | None = None  # whose kernels "fused" runs, where they can
    layouts: tuple[torch.memory_format, ...] = (torch.contiguous_format,)  # of x, in the tests that go through them

    def __str__(self) -> str:
        return "-".join(filter(None, (self.device, self.backend, self.family)))

    def in_each_layout(self, x: Tensor) -> Iterator[Tensor]:
        """x, as a tensor of its own; an image without a batch has one layout."""
        for layout in self.layouts if x.dim() == 4 else self.layouts[:1]:
            yield x.detach().clone(memory_format=layout).requires_grad_(x.requires_grad)

    def runs(self, case: Case, dtype: torch.dtype) -> bool:
        return case.multiplications <= self.patience.get(dtype, math.inf)

    def runs_by_default(self, case: Case, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> bool:
        """Whether it is no repetition. On a CPU "auto" is PyTorch's convolutions in every dtype, held against them; the
        emulated kernels take two of the four dtypes by turns, and all of them in a case for each feature."""
        if case in FEATURES or self not in (LIBRARY, EMULATED):
            return True
        if self == LIBRARY:
            return dtype == torch.float64
        return len(dtypes) < 4 or dtypes.index(dtype) % 2 == len(case.name) % 2


# Device code is slow on the CPU: no case of more than a million multiplications.
EMULATED = Target("cpu", "fused", patience=dict.fromkeys(EVERY_DTYPE, 1e6))


# On most CPUs PyTorch has no fast 16-bit convolution: a full-size layer forward and back takes ten seconds.
LIBRARY = Target("cpu", "auto", patience={torch.float16: 1e7, torch.bfloat16: 1e7})


def targets() -> tuple[Target, ...]:
    found = [LIBRARY]
    if torch.cuda.is_available():
        # Layers at full size are tests/accuracy.py's: their oracle is the CPU's work.
        small = dict.fromkeys(EVERY_DTYPE, 2e7)
        forced = Target("cuda", "fused", patience=small, layouts=(torch.contiguous_format, torch.channels_last))
        families = (replace(forced, family=family) for family in ("simt", "split", "mma"))
        return (*found, Target("cuda", "auto", patience=small), *families)
    return (*found, EMULATED)


TARGETS = targets()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "cases(cases, quick=(), full=()): the cases that the test's `case` goes through; those of the quick tier among "
        "them, and more of the full one",
    )
    config.addinivalue_line(
        "markers", "checked_on(cases, plain=all): what the checked build goes through by default, and the plain one"
    )
    config.addinivalue_line("markers", "dtypes(*dtypes): the dtypes that the test's `dtype` goes through")
    config.addinivalue_line("markers", "gradients: only where the target has gradients")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    def marked(name: str) -> pytest.Mark | None:
        return metafunc.definition.get_closest_marker(name)

    wanted = [name for name in ("target", "dtype", "case") if name in metafunc.fixturenames]
    if not {"target", "case"} & set(wanted):
        return
    cases, tiers = (marked("cases").args[0], marked("cases").kwargs) if marked("cases") else (CASES, {})
    dtypes = marked("dtypes").args if marked("dtypes") else EVERY_DTYPE
    gradients = marked("gradients") is not None

    def rows() -> Iterator[tuple[Target, torch.dtype | None, Case | None]]:
        for target in TARGETS if "target" in wanted else (TARGETS[0],):
            able = target.gradient_dtypes if gradients else target.dtypes
            for dtype in (d for d in dtypes if d in able) if "dtype" in wanted else able[:1]:
                if "case" not in wanted:
                    yield target, dtype, None
                    continue
                for case in (*cases, *(case for case in tiers.get("full", ()) if case not in cases)):
                    if dtype is None or target.runs(case, dtype):
                        yield target, dtype, case

    def marks(target: Target, dtype: torch.dtype | None, case: Case | None) -> tuple[pytest.MarkDecorator, ...]:
        if case is None:
            return ()
        if case not in cases or ("target" in wanted and not target.runs_by_default(case, dtype, dtypes)):
            return (pytest.mark.full,)
        return (pytest.mark.quick,) if case in tiers.get("quick", ()) else ()

    columns = [("target", "dtype", "case").index(name) for name in wanted]
    values = []
    for row in rows():
        value_row = [row[column] for column in columns]
        name = "-".join(str(value).removeprefix("torch.") for value in value_row)
        values.append(pytest.param(*value_row, id=name, marks=marks(*row)))
    metafunc.parametrize(wanted, values, indirect=["target"] if "target" in wanted else False)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m quick`, a file without such a test: to import other people's networks takes half of the tier's time."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return not re.search(r"mark\.quick|quick=", collection_path.read_text()) or None
    return None


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("checked_on")
        if marker:
            by_default = marker.args[0] if item.callspec.params["native"] else marker.kwargs.get("plain")
            case = next((value for value in item.callspec.params.values() if isinstance(value, Case)), None)
            if by_default is not None and case not in by_default:
                item.add_marker(pytest.mark.full)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A place to run, its backend in force."""
    if request.param == EMULATED:
        with emulated_kernels(checked=False):
            yield request.param
    else:
        # float32 is strict, as it is on the CPU: for small problems cuDNN takes TF32 or not, as it likes.
        strict = allowing_tf32(False) if request.param.device == "cuda" else nullcontext()
        with strict, fused_sepconv.use_backend(request.param.backend), launching.preferring(request.param.family):
            yield request.param


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The cases are small: threads that wait for each other would cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """Modules are made in float64, where alike means alike."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "checked"])
def native(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with _emulated(request, request.param) as module:
        yield module
        module.set_schedule("forward", 0)


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with _emulated(request, checked=False) as module:
        yield module


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with _emulated(request, checked=True) as module:
        yield module


@contextmanager
def _emulated(request: pytest.FixtureRequest, checked: bool) -> Iterator[ModuleType]:
    with emulated_kernels(checked) as module, launching.preferring(getattr(request.module, "FAMILY", None)):
        yield module
