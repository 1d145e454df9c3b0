"""Mutants that nothing catches, each with the reason. A new survivor belongs here only if a reason can be given.

A mutant is named by its file and the statement that it changes, so that moved lines and new line breaks change nothing;
`tests/test_mutants.py` fails where one is named that is no more.
"""

from __future__ import annotations

from .mutate import Mutant

Group = tuple[str, tuple[tuple[str, str], ...]]
"""A reason, and the (file, name) of the mutants that it holds for."""

# Whatever the input, the results are the same and no rule is broken: no test could tell these from the kernels.
EQUIVALENT: tuple[Group, ...] = (
    (
        "The two agree where the bound is met: the clamp's value is the bound, elu and its derivative have no "
        "step at 0.",
        (
            ("activation.cuh", "case Activation::elu: return v {> -> >=} Compute(0) ? v : std::expm1(v)"),
            ("activation.cuh", "case Activation::elu: return z {<= -> <} Compute(0) ? grad * std::exp(z) : grad"),
            ("activation.cuh", "case Activation::relu6: return v {< -> <=} Compute(0) ? Compute(0) : v > Compute(6) ? Compute(6) : v"),
            ("activation.cuh", "case Activation::relu: return v {< -> <=} Compute(0) ? Compute(0) : v"),
            ("activation.cuh", "return v * (gate < Compute(0) ? Compute(0) : gate {> -> >=} Compute(6) ? Compute(6) : gate) / Compute(6)"),
            ("activation.cuh", "return v * (gate {< -> <=} Compute(0) ? Compute(0) : gate > Compute(6) ? Compute(6) : …"),
            ("activation.cuh", "…e Activation::relu6: return v < Compute(0) ? Compute(0) : v {> -> >=} Compute(6) ? Compute(6) : v"),
        ),
    ),
    (
        "A minimum: both are the same where they are equal.",
        (
            ("simt_backward_depthwise_weight.cuh", "const int64_t end = begin + params.pixels_per_split {< -> <=} pixels ? begin + params.pixels_per_split : pixels"),
            ("simt_backward_pointwise_weight.cuh", "const int64_t end = begin + params.pixels_per_split {< -> <=} pixels ? begin + params.pixels_per_split : pixels"),
        ),
    ),
    (
        "kh and kw are -1 together, for the bias.",
        (
            ("simt_backward_depthwise_weight.cuh", "if ({kh -> kw} >= 0)"),
        ),
    ),
    (
        "What it fills is never read: threads without a channel store no sum.",
        (
            ("simt_backward_depthwise_weight.cuh", "…els<Traits>(params, k, begin + lane, end, kh, kw) : Compute({0 -> 0 + 1})"),
        ),
    ),
    (
        "One operand of the product may hold anything finite where the other is 0, and both are filled with zeros.",
        (
            ("simt_backward_intermediate.cuh", "…Compute>(grad_z[offset(params.grad_z, place, f)]) : Compute({0 -> 0 + 1})"),
            ("simt_backward_intermediate.cuh", "…se_weight[static_cast<int64_t>(f) * shape.K + k]) : Compute({0 -> 0 + 1})"),
            ("simt_backward_pointwise_weight.cuh", "… depthwise_at<Scalar, Compute>(params, place, k)) : Compute({0 -> 0 + 1})"),
            ("simt_forward.cuh", "… depthwise_at<Scalar, Compute>(params, place, k)) : Compute({0 -> 0 + 1})"),
            ("simt_forward.cuh", "…se_weight[static_cast<int64_t>(f) * shape.K + k]) : Compute({0 -> 0 + 1})"),
        ),
    ),
    (
        "A negative multiple of the stride gives a negative output row or column, which the caller leaves out "
        "just as it does -1.",
        (
            ("simt_backward_input.cuh", "if ({scaled < 0 -> false} || scaled % stride != 0) return -1"),
        ),
    ),
    (
        "It saves work: without an activation the derivative gives the gradient back.",
        (
            ("simt_backward_input.cuh", "if ({shape.pre_activation != Activation::none -> true})"),
            ("simt_backward_intermediate.cuh", "if ({shape.mid_activation != Activation::none -> true}) grad = through_mid_activation<Scalar>(params, place, k, gr…"),
        ),
    ),
    (
        "One slab more, all of zeros.",
        (
            ("simt_backward_intermediate.cuh", "slab {< -> <=} shape.F"),
            ("simt_backward_pointwise_weight.cuh", "first {< -> <=} end"),
            ("simt_forward.cuh", "slab {< -> <=} shape.K"),
        ),
    ),
    (
        "Which thread owns what: every element still has one owner, only its neighbours in memory have other "
        "threads.",
        (
            ("simt_backward_input.cuh", "if constexpr (layout {== -> !=} Layout::nhwc)"),
            ("simt_backward_input.cuh", "if constexpr ({layout == Layout::nhwc -> true})"),
            ("simt_backward_intermediate.cuh", "Corner<Traits> corner(Traits::kLayout {== -> !=} Layout::nhwc)"),
            ("simt_backward_intermediate.cuh", "Corner<Traits> corner({Traits::kLayout == Layout::nhwc -> true})"),
            ("simt_forward.cuh", "Corner<Traits> corner(Traits::kLayout {== -> !=} Layout::nhwc)"),
            ("simt_forward.cuh", "Corner<Traits> corner({Traits::kLayout == Layout::nhwc -> true})"),
            ("simt_product.cuh", "if constexpr (Traits::kLayout {== -> !=} Layout::nhwc) for_each<Traits, kChannels, kPixels>(body)"),
            ("simt_product.cuh", "if constexpr ({Traits::kLayout == Layout::nhwc -> true}) for_each<Traits, kChannels, kPixels>(body)"),
        ),
    ),
    (
        "Padding against bank conflicts, which cost time and nothing else.",
        (
            ("simt_product.cuh", "Compute a[kDepth][kRows{+ 4 -> }]"),
            ("simt_product.cuh", "Compute b[kDepth][kColumns{+ 4 -> }]"),
        ),
    ),
    (
        "There are more threads than places: the loop runs once at most.",
        (
            ("simt_product.cuh", "i += {Traits::kThreads -> 2 * (Traits::kThreads)}) places[i] = first + i < end ? place_of(shape, first + i) :…"),
        ),
    ),
    (
        "Redundant as it stands. The places are last read before the barrier that comes before the product, the "
        "slab is next written after the barrier that follows the writing of the next places.",
        (
            ("simt_backward_pointwise_weight.cuh", "{__syncthreads(); -> ;}"),
        ),
    ),
)  # fmt: skip

