"""The SIMT family: every valid problem in every dtype, on the CUDA cores (csrc/simt/*.cuh)."""

from __future__ import annotations

from math import ceil

from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import (
    ELEMENT_BYTES,
    INT32_MAX,
    LAUNCH_SECONDS,
    LIBRARY_BANDWIDTH,
    TOO_LARGE,
    Candidate,
    DepthwiseProblem,
    Instance,
    Kernels,
    Problem,
    Splits,
    Work,
    combined,
    elementwise,
    slowest,
)

FMA_FRACTION = 0.35  # assumed, until measured: register tiles of 4 x 4 and taps read through L1, of the FMA peak
BLOCKS_PER_SM = 2  # what the launch bounds of the matrix products ask for; the lighter kernels hold more
SPLIT_PIXELS = 256  # fewest output pixels that are worth a part of their own in a split sum

# The SIMT family's block, `SimtTraits` in csrc/simt/product.cuh: a tile of 64 x 64, computed in slabs of 16.
TILE = 64
DEPTH = 16
THREADS = 256
_PLACE_BYTES = 16  # struct Place: where an output pixel lies
_PRODUCT_REGISTERS = 128  # a thread, for BLOCKS_PER_SM blocks an SM
_LIGHT_REGISTERS = 64  # for twice as many


def _instances() -> list[Instance]:
    instances = []
    for dtype in ELEMENT_BYTES:
        compute_bytes = 8 if dtype == "float64" else 4
        slab = DEPTH * 2 * (TILE + 4) * compute_bytes
        for layout in ("nhwc", "nchw"):
            resources = {
                "simt_forward": (slab + TILE * _PLACE_BYTES, _PRODUCT_REGISTERS),
                "simt_backward_intermediate": (slab + TILE * _PLACE_BYTES, _PRODUCT_REGISTERS),
                "simt_backward_input": (0, _LIGHT_REGISTERS),
                "simt_backward_depthwise_weight": (THREADS * compute_bytes, _LIGHT_REGISTERS),
                "simt_backward_pointwise_weight": (slab + DEPTH * _PLACE_BYTES, _PRODUCT_REGISTERS),
            }
            instances += [Instance(f"{name}_{dtype}_{layout}", THREADS, *taken) for name, taken in resources.items()]
        instances.append(Instance(f"reduce_splits_{dtype}", THREADS, 0, _LIGHT_REGISTERS))
    return instances


