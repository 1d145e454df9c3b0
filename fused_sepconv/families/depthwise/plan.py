"""The depthwise kernels by themselves: those at the speed of memory, and the generic ones that serve every problem.

The fast kernels (csrc/depthwise/*.cuh) take 3x3, 5x5 and 7x7 in float32, float16 and bfloat16. nhwc.py
knows how those for NHWC cut a problem, nchw.py those for NCHW; here a cut is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, gcd

from fused_sepconv.families.depthwise import nchw, nhwc
from fused_sepconv.families.depthwise.nchw import NchwCut, NchwTraits
from fused_sepconv.families.depthwise.nhwc import WARP, Cut, Traits
from fused_sepconv.families.pytorch.plan import LIBRARY_DEPTHWISE_BANDWIDTH
from fused_sepconv.families.simt import plan as simt
from fused_sepconv.planning.devices import LARGEST_SHARED_BYTES, Device
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
    mostly,
    slowest,
)

BANDWIDTH_FRACTION = 0.88  # assumed, until measured: of a copy's bandwidth
SM_BANDWIDTH = 1.5  # assumed, until measured: what one SM can draw, of its share of the bandwidth
ISSUE_FRACTION = 0.7  # assumed, until measured: instructions issued, of the peak
BLOCK_SECONDS = 1.5e-6  # assumed, until measured: a block's start and its first rows' latency, which nothing covers
GROUP_SECONDS = 0.8e-6  # assumed, until measured: latency of a group's rows and of its barrier
REDUCED_PART_SECONDS = 0.6e-6 / 16  # assumed, until measured: as many loads of a thread as wait at a time
AS_FAST = 1.08  # predictions are no more exact than that: among cuts as fast as this, fewer bytes decide

GENERIC_FMA_FRACTION = 0.05  # assumed, until measured: each multiply-add has its address, bounds and two loads

DTYPES = ("float32", "float16", "bfloat16")
KERNELS = (3, 5, 7)
NORMALISED_KERNELS = (3, 5)
STRIDES = (1, 2)


ALL_TRAITS = tuple(
    Traits(direction, kernel, stride, dtype, normalised)
    for normalised in (False, True)
    for direction in ("forward", "backward")
    for kernel in (NORMALISED_KERNELS if normalised else KERNELS)
    for stride in STRIDES
    for dtype in DTYPES
)

PLANE_TRAITS = tuple(
    NchwTraits(t.direction, t.kernel, t.stride, dilated, t.dtype, t.normalised)
    for t in ALL_TRAITS
    for dilated in ((False, True) if t.stride == 1 and not t.normalised else (False,))
)


def _instance(traits: Traits) -> Instance:
    mid_activation = not traits.normalised
    shared_bytes = traits.shared_bytes(traits.max_warps, pre_activation="gelu", mid_activation=mid_activation)
    return Instance(traits.name, WARP * traits.max_warps, min(shared_bytes, LARGEST_SHARED_BYTES), traits.registers)


INSTANCES = {
    **{traits.name: _instance(traits) for traits in ALL_TRAITS},
    **{t.name: Instance(t.name, nchw.THREADS, LARGEST_SHARED_BYTES, t.registers) for t in PLANE_TRAITS},
    **{
        name: Instance(name, simt.THREADS, 0, registers=64)
        for dtype in ELEMENT_BYTES
        for layout in ("nhwc", "nchw")
        for name in (f"simt_depthwise_forward_{dtype}_{layout}",)
    },
}


def candidates(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> list[Candidate]:
    """PyTorch's own, the generic kernels and, each with its reason where it can't, a fast one; of a normalised x the
    last alone."""
    if problem.normalised:
        return [_fast(problem, device, kernels)]
    return [_pytorch(problem, device), _generic(problem, device, kernels), _fast(problem, device, kernels)]


def best(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> Candidate:
    """The fast kernel where it can run or x is normalised, else the generic one; with a refusal where it can't."""
    fast = _fast(problem, device, kernels)
    if problem.normalised:
        return fast
    return _generic(problem, device, kernels) if fast.refusal else fast


