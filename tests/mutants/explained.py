"""Mutants that nothing catches, each with the reason. A new survivor belongs here only if a reason can be given.

A mutant is named by its file and the statement that it changes, so that moved lines and new line breaks change nothing;
`tests/test_mutants.py` fails where one is named that is no more.
"""

from __future__ import annotations

from .mutate import Mutant

Group = tuple[str, dict[str, tuple[str, ...]]]
"""A reason, and the mutants that it holds for: names by file."""

# Whatever the input, the results are the same and no rule is broken: no test could tell these from the kernels.
EQUIVALENT: tuple[Group, ...] = (
    (
        "The two agree where the bound is met: the clamp's value is the bound, elu and its derivative have no step "
        "at 0.",
        {
            "activation.cuh": (
                "…e Activation::elu: return v {> -> >=} Compute(0) ? v : std::expm1…",
                "…e Activation::elu: return z {<= -> <} Compute(0) ? grad * std::ex…",
                "…Activation::relu6: return v {< -> <=} Compute(0) ? Compute(0) : v…",
                "… Activation::relu: return v {< -> <=} Compute(0) ? Compute(0) : v",
                "…pute(0) ? Compute(0) : gate {> -> >=} Compute(6) ? Compute(6) : g…",
                "return v * (gate {< -> <=} Compute(0) ? Compute(0) : g…",
                "…Compute(0) ? Compute(0) : v {> -> >=} Compute(6) ? Compute(6) : v",
            ),
            "tensor_stream.cuh": ("…onst int32_t first = before {> -> >=} 0 ? (before + pitch - 1) / …",),
        },
    ),
    (
        "A minimum: both are the same where they are equal.",
        {
            "simt_backward_depthwise_weight.cuh": (
                "…n + params.pixels_per_split {< -> <=} pixels ? begin + params.pix…",
            ),
            "simt_backward_pointwise_weight.cuh": (
                "…n + params.pixels_per_split {< -> <=} pixels ? begin + params.pix…",
            ),
        },
    ),
    (
        "Rows that are there already come again: more bytes, which tests/test_depthwise_kernels.py counts.",
        {
            "depthwise_forward.cuh": ("whole = {coming.group == 0 -> true}",),
            "depthwise_backward.cuh": ("whole = {group.group == 0 -> true}",),
        },
    ),
    (
        "A shuffle takes a lane's number modulo 32.",
        {
            "tensor_backward_input.cuh": (
                "… warp_shuffle(offset, thread{% kWarpSize -> } / 2 * 2 + half) + thread % …",
            ),
        },
    ),
    (
        "The larger of the two: in every cut so far the stages are.",
        {
            "tensor_weight_tiles.cuh": ("return {all > sums -> true} ? all : sums",),
        },
    ),
    (
        "kh and kw are -1 together, for the bias.",
        {
            "simt_backward_depthwise_weight.cuh": ("if ({kh -> kw} >= 0)",),
        },
    ),
    (
        "What it fills is never read: threads without a channel store no sum.",
        {
            "simt_backward_depthwise_weight.cuh": ("…ane, end, kh, kw) : Compute({0 -> 0 + 1})",),
        },
    ),
    (
        "One operand of the product may hold anything finite where the other is 0, and both are filled with zeros.",
        {
            "simt_backward_intermediate.cuh": (
                "…ad_z, place, f)]) : Compute({0 -> 0 + 1})",
                "…) * shape.K + k]) : Compute({0 -> 0 + 1})",
            ),
            "simt_backward_pointwise_weight.cuh": ("…arams, place, k)) : Compute({0 -> 0 + 1})",),
            "simt_forward.cuh": (
                "…arams, place, k)) : Compute({0 -> 0 + 1})",
                "…) * shape.K + k]) : Compute({0 -> 0 + 1})",
            ),
        },
    ),
    (
        "A negative multiple of the stride gives a negative output row or column, which the caller leaves out just "
        "as it does -1.",
        {
            "simt_backward_input.cuh": ("if ({scaled < 0 -> false} || scaled % stride != 0) re…",),
        },
    ),
    (
        "It saves work: without an activation the derivative gives the gradient back.",
        {
            "simt_backward_input.cuh": ("if ({shape.pre_activation != Activation::none -> true})",),
            "simt_backward_intermediate.cuh": (
                "if ({shape.mid_activation != Activation::none -> true}) grad = through_mid_activat…",
            ),
        },
    ),
    (
        "One slab more, all of zeros.",
        {
            "simt_backward_intermediate.cuh": ("slab {< -> <=} shape.F",),
            "simt_backward_pointwise_weight.cuh": ("first {< -> <=} end",),
            "simt_forward.cuh": ("slab {< -> <=} shape.K",),
        },
    ),
    (
        "Which thread owns what: every element still has one owner, only its neighbours in memory have other threads.",
        {
            "simt_backward_input.cuh": (
                "if constexpr (layout {== -> !=} Layout::nhwc)",
                "if constexpr ({layout == Layout::nhwc -> true})",
            ),
            "simt_backward_intermediate.cuh": (
                "…its> corner(Traits::kLayout {== -> !=} Layout::nhwc)",
                "Corner<Traits> corner({Traits::kLayout == Layout::nhwc -> true})",
            ),
            "simt_forward.cuh": (
                "…its> corner(Traits::kLayout {== -> !=} Layout::nhwc)",
                "Corner<Traits> corner({Traits::kLayout == Layout::nhwc -> true})",
            ),
            "simt_product.cuh": (
                "… constexpr (Traits::kLayout {== -> !=} Layout::nhwc) for_each<Trai…",
                "if constexpr ({Traits::kLayout == Layout::nhwc -> true}) for_each<Traits, kChannels…",
            ),
        },
    ),
    (
        "Padding against bank conflicts, which cost time and nothing else.",
        {
            "simt_product.cuh": (
                "Compute a[kDepth][kRows{+ 4 -> }]",
                "Compute b[kDepth][kColumns{+ 4 -> }]",
            ),
        },
    ),
    (
        "There are more threads than places: the loop runs once at most.",
        {
            "simt_product.cuh": ("i += {Traits::kThreads -> 2 * (Traits::kThreads)}) places[i] = first + i < en…",),
        },
    ),
    (
        "The way of any pre-activation serves none and relu as well, and takes longer.",
        {
            "tensor_backward_input.cuh": (
                "if ({shape_.pre_activation == Activation::none -> false} || shape_.pre_activation ==…",
                "…tion == Activation::none || {shape_.pre_activation == Activation::relu -> false}) gather<Traits::kGroup, fal…",  # noqa: E501
                "… Activation::none || shape_.{pre_activation -> mid_activation} == Activation::relu) gather…",
            ),
        },
    ),
    (
        "It saves work: the windows past the part's last position are of dT that is there, and of no pixel of x.",
        {"tensor_backward_input.cuh": ("…nst int left = whole_count(){- own_first -> }",)},
    ),
    (
        "The kernel is square.",
        {
            "tensor_stream.cuh": (
                "…g& tiling) : vertical(shape.{kernel_h -> kernel_w}, shape.dilation_h, shape.pa…",
                "…ength * pitch), lag(((shape.{kernel_h -> kernel_w} - 1) * pitch + shape.kernel…",
            ),
        },
    ),
    (
        "A longer ring than the plan says, which tests/test_tensor_input.py counts.",
        {"tensor_stream.cuh": ("…ch + shape.kernel_w - 1 + 7){/ 8 -> } * 8), part(tiling.part), by…",)},
    ),
    (
        "Redundant as it stands. The places are last read before the barrier that comes before the product, the slab "
        "is next written after the barrier that follows the writing of the next places.",
        {
            "simt_backward_pointwise_weight.cuh": ("{__syncthreads(); -> ;}",),
        },
    ),
)