INSTANCES = {instance.name: instance for instance in _instances()}


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The fused forward, or a backward of one launch for each step of `BackwardParams` in csrc/params.h."""
    name = f"simt_{problem.direction}_{problem.dtype}_{problem.layout}"
    if refusal := _refusal(problem, name, device, kernels):
        return [Candidate("simt", name, refusal=refusal)]
    steps = _steps(problem, device)
    work = [_work(problem, device, *step) for step in steps]
    depthwise = pointwise = None
    if problem.direction == "backward":
        depthwise, pointwise = depthwise_splits(problem, device), _pointwise_splits(problem, device)
        work += [Work("reductions")] * 4
        if problem.activation:
            work.append(elementwise(device, 3 * problem.y_bytes))
    blocks = sum(blocks for _, blocks, _ in steps)
    return [
        Candidate(
            "simt",
            name,
            **combined(work),
            blocks=blocks,
            waves=blocks / _concurrent(device),
            shared_bytes=max(INSTANCES[instance].shared_bytes for instance in _needed(problem, name)),
            depthwise_splits=depthwise,
            pointwise_splits=pointwise,
        )
    ]


def _steps(problem: Problem, device: Device) -> list[tuple[int, int, int]]:
    """(device bytes, blocks, flops of a block) of each launch; whole tiles are computed, tails included."""
    x, t, y, weights = problem.x_bytes, problem.intermediate_bytes, problem.y_bytes, problem.weight_bytes
    channel_tiles, feature_tiles = ceil(problem.K / TILE), ceil(problem.F / TILE)
    pixel_tiles = ceil(problem.pixels / TILE)
    if problem.direction == "forward":
        # The depthwise part is done again for every slab of features.
        flops = 2 * TILE * problem.K * (TILE + problem.taps)
        return [(x + y * (2 if problem.residual else 1) + weights, pixel_tiles * feature_tiles, flops)]

    depthwise = depthwise_splits(problem, device)
    pointwise = _pointwise_splits(problem, device)
    compute_bytes = 8 if problem.dtype == "float64" else 4
    depthwise_partials = 2 * depthwise.parts * problem.K * (problem.taps + 1) * compute_bytes
    pointwise_partials = 2 * pointwise.parts * problem.F * (problem.K + 1) * compute_bytes
    intermediate = (
        y + t + weights + (x if problem.mid_activation else 0),
        pixel_tiles * channel_tiles,
        2 * TILE * TILE * (problem.F + (problem.taps if problem.mid_activation else 0)),
    )
    input_ = (
        t + x * (2 if problem.pre_activation else 1),
        ceil(problem.N * problem.C * problem.H * problem.W / THREADS),
        2 * THREADS * problem.taps * problem.multiplier,
    )
    depthwise_weight = (
        t + x + depthwise_partials,
        _depthwise_tiles(problem) * depthwise.parts,
        2 * depthwise.pixels_per_part * _depthwise_channels(problem) * (problem.taps + 1),
    )
    pointwise_weight = (
        y + x + weights + pointwise_partials,
        channel_tiles * feature_tiles * pointwise.parts,
        2 * pointwise.pixels_per_part * TILE * (TILE + problem.taps),
    )
    return [intermediate, input_, depthwise_weight, pointwise_weight]


def depthwise_splits(problem: Problem | DepthwiseProblem, device: Device) -> Splits:
    """How simt_backward_depthwise_weight cuts its sum over the pixels."""
    return _splits(problem, device, _depthwise_tiles(problem))


def _pointwise_splits(problem: Problem, device: Device) -> Splits:
    return _splits(problem, device, ceil(problem.K / TILE) * ceil(problem.F / TILE))


def _depthwise_channels(problem: Problem | DepthwiseProblem) -> int:
    """Channels of a block of simt_backward_depthwise_weight: `SimtDepthwiseWeightTraits::kChannels`."""
    return 32 if problem.layout == "nhwc" else 4


def _depthwise_tiles(problem: Problem | DepthwiseProblem) -> int:
    return ceil(problem.K / _depthwise_channels(problem))


def _concurrent(device: Device) -> int:
    return device.sms * BLOCKS_PER_SM


def _work(problem: Problem, device: Device, byte_count: int, blocks: int, block_flops: int) -> Work:
    """A launch: bytes or arithmetic, whichever takes longer; the last wave of blocks takes as long as a full one."""
    whole = ceil(blocks / _concurrent(device)) * _concurrent(device) * block_flops
    times = {
        "memory": byte_count / (device.bandwidth * LIBRARY_BANDWIDTH),
        "arithmetic": whole / (device.fma(problem.dtype) * FMA_FRACTION),
    }
    return Work(slowest(times), byte_count, blocks * block_flops, LAUNCH_SECONDS + max(times.values()))


def _splits(problem: Problem | DepthwiseProblem, device: Device, tiles: int) -> Splits:
    """Enough parts to give every SM its blocks, each of at least SPLIT_PIXELS pixels and none empty."""
    wanted = max(1, min(ceil(_concurrent(device) / tiles), ceil(problem.pixels / SPLIT_PIXELS)))
    pixels_per_part = max(1, ceil(problem.pixels / wanted))
    return Splits(max(1, ceil(problem.pixels / pixels_per_part)), pixels_per_part)


def _refusal(problem: Problem, name: str, device: Device, kernels: Kernels) -> str:
    """Why the family can't run a problem on a device; empty if it can."""
    needed = _needed(problem, name)
    missing = [instance for instance in needed if instance not in kernels.instances]
    if missing:
        return kernels.why_none or f"the native module has no instance {missing[0]}"
    shared_bytes = max(INSTANCES[instance].shared_bytes for instance in needed)
    if shared_bytes > device.shared_bytes:
        return f"needs {shared_bytes} bytes of shared memory a block, {device.name} has {device.shared_bytes}"
    if problem.reach > INT32_MAX // 2:
        return TOO_LARGE
    blocks = max(blocks for _, blocks, _ in _steps(problem, device))
    return f"{blocks} blocks are more than a grid holds" if blocks > INT32_MAX else ""


def _needed(problem: Problem, name: str) -> list[str]:
    """The instances that a call runs."""
    if problem.direction == "forward":
        return [name]
    steps = ("intermediate", "input", "depthwise_weight", "pointwise_weight")
    return [
        *(f"simt_backward_{step}_{problem.dtype}_{problem.layout}" for step in steps),
        f"reduce_splits_{problem.dtype}",
    ]