def _pytorch(problem: DepthwiseProblem, device: Device) -> Candidate:
    """PyTorch's own operators, one kernel each."""
    x, y = problem.x_bytes, problem.y_bytes
    # A backward has a kernel for the gradient of x and one for the weight's; autograd has kept the forward's results.
    launches, passes = (1, 2) if problem.direction == "forward" else (2, 3)
    depthwise, flops = launches * (x + y + problem.weight_bytes), launches * problem.flops
    plain = passes * ((x if problem.pre_activation else 0) + (y if problem.mid_activation else 0))
    launches += (problem.pre_activation is not None) + (problem.mid_activation is not None)
    seconds = depthwise / LIBRARY_DEPTHWISE_BANDWIDTH + plain / LIBRARY_BANDWIDTH
    return Candidate(
        family="pytorch",
        name="pytorch",
        bytes=depthwise + plain,
        flops=flops,
        predicted_seconds=seconds / device.bandwidth + launches * LAUNCH_SECONDS,
        bound="the library's depthwise kernels",
    )


# ---- the generic kernels


def _generic(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> Candidate:
    """One thread an element: every kernel size, stride, dtype, layout and alignment."""
    suffix = f"_{problem.dtype}_{problem.layout}"
    forward = f"simt_depthwise_forward{suffix}"
    needed = [forward]
    if problem.direction == "backward":
        needed = [f"simt_backward_input{suffix}", f"simt_backward_depthwise_weight{suffix}"]
        needed += [f"reduce_splits_{problem.dtype}"] + ([forward] if problem.mid_activation else [])
    refusal = ""
    if missing := [name for name in needed if name not in kernels.instances]:
        refusal = kernels.why_none or f"the native module has no instance {missing[0]}"
    elements = max(problem.pixels * problem.K, problem.N * problem.C * problem.H * problem.W)
    if reason := _too_large(problem, ceil(elements / simt.THREADS)):
        refusal = refusal or reason
    if refusal:
        return Candidate("simt", needed[0], refusal=refusal)

    x, y = problem.x_bytes, problem.y_bytes
    steps = [(x + y + problem.weight_bytes, problem.flops)]
    splits = None
    if problem.direction == "backward":
        splits = simt.depthwise_splits(problem, device)
        partials = 2 * splits.parts * problem.K * (problem.taps + 1) * 4
        steps = [
            (y + x * (2 if problem.pre_activation else 1), problem.flops),
            (x + y + partials, problem.flops),
        ]
    times = [
        {
            "memory": byte_count / (device.bandwidth * LIBRARY_BANDWIDTH),
            "arithmetic": flops / (device.fma(problem.dtype) * GENERIC_FMA_FRACTION),
        }
        for byte_count, flops in steps
    ]
    candidate = Candidate(
        family="simt",
        name=needed[0],
        bytes=sum(byte_count for byte_count, _ in steps),
        flops=sum(flops for _, flops in steps),
        blocks=ceil(elements / simt.THREADS),
        waves=ceil(elements / simt.THREADS) / (device.sms * 8),
        predicted_seconds=sum(LAUNCH_SECONDS + max(step.values()) for step in times),
        bound=mostly((slowest(step), max(step.values())) for step in times),
        depthwise_splits=splits,
    )
    return _after_a_step_through_mid(candidate, problem, device, kernels)


def _after_a_step_through_mid(
    candidate: Candidate, problem: DepthwiseProblem, device: Device, kernels: Kernels
) -> Candidate:
    """A backward whose own kernels take the gradient of the mid-activation's argument: a forward makes it, first."""
    if problem.direction == "forward" or not problem.mid_activation:
        return candidate
    first = best(replace(problem, direction="forward"), device, kernels)
    grad = problem.y_bytes  # which it reads besides
    seconds = first.predicted_seconds + grad / (device.bandwidth * LIBRARY_BANDWIDTH)
    return replace(
        candidate,
        bytes=candidate.bytes + first.bytes + grad,
        flops=candidate.flops + first.flops,
        predicted_seconds=candidate.predicted_seconds + seconds,
        steps=(first,),
    )


def _too_large(problem: DepthwiseProblem, blocks: int) -> str:
    if problem.reach > INT32_MAX // 2:
        return TOO_LARGE
    return f"{blocks} blocks are more than a grid holds" if blocks > INT32_MAX else ""


# ---- the fast kernels


def _fast(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> Candidate:
    key = (problem.direction, problem.kernel[0], inner_stride(problem)[0])
    if problem.layout == "nhwc":
        traits = Traits(*key, problem.dtype, problem.normalised)
    else:
        traits = NchwTraits(*key, problem.dilation != (1, 1), problem.dtype, problem.normalised)
    refusal = _fast_refusal(problem, traits, kernels)
    if refusal:
        return Candidate("depthwise", traits.name, refusal=refusal)
    predicted = [_predict(problem, device, cut) for cut in cuts(problem, traits, device)]
    if not predicted and problem.direction == "backward" and problem.mid_activation:
        # Its windows of x are the largest part of the shared memory.
        candidate = _fast(replace(problem, mid_activation=None), device, kernels)
        return candidate if candidate.refusal else _after_a_step_through_mid(candidate, problem, device, kernels)
    if not predicted:
        refusal = f"needs more shared memory a block than {device.name} has: {device.shared_bytes} bytes"
        return Candidate("depthwise", traits.name, refusal=refusal)
    fastest = min(candidate.predicted_seconds for candidate in predicted)
    close = (candidate for candidate in predicted if candidate.predicted_seconds <= fastest * AS_FAST)
    return min(close, key=lambda candidate: (candidate.bytes, candidate.predicted_seconds))


def cuts(problem: DepthwiseProblem, traits: Traits | NchwTraits, device: Device) -> Iterator[Cut | NchwCut]:
    """Ways to cut a problem that are worth comparing."""
    if isinstance(traits, NchwTraits):
        return nchw.cuts(problem, traits, device)
    return nhwc.cuts(problem, traits, device)


def inner_stride(problem: DepthwiseProblem) -> tuple[int, int]:
    """The stride that is left in each phase of a dilated convolution: stride / gcd(stride, dilation)."""
    (sh, sw), (dh, dw) = problem.stride, problem.dilation
    return sh // gcd(sh, dh), sw // gcd(sw, dw)


def _fast_refusal(problem: DepthwiseProblem, traits: Traits | NchwTraits, kernels: Kernels) -> str:
    """Why the fast kernels can't run a problem; empty if they can."""
    if not kernels.instances:
        return kernels.why_none
    if problem.dtype not in DTYPES:
        return f"the fast depthwise kernels do not compute in {problem.dtype}"
    kh, kw = problem.kernel
    sh, sw = inner_stride(problem)
    if problem.normalised and (reason := _normalised_refusal(problem)):
        return reason
    if kh != kw or kh not in KERNELS:
        return f"the fast depthwise kernels are for 3x3, 5x5 and 7x7, not {kh}x{kw}"
    if sh != sw or sh not in STRIDES:
        return f"the fast depthwise kernels are for stride 1 and 2, not {sh}x{sw} (dilation taken apart)"
    if problem.direction == "backward" and (problem.multiplier > 1 or (sh, sw) != problem.stride):
        return (
            "the fast depthwise backward is for a depth multiplier of 1, and strides that share no factor with dilation"
        )
    if problem.layout == "nchw" and problem.dilation != (1, 1) and sh != 1:
        return "the fast depthwise kernels for NCHW take a stride and a dilation where the stride divides it"
    if problem.layout == "nhwc" and (problem.C * problem.element_bytes % 16 or problem.K * problem.element_bytes % 16):
        return f"pixels of {problem.C} and {problem.K} channels are no multiple of 16 bytes"
    if not problem.aligned:
        return "x is not aligned to 16 bytes, or its channels (NHWC) or planes (NCHW) are not contiguous"
    if traits.name not in kernels.instances:
        return f"the native module has no instance {traits.name}"
    return _too_large(problem, 0)


def _normalised_refusal(problem: DepthwiseProblem) -> str:
    """Why the normalised kernels, of which there are fewer, can't run a problem in both directions."""
    if problem.kernel[0] not in NORMALISED_KERNELS:
        return f"the kernels that normalise their input are for 3x3 and 5x5, not {'x'.join(map(str, problem.kernel))}"
    if problem.multiplier > 1 or inner_stride(problem) != problem.stride:
        return "they are for a depth multiplier of 1, and strides that share no factor with dilation"
    if problem.layout == "nchw" and problem.dilation != (1, 1):
        return "they take no dilation in NCHW"
    return "they take no activation of the result" if problem.mid_activation else ""


def _predict(problem: DepthwiseProblem, device: Device, cut: Cut | NchwCut) -> Candidate:
    """Whichever is slowest: the memory, the fullest SM's share of it or its instructions, or a block by itself, whose
    groups follow one another: other blocks on its SM cover what it waits."""
    traits, tiling = cut.traits, cut.tiling
    if isinstance(cut, NchwCut):
        threads, steps, total = nchw.THREADS, tiling.units_per_part, cut.units
        step_instructions = nchw.instructions_of_unit(cut)
        step_shared_cycles = nchw.shared_cycles_of_unit(cut)
        columns_of_blocks = problem.K
    else:
        threads, steps, total = WARP * tiling.warps, tiling.groups_per_part, cut.total_groups
        step_instructions = threads * traits.instructions(
            tiling.warps, problem.pre_activation, bool(problem.mid_activation)
        )
        step_shared_cycles = 0.0  # each access meets every bank once: the instructions take longer
        columns_of_blocks = cut.chunks
    steps = min(steps, max(total, 1))
    byte_count, blocks = cut.bytes(), cut.blocks
    # The backward's sums over the parts: of the weight, of the bias, of a normalised x.
    reductions = 0 if traits.forward else 2 + traits.normalised
    overhead = (1 + reductions) * LAUNCH_SECONDS + reductions * tiling.parts * REDUCED_PART_SECONDS
    per_sm = device.blocks_per_sm(threads, traits.registers, tiling.shared_bytes)
    blocks_of_fullest = ceil(blocks / device.sms)
    waves = blocks / (device.sms * per_sm)
    issue_rate = 128 * device.clock * ISSUE_FRACTION  # instructions of a lane: an SM has four schedulers
    sm_bytes = blocks_of_fullest * steps * byte_count / max(columns_of_blocks * total, 1)
    seconds = {
        "memory": byte_count / (device.bandwidth * BANDWIDTH_FRACTION),
        "the fullest SM's memory": sm_bytes / (device.bandwidth / device.sms * SM_BANDWIDTH),
        "instructions": blocks_of_fullest * steps * step_instructions / issue_rate,
        "shared memory": blocks_of_fullest * steps * step_shared_cycles / device.clock,
        "latency": ceil(waves) * steps * (GROUP_SECONDS + step_instructions / issue_rate),
    }
    return Candidate(
        family="depthwise",
        name=traits.name,
        bytes=byte_count,
        flops=problem.flops * (1 if traits.forward else 3 if problem.mid_activation else 2),
        blocks=blocks,
        waves=waves,
        shared_bytes=tiling.shared_bytes,
        predicted_seconds=overhead + BLOCK_SECONDS * ceil(waves) + max(seconds.values()),
        bound=slowest(seconds),
        tiling=tiling,
    )