# Wrong, and not seen by what judges mutants.
UNSEEN: tuple[Group, ...] = (
    (
        "Rounding alone, in long sums: tests/test_kernels.py holds a layer of 728 channels against PyTorch's own "
        "error.",
        (
            ("simt_product.cuh", "if constexpr (sizeof(Compute) {== -> !=} sizeof(double))"),
            ("simt_product.cuh", "if constexpr ({sizeof(Compute) == sizeof(double) -> true})"),
        ),
    ),
    (
        "One element past an array of the thread's own, on its stack, where no access is checked.",
        (
            ("simt_product.cuh", "i {< -> <=} Traits::kCorner #2"),
            ("simt_product.cuh", "j {< -> <=} Traits::kCorner"),
        ),
    ),
)  # fmt: skip

EXPLAINED = {mutant: reason for reason, mutants in (*EQUIVALENT, *UNSEEN) for mutant in mutants}
_EQUIVALENT = {mutant for _, mutants in EQUIVALENT for mutant in mutants}


def explanation(mutant: Mutant) -> str:
    """Why a mutant may survive; empty where it may not."""
    return EXPLAINED.get((mutant.file, mutant.name), "")


def is_equivalent(mutant: Mutant) -> bool:
    return (mutant.file, mutant.name) in _EQUIVALENT
