"""What the conformance vectors are: for each primitive a kernel, its random inputs and, from a GPU, its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

FILE = Path(__file__).with_name("vectors.npz")


@dataclass(frozen=True)
class Vector:
    """One launch of one primitive's kernel: inputs first, then outputs, as test_kernels/primitives.cu takes them."""

    kernel: str
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]  # of the right shape and dtype; their contents are what a run wrote
    numbers: list[int] = field(default_factory=list)
    threads: int = 32

    def run(self, module: ModuleType) -> list[np.ndarray]:
        """The outputs that a module, emulated or on a GPU, computes from the inputs."""
        outputs = [np.zeros_like(output) for output in self.outputs]
        roles = "i" * len(self.inputs) + "o" * len(outputs)
        module.run(self.kernel, [*self.inputs, *outputs], roles, self.numbers, threads=self.threads)
        return outputs

    @property
    def sums(self) -> bool:
        """Whether the kernel sums in an order that the hardware does not tell."""
        return self.kernel.startswith("mma")


def make() -> Iterator[Vector]:
    """All vectors, with inputs drawn anew from one seed and outputs yet to be computed."""
    random = np.random.default_rng(20)

    def bits(*shape: int, dtype: type = np.uint16) -> np.ndarray:
        return random.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)

    def floats(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    for size in (4, 8, 16):
        source = bits(32 * size // 2)
        yield Vector(f"copy_{size}_bytes", [source], [np.zeros_like(source)])
        source = bits(2, 32, size, dtype=np.uint8)
        yield Vector(f"async_copy_{size}", [source], [np.zeros_like(source)])
    for suffix in ("", "_trans"):
        yield Vector(f"ldmatrix_x4{suffix}", [bits(4, 8, 8)], [np.zeros((32, 4), np.uint32)])
    yield Vector("stmatrix_x4", [bits(32, 4, dtype=np.uint32)], [np.zeros((4, 8, 8), np.uint16)])
    for _ in range(8):
        halves = [floats(16, 16).astype(np.float16), floats(8, 16).astype(np.float16)]
        yield Vector("mma_m16n8k16_f16", [*halves, floats(16, 8)], [floats(16, 8)])
        upper_halves = [(floats(rows, 16).view(np.uint32) >> 16).astype(np.uint16) for rows in (16, 8)]
        yield Vector("mma_m16n8k16_bf16", [*upper_halves, floats(16, 8)], [floats(16, 8)])
        yield Vector("mma_m16n8k8_tf32", [floats(16, 8), floats(8, 8), floats(16, 8)], [floats(16, 8)])
    any_float = bits(4096, dtype=np.uint32).view(np.float32)  # NaN, infinities and denormals among them
    for kernel in ("convert_f16", "convert_bf16"):
        usual = (floats(2048) * 10.0 ** random.integers(-9, 6, 2048)).astype(np.float32)
        values = np.concatenate([any_float, usual])
        outputs = [np.zeros(len(values) // 2, np.uint32), np.zeros_like(values)]
        yield Vector(kernel, [values], outputs, [len(values) // 2])
    yield Vector("convert_tf32", [any_float], [np.zeros(len(any_float), np.uint32)], [len(any_float)])
    for kernel in ("reduce_float_32", "reduce_float_8"):
        yield Vector(kernel, [floats(32)], [floats(32)])
    yield Vector("reduce_double_32", [random.standard_normal(32)], [np.zeros(32)])
    yield Vector("exchange", [bits(32, dtype=np.int32)], [np.zeros((32, 8), np.int32)])
    yield Vector("ring", [floats(9, 64)], [floats(9, 64)], [9], threads=128)


def save(vectors: list[Vector], device: str) -> None:
    arrays = {"device": np.array(device)}
    for index, vector in enumerate(vectors):
        name = f"{index:03d}/{vector.kernel}"
        arrays[f"{name}/numbers"] = np.array([vector.threads, *vector.numbers])
        for role, group in (("input", vector.inputs), ("output", vector.outputs)):
            arrays |= {f"{name}/{role}{i}": array for i, array in enumerate(group)}
    np.savez_compressed(FILE, **arrays)


def load() -> list[Vector]:
    """The stored vectors; none where no GPU has made them yet."""
    if not FILE.exists():
        return []
    vectors = []
    with np.load(FILE) as stored:
        names = sorted(key.removesuffix("/numbers") for key in stored.files if key.endswith("/numbers"))
        for name in names:
            groups = {
                role: [stored[key] for key in sorted(stored.files) if key.startswith(f"{name}/{role}")]
                for role in ("input", "output")
            }
            threads, *numbers = stored[f"{name}/numbers"].tolist()
            vectors.append(Vector(name.split("/")[1], groups["input"], groups["output"], numbers, threads))
    return vectors
