"""The emulator itself: primitives against NumPy, correct kernels in every schedule, planted bugs that it must see."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.cuda_on_cpu.build import ROOT, build_module
from tests.cuda_on_cpu.conformance import vectors

pytestmark = pytest.mark.quick

KERNELS = Path("tests/cuda_on_cpu/test_kernels")
SCHEDULES = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]


def load(flavour: str) -> ModuleType:
    sources = [KERNELS / "execution.cu", KERNELS / "primitives.cu"]
    path = build_module("_emulator_tests", sources, [KERNELS / "bind.cpp"], flavour)
    # pybind11 keeps modules by name, so the two builds need two names in one process.
    spec = importlib.util.spec_from_file_location(f"{flavour}._emulator_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    return load("plain")


@pytest.fixture(scope="module")
def checked() -> ModuleType:
    return load("checked")


@pytest.fixture(params=["plain", "checked"])
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    module = request.getfixturevalue(request.param)
    module.reset_counters()
    yield module
    module.set_schedule("forward")


@pytest.fixture(params=SCHEDULES, ids=lambda schedule: f"{schedule[0]}{schedule[1]}")
def scheduled(module: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    module.set_schedule(*request.param)
    return module


def lines_of(kernel: str, mark: str = "BUG") -> list[str]:
    """Where the sources say that a report about `kernel` must point: "file:line" of every marked line."""
    path = KERNELS / "execution.cu"
    pattern = re.compile(rf"// {mark} {kernel}$")
    lines = (ROOT / path).read_text().splitlines()
    return [f"{path}:{number}" for number, line in enumerate(lines, 1) if pattern.search(line)]


# ---- primitives against NumPy


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_vectors_move_whole(scheduled: ModuleType, random: np.random.Generator, size: int) -> None:
    source = random.integers(0, 1 << 16, 32 * size // 2, np.uint16)
    copy = np.zeros_like(source)
    scheduled.run(f"copy_{size}_bytes", [source, copy], "io")
    assert (copy == source).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_async_copy_fills_with_zeros(scheduled: ModuleType, random: np.random.Generator, size: int) -> None:
    source = random.integers(1, 256, (2, 32, size), np.uint8)
    copy = np.zeros_like(source)
    scheduled.run(f"async_copy_{size}", [source, copy], "io")
    expected = source.copy()
    expected[:, ::3] = 0
    assert (copy == expected).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(scheduled: ModuleType, random: np.random.Generator, transposed: bool) -> None:
    matrices = random.integers(0, 1 << 16, (4, 8, 8), np.uint16)
    fragments = np.zeros((32, 4), np.uint32)
    scheduled.run("ldmatrix_x4" + "_trans" * transposed, [matrices, fragments], "io")
    rows = matrices.transpose(0, 2, 1) if transposed else matrices
    pairs = np.ascontiguousarray(rows).view(np.uint32)  # (matrix, group, place in the group)
    assert (fragments == pairs.reshape(4, 32).T).all()


def test_stmatrix(scheduled: ModuleType, random: np.random.Generator) -> None:
    matrices = random.integers(0, 1 << 16, (4, 8, 8), np.uint16)
    fragments = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32).T.copy()
    stored = np.zeros_like(matrices)
    scheduled.run("stmatrix_x4", [fragments, stored], "io")
    assert (stored == matrices).all()


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to bfloat16, to the nearest, ties to even; no NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("kernel", ["mma_m16n8k16_f16", "mma_m16n8k16_bf16", "mma_m16n8k8_tf32"])
def test_mma(scheduled: ModuleType, random: np.random.Generator, kernel: str) -> None:
    depth = 8 if kernel.endswith("tf32") else 16
    a, b = (random.standard_normal((rows, depth)).astype(np.float32) for rows in (16, 8))
    c = random.standard_normal((16, 8)).astype(np.float32)
    if kernel.endswith("tf32"):
        operands = [a, b]
        a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
    elif kernel.endswith("bf16"):
        operands = [bfloat16_bits(a), bfloat16_bits(b)]
        a, b = map(widened, operands)
    else:
        operands = [a.astype(np.float16), b.astype(np.float16)]
        a, b = (x.astype(np.float32) for x in operands)
    d = np.zeros_like(c)
    scheduled.run(kernel, [*operands, c, d], "iiio")
    np.testing.assert_allclose(d, a.astype(np.float64) @ b.T.astype(np.float64) + c, rtol=0, atol=1e-5)


SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519, 65520, 1e-8, 6e-8, 5.96e-8, 1e38, 1 + 2**-11, 3e38]
)


def test_float16_conversion_is_exact(module: ModuleType, random: np.random.Generator) -> None:
    values = np.concatenate([SPECIAL, random.standard_normal(500) * 10.0 ** random.integers(-9, 6, 500)])
    values = values.astype(np.float32)
    bits, back = np.zeros(len(values) // 2, np.uint32), np.zeros_like(values)
    module.run("convert_f16", [values, bits, back], "ioo", [len(values) // 2])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    expected_bits = np.where(np.isnan(values), 0x7FFF, expected.view(np.uint16))
    assert (bits.view(np.uint16) == expected_bits).all()
    np.testing.assert_array_equal(back, expected.astype(np.float32))


def test_bfloat16_conversion_is_exact(module: ModuleType, random: np.random.Generator) -> None:
    values = np.concatenate([SPECIAL, random.standard_normal(500) * 10.0 ** random.integers(-30, 30, 500)])
    values = values.astype(np.float32)
    bits, back = np.zeros(len(values) // 2, np.uint32), np.zeros_like(values)
    module.run("convert_bf16", [values, bits, back], "ioo", [len(values) // 2])
    expected_bits = np.where(np.isnan(values), 0x7FFF, bfloat16_bits(values))
    assert (bits.view(np.uint16) == expected_bits).all()
    np.testing.assert_array_equal(back, widened(expected_bits))


def test_tf32_rounds_ties_away_from_zero(module: ModuleType) -> None:
    unit = np.float32(2.0**-10)  # of tf32, between 1 and 2
    values = np.array([1, 1 + unit / 2, 1 + unit / 4, -1 - unit / 2, 1 + 3 * unit / 4, np.inf], np.float32)
    bits = np.zeros(len(values), np.uint32)
    module.run("convert_tf32", [values, bits], "io", [len(values)])
    expected = np.array([1, 1 + unit, 1, -1 - unit, 1 + unit, np.inf], np.float32)
    np.testing.assert_array_equal(bits.view(np.float32), expected)


@pytest.mark.parametrize(("kernel", "width"), [("float_32", 32), ("float_8", 8), ("double_32", 32)])
def test_warp_reductions(scheduled: ModuleType, random: np.random.Generator, kernel: str, width: int) -> None:
    values = random.standard_normal(32).astype(np.float64 if kernel.startswith("double") else np.float32)
    result = np.zeros(32, values.dtype)
    scheduled.run(f"reduce_{kernel}", [values, result], "io")
    groups = values.reshape(-1, width)
    np.testing.assert_allclose(result, groups.sum(1).repeat(width), rtol=1e-5)
    assert all(len(set(group)) == 1 for group in result.reshape(-1, width)), "the same bits in all lanes"


def test_exchange_between_lanes(scheduled: ModuleType) -> None:
    lanes = np.arange(32, dtype=np.int32)
    values = lanes * lanes
    result = np.zeros((32, 8), np.int32)
    scheduled.run("exchange", [values, result], "io")
    expected = [
        np.full(32, values[5]),
        values[lanes ^ 1],
        values[np.where(lanes + 3 < 32, lanes + 3, lanes)],
        values[np.where(lanes >= 3, lanes - 3, lanes)],
        np.full(32, -0x55555556),  # lanes with odd squares: 0xaaaaaaaa
        np.zeros(32),
        values[np.where(lanes % 8 < 7, lanes + 1, lanes)],
        values[lanes // 16 * 16 + 2],
    ]
    assert (result == np.stack(expected, 1)).all()


def test_named_barriers_carry_a_ring(scheduled: ModuleType, random: np.random.Generator) -> None:
    values = random.standard_normal((9, 64)).astype(np.float32)
    doubled = np.zeros_like(values)
    scheduled.run("ring", [values, doubled], "io", [9], threads=128)
    assert (doubled == 2 * values[:, ::-1]).all()


# ---- planted bugs

FLOATS = np.arange(512, dtype=np.float32)

# kernel: (arrays, roles, numbers, blocks, threads)
LAUNCHES = {
    "reverse_block": ([FLOATS, (512, "f4")], "io", [], 4, 128),
    "refill": ([FLOATS, (512, "f4")], "io", [], 1, 128),
    "swap_in_warp": ([FLOATS, (128, "f4")], "io", [], 1, 128),
    "wait_for_copy": ([FLOATS, (128, "f4")], "io", [], 1, 32),
    "abandon_copy": ([FLOATS], "i", [], 1, 32),
    "diverge_at_barrier": ([], "", [], 1, 128),
    "wait_for_ever": ([], "", [], 1, 128),
    "shuffle_in_branch": ([(32, "i4")], "o", [], 1, 32),
    "diverge_in_warp": ([(32, "i4")], "o", [], 1, 32),
    "read_garbage": ([(128, "f4")], "o", [], 1, 128),
    "add_to_garbage": ([(128, "f4")], "o", [], 1, 128),
    "read_past_end": ([FLOATS[:500].copy(), (512, "f4")], "io", [500], 4, 128),
    "write_past_end": ([(500, "f4")], "o", [500], 4, 128),
    "write_past_shared": ([], "", [], 1, 128),
    "misaligned_vector": ([FLOATS, (128, "f4")], "io", [], 1, 32),
    "misaligned_cast": ([FLOATS, (32, "f4")], "io", [], 1, 32),
    "sum_of_blocks": ([FLOATS, (16, "f4")], "ib", [], 16, 32),
    "hand_over": ([(2, "f4")], "b", [], 1, 128),
    "count_threads": ([(1, "i4")], "b", [], 4, 128),
    "write_to_input": ([FLOATS.copy()], "i", [], 1, 128),
    "too_little_shared": ([], "", [], 1, 128),
    "overflow_stack": ([(32, "i4")], "o", [], 1, 32),
    "index_past_array": ([(32, "f4")], "o", [], 1, 32),
}

# What the report says, where only instrumented accesses show the bug, and where every build sees it.
SEEN_WHEN_CHECKED = {
    "reverse_block": r"race in shared memory: read .* written by thread|read of uninitialised shared memory",
    "refill": r"race in shared memory: (write .* read|read .* written) by thread \d+ with no barrier between",
    "swap_in_warp": r"race in shared memory: read .* written by thread|read of uninitialised shared memory",
    "wait_for_copy": r"read of shared memory at byte \d+, where a cp.async has not been waited for",
    "read_garbage": r"thread 0 .*: read of uninitialised shared memory at byte 508",
    "add_to_garbage": r"read of uninitialised array 0 at byte \d+",
    "read_past_end": r"4-byte read out of bounds of global memory: \d+ bytes past the end of array 0 \(2000 bytes\)",
    "write_past_end": r"4-byte write out of bounds of global memory: \d+ bytes past the end of array 0 \(2000 bytes\)",
    "write_past_shared": r"thread 127 .*: 4-byte write out of bounds of shared memory: at byte 512 of 512",
    "misaligned_cast": r"misaligned 4-byte read of global memory, at 2 past a multiple of 4",
    "sum_of_blocks": r"race in array 1: read at byte 0, written by thread 0 of block \d+",
    "hand_over": r"race in array 0: (read|write) at byte 0",
    "count_threads": r"race in array 0: (read|write) at byte 0",
    "write_to_input": r"write to the input array 0 at byte \d+",
    "index_past_array": r"index 4 out of bounds of 'float \[4\]'",
}
SEEN_ALWAYS = {
    "abandon_copy": r"exits with 1 cp.async that it never waited for",
    "diverge_at_barrier": r"divergent __syncthreads: other threads wait at .*execution.cu:\d+",
    "wait_for_ever": r"deadlock, no thread can go on",
    "shuffle_in_branch": r"__reduce_add_sync: lane \d+ of mask ffffffff has exited|exits while other lanes wait for it",
    "diverge_in_warp": r"warp divergence: __shfl_xor_sync while other lanes wait in __shfl_xor_sync",
    "misaligned_vector": r"misaligned 16-byte read",
    "too_little_shared": r"uses 512 bytes of shared memory and was launched with 496",
    "overflow_stack": r"stack overflow: the thread uses more than \d+ bytes",
}


def launch(module: ModuleType, kernel: str, bug: int) -> list[np.ndarray]:
    arrays, roles, numbers, blocks, threads = LAUNCHES[kernel]
    arrays = [np.zeros(*array) if isinstance(array, tuple) else array for array in arrays]
    module.run(kernel, arrays, roles, numbers, blocks=blocks, threads=threads, bug=bug)
    return arrays


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_correct_kernels_pass(scheduled: ModuleType, kernel: str) -> None:
    launch(scheduled, kernel, bug=0)


def check_report(module: ModuleType, kernel: str, message: str) -> None:
    with pytest.raises(module.EmulatorError, match=message) as report:
        launch(module, kernel, bug=1)
    assert any(line in str(report.value) for line in lines_of(kernel)), str(report.value)


@pytest.mark.parametrize(("kernel", "message"), SEEN_ALWAYS.items(), ids=SEEN_ALWAYS.keys())
def test_bugs_that_every_build_sees(scheduled: ModuleType, kernel: str, message: str) -> None:
    check_report(scheduled, kernel, message)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule[0]}{schedule[1]}")
@pytest.mark.parametrize(("kernel", "message"), SEEN_WHEN_CHECKED.items(), ids=SEEN_WHEN_CHECKED.keys())
def test_bugs_that_the_checked_build_sees(
    checked: ModuleType, schedule: tuple[str, int], kernel: str, message: str
) -> None:
    checked.set_schedule(*schedule)
    check_report(checked, kernel, message)


def test_every_planted_bug_is_tested() -> None:
    assert set(LAUNCHES) == set(SEEN_WHEN_CHECKED) | set(SEEN_ALWAYS)


def test_deadlock_report_says_where_everyone_waits(module: ModuleType) -> None:
    with pytest.raises(module.EmulatorError) as report:
        launch(module, "wait_for_ever", bug=1)
    (named,), (all_threads,) = lines_of("wait_for_ever"), lines_of("wait_for_ever", "ALSO")
    assert str(report.value).splitlines() == [
        "wait_for_ever: deadlock, no thread can go on",
        f"    block 0, threads 0-63: waiting at a named barrier {named}",
        f"    block 0, threads 64-127: waiting at __syncthreads {all_threads}",
    ]


def test_plain_build_shows_missing_wait_as_nan(plain: ModuleType) -> None:
    assert np.isnan(launch(plain, "wait_for_copy", bug=1)[1]).all()


@pytest.mark.parametrize("bug", [0, 1])
def test_guard_page_stops_plain_build(plain: ModuleType, bug: int) -> None:
    guarded = np.frombuffer(plain.GuardedMemory(2000), np.float32)
    arguments = {"numbers": [500], "blocks": 4, "threads": 128, "bug": bug}
    if not bug:
        plain.run("write_past_end", [guarded], "o", **arguments)
        assert (guarded == 1).all()
        return
    with pytest.raises(plain.EmulatorError, match=r"thread 116 .*: illegal memory access") as report:
        plain.run("write_past_end", [guarded], "o", **arguments)
    assert lines_of("write_past_end")[0] in str(report.value)


def test_plain_build_goes_on_after_an_error(plain: ModuleType) -> None:
    with pytest.raises(plain.EmulatorError):
        launch(plain, "wait_for_ever", bug=1)
    assert (launch(plain, "reverse_block", bug=0)[1].reshape(4, 128) == FLOATS.reshape(4, 128)[:, ::-1]).all()


# ---- what is right


def test_results_of_correct_kernels(scheduled: ModuleType) -> None:
    turned = FLOATS.reshape(4, 128)[:, ::-1].reshape(-1)
    assert (launch(scheduled, "reverse_block", bug=0)[1] == turned).all()
    assert launch(scheduled, "count_threads", bug=0)[0] == 4 * 128
    np.testing.assert_allclose(launch(scheduled, "sum_of_blocks", bug=0)[1], FLOATS.reshape(16, 32).sum(1))


# ---- what is counted


def test_launches_are_counted_by_name(module: ModuleType) -> None:
    for _ in range(3):
        launch(module, "reverse_block", bug=0)
    launch(module, "refill", bug=0)
    assert module.executed() == {"reverse_block": 3, "refill": 1}
    module.reset_counters()
    assert module.executed() == {}


def test_checked_build_counts_bytes_by_buffer(checked: ModuleType) -> None:
    checked.reset_counters()
    launch(checked, "reverse_block", bug=0)
    counters = checked.counters()
    assert counters["bytes_read"] == {"array 0": 2048, "array 1": 0}
    assert counters["bytes_written"] == {"array 0": 0, "array 1": 2048}


@pytest.mark.parametrize(("pitch", "extra_cycles"), [(16, 0), (32, 4), (64, 12), (128, 28)])
def test_bank_conflicts_are_counted_by_line(module: ModuleType, pitch: int, extra_cycles: int) -> None:
    module.run("load_with_pitch", [np.zeros(32, np.uint32)], "o", [pitch])
    assert module.counters()["bank_conflicts"] == {lines_of("load_with_pitch")[0]: extra_cycles}


def test_both_builds_know_what_they_are(plain: ModuleType, checked: ModuleType) -> None:
    assert (plain.is_checked(), checked.is_checked()) == (False, True)


def test_order_is_checked(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="order must be"):
        module.set_schedule("sideways")


def test_impossible_launches_are_refused(module: ModuleType) -> None:
    with pytest.raises(module.EmulatorError, match="2000 threads a block"):
        module.run("reverse_block", [FLOATS], "i", threads=2000)
    with pytest.raises(module.EmulatorError, match="0 blocks"):
        module.run("reverse_block", [FLOATS], "i", blocks=0)


# ---- against a GPU


def compare(vector: vectors.Vector, outputs: list[np.ndarray]) -> None:
    for mine, theirs in zip(outputs, vector.outputs, strict=True):
        # A GPU's tensor cores cut off the low bits of what they add: 2^-21 of sums of some 16 here.
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 if vector.sums else 0, err_msg=vector.kernel)


def test_stored_conformance_vectors(module: ModuleType) -> None:
    """The outputs of a GPU, where `python -m tests.cuda_on_cpu.conformance` has stored some."""
    for vector in vectors.load():
        compare(vector, vector.run(module))


def test_conformance_vectors_keep_in_their_file(
    plain: ModuleType, checked: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "FILE", tmp_path / "vectors.npz")
    assert vectors.load() == []
    made = [dataclasses.replace(vector, outputs=vector.run(plain)) for vector in vectors.make()]
    vectors.save(made, "no GPU")
    loaded = vectors.load()
    assert [vector.kernel for vector in loaded] == [vector.kernel for vector in made]
    for vector in loaded:
        compare(vector, vector.run(checked))
