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
        "A minimum or a maximum: both are the same where they are equal.",
        {
            "simt_backward_depthwise_weight.cuh": (
                "…n + params.pixels_per_split {< -> <=} pixels ? begin + params.pix…",
            ),
            "simt_backward_pointwise_weight.cuh": (
                "…n + params.pixels_per_split {< -> <=} pixels ? begin + params.pix…",
            ),
            "depthwise_backward.cuh": ("…in + tiling.groups_per_part {< -> <=} groups ? begin + tiling.gro…",),
            "depthwise_forward.cuh": (
                "…in + tiling.groups_per_part {< -> <=} groups ? begin + tiling.gro…",
                "…st_channel + Traits::kChunk {< -> <=} shape.K ? first_channel + T…",
            ),
            "depthwise_planes.cuh": (
                "…<int32_t>(n + tiling.images {<= -> <} shape.N ? tiling.images : s…",
                "…ar*>(run(image)) + at, left {< -> <=} kPieceBytes ? left : kPiece…",
            ),
            "depthwise_planes_backward.cuh": (
                "…gin + tiling.units_per_part {< -> <=} units ? begin + tiling.unit…",
                "return row {< -> <=} 0 ? 0 : row < rows ? row : …",
                "return row < 0 ? 0 : row {< -> <=} rows ? row : rows",
            ),
            "depthwise_planes_forward.cuh": (
                "…gin + tiling.units_per_part {< -> <=} units ? begin + tiling.unit…",
                "…nit.band + 1) * tiling.rows {< -> <=} shape.out_h ? (unit.band + …",
                "return row {< -> <=} 0 ? 0 : row < shape.H ? row…",
                "return row < 0 ? 0 : row {< -> <=} shape.H ? row : shape.H",
                "const int row_end = below {< -> <=} row ? row : below < shape.H…",
                "…= below < row ? row : below {< -> <=} shape.H ? below : shape.H",
            ),
            "depthwise_strips.cuh": (
                "return further {< -> <=} round ? further : round",
                "column_end_ = end {< -> <=} 0 ? 0 : end < width_ ? end …",
                "…mn_end_ = end < 0 ? 0 : end {< -> <=} width_ ? end : width_",
                "…hannels = K - first_channel {< -> <=} Traits::kChunk ? K - first_…",
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
            "simt_depthwise_forward.cuh": (
                "if constexpr (layout {== -> !=} Layout::nhwc)",
                "if constexpr ({layout == Layout::nhwc -> true})",
                "…ce_of(shape, element - plane{* image_pixels -> })",
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
    (
        "It saves work: what is done then as well changes nothing, or gives the same a longer way.",
        {
            "depthwise_backward.cuh": (
                "if ({shape.pre_activation != Activation::none -> true})",
                "if ({params.partial_bias == nullptr -> false}) continue",
                "if ({whole -> true}) start_stores()",
            ),
            "depthwise_forward.cuh": (
                "if ({shape.pre_activation != Activation::none -> true})",
                "const bool relu = shape.{mid_activation -> activation} == Activation::relu && para…",
                "if ({shape.mid_activation != Activation::none -> true} && !relu)",
                "if ({p >= tile_end -> false} || !vertical.inside(q) || !…",
                "if (p {>= -> >} tile_end || !vertical.insid…",
                "if ({whole -> true}) start_stores()",
            ),
            "depthwise_planes.cuh": (
                "if ({images > 1 -> true})",
                "if (images {> -> >=} 1)",
                "if ({images > 1 -> true}) #2",
                "if (images {> -> >=} 1) #2",
                "if (!Traits::kDilated || {count == 1 -> false}) return item * count",
                "if (left {<= -> <} 0) return",
                "if (first {>= -> >} begin && first + Traits::kP…",
                "…st + Traits::kPieceElements {<= -> <} end)",
            ),
            "depthwise_planes_backward.cuh": (
                "…signed char* active_slots = {beside -> true} ? x_slots + 2 * x_bytes : n…",
                "if ({shape.pre_activation != Activation::none -> true}) raw.activate_own(unit.imag…",
                "if ({shape.mid_activation != Activation::none -> true})",
                "const int image = {unit.images > 1 -> true} ? i / own_count : 0",
                "…nst int image = unit.images {> -> >=} 1 ? i / own_count : 0",
            ),
            "depthwise_planes_forward.cuh": (
                "const bool relu = shape.{mid_activation -> activation} == Activation::relu && para…",
                "if ({shape.pre_activation != Activation::none -> true}) rows.activate_own(unit.ima…",
                "if ({shape.mid_activation != Activation::none -> true} && !relu)",
                "const int image = {unit.images > 1 -> true} ? i / out.count : 0, elemen…",
                "…nst int image = unit.images {> -> >=} 1 ? i / out.count : 0, elem…",
                "…ms.over(unit.images, end_row{- first_row -> })",
            ),
            "depthwise_strips.cuh": (
                "if ({kStaged -> true})",
                "if ({kStaged -> true}) __syncthreads()",
                "if ({activation != Activation::relu -> true})",
            ),
        },
    ),
    (
        "Nothing comes after a part's last group.",
        {
            "depthwise_backward.cuh": ("{whole = false; -> ;} if (left > 1)",),
            "depthwise_forward.cuh": ("{whole = false; -> ;} if (left > 1)",),
        },
    ),
    (
        "The loop's first and last turns, and one more, are left out by the condition in it.",
        {
            "depthwise_backward.cuh": (
                "b {< -> <=} Window::kColumns #2",
                "r {< -> <=} kRows #6",
                "FSC_UNROLL for (int b = {0 -> 1 + (0)} #3",
                "b{< -> + 1 <}Window::kColumns #3",
                "b {< -> <=} Window::kColumns #3",
            ),
            "depthwise_planes_backward.cuh": (
                "a {< -> <=} kWindowRows",
                "b {< -> <=} kWindowColumns",
                "FSC_UNROLL for (int b = {0 -> 1 + (0)} #2",
                "b{< -> + 1 <}kWindowColumns #2",
                "b {< -> <=} kWindowColumns #2",
            ),
        },
    ),
    (
        "More of x comes than is needed: bytes, which tests/test_depthwise_kernels.py counts.",
        {
            "depthwise_forward.cuh": (
                "…el + Traits::kChunk < shape.{K -> F} ? first_channel + Traits::k…",
                "…olumn + (tiling.tile_columns{- 1 -> }) * kStride + kKernel)",
            ),
            "depthwise_planes_backward.cuh": (
                "…= clipped(first_padded(unit){- before -> } - shape.pad_top + planes.x_…",
                "…(first_padded(unit) - before{- shape.pad_top -> } + planes.x_rows, shape.H)",
            ),
            "depthwise_planes_forward.cuh": (
                "const int height = (kKernel{- 1 -> }) * down.taps + 1",
                "…nt below = (end_output(unit){- 1 -> }) * down.stride - shape.pad_…",
                "…put(unit) - 1) * down.stride{- shape.pad_top -> } + height",
            ),
        },
    ),
    (
        "A unit past the last has no images, and nothing is done for it.",
        {
            "depthwise_planes.cuh": (
                "…urn (shape.N + tiling.images{- 1 -> }) / tiling.images * tiling.b…",
                "…shape.N + tiling.images - 1){/ tiling.images -> } * tiling.bands",
            ),
            "depthwise_planes_backward.cuh": (
                "const int64_t end = {begin + tiling.units_per_part < units -> true} ? begin + tiling.units_per_…",
                "const int64_t end = begin{+ tiling.units_per_part -> } < units ? begin + tiling.un…",
            ),
            "depthwise_planes_forward.cuh": (
                "const int64_t end = {begin + tiling.units_per_part < units -> true} ? begin + tiling.units_per_…",
                "const int64_t end = begin{+ tiling.units_per_part -> } < units ? begin + tiling.un…",
            ),
        },
    ),
    (
        "The image that it then belongs to is overwritten.",
        {
            "simt_depthwise_forward.cuh": ("…ce = place_of(shape, element{- plane * image_pixels -> })",),
        },
    ),
    (
        "Which of the two buffers is the first.",
        {
            "depthwise_planes_backward.cuh": ("int parity = {0 -> 1}",),
            "depthwise_planes_forward.cuh": ("int parity = {0 -> 1}",),
        },
    ),
    (
        "A kernel has fewer sums than a block has threads: the loop runs once at most.",
        {
            "depthwise_planes_backward.cuh": ("i += {kPlaneThreads -> 2 * (kPlaneThreads)})",),
        },
    ),
    (
        "How many rows they are is not asked of the runs that go out.",
        {
            "depthwise_planes_forward.cuh": (
                "…, params.y.stride_n, end_row{- first_row -> }, (end_row - first_row) * sh…",
            ),
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
        "One element past an array of the thread's own, through a reference: one past the end is no error to "
        "-fsanitize=bounds where only an address is made of it.",
        {
            "depthwise_strips.cuh": ("i {< -> <=} 4",),
        },
    ),
    (
        "Of 7x7 in 16 bits alone, where a lane has one channel and a warp copies two rows at a time: it is not among "
        "INSTANCES. tests/test_depthwise_kernels.py runs it.",
        {
            "depthwise_strips.cuh": (
                "{values[0] = convert<float>(word); -> ;}",
                "… += lane() / Traits::kPieces{% Traits::kColumns -> }",
                "row_ = vertical.at(row{+ own_row() -> })",
                "… i, lane() / Traits::kPieces{% Traits::kColumns -> })",
            ),
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