# Wrong, and not seen by what judges mutants.
UNSEEN: tuple[Group, ...] = (
    (
        "Rounding alone, in long sums: tests/test_kernels.py holds a layer of 728 channels against PyTorch's own "
        "error.",
        {
            "simt_product.cuh": (
                "… constexpr (sizeof(Compute) {== -> !=} sizeof(double))",
                "if constexpr ({sizeof(Compute) == sizeof(double) -> true})",
            ),
        },
    ),
    (
        "One element past an array of the thread's own, on its stack, where no access is checked.",
        {
            "simt_product.cuh": (
                "i {< -> <=} Traits::kCorner #2",
                "j {< -> <=} Traits::kCorner",
            ),
            "tensor_backward_input.cuh": ("c + 1 {< -> <=} Traits::kKernel",),
        },
    ),
)


def _reasons(groups: tuple[Group, ...]) -> dict[tuple[str, str], str]:
    return {(file, name): reason for reason, files in groups for file, names in files.items() for name in names}


EXPLAINED = _reasons(EQUIVALENT + UNSEEN)
_EQUIVALENT = _reasons(EQUIVALENT)


def explanation(mutant: Mutant) -> str:
    """Why a mutant may survive; empty where it may not."""
    return EXPLAINED.get((mutant.file, mutant.name), "")


def is_equivalent(mutant: Mutant) -> bool:
    return (mutant.file, mutant.name) in _EQUIVALENT
