// stream.cuh - how the tensor-core backward towards x lays out its work: all images as one stream of positions,
// and what a block keeps in shared memory.
//
// A 3x3 gather reads dT above, below and beside a pixel, and zeros past the image. Lay the rows of the images end to
// end, with room for those zeros between them, and each neighbour lies a fixed distance further down the stream:
//
//     image 0, row 0:   0 a b c        position p of x, p = 0, 1, 2, ...
//              row 1:   0 d e f        needs dT at p + r * pitch + c with r, c in 0..2
//              row 2:   0 0 0 0   <- one row and one column of zeros serve both neighbours
//     image 1, row 0:   0 g h i
//
// So a run of neighbouring positions is a run of rows of a matrix product, whatever the images' size, and what is
// computed needlessly are the zeros alone: 1 position in 75 for rows of 74 pixels.
//
// Phases (phases.cuh) and strips (the columns of wide images, cut so that a block holds fewer positions) are more
// images: a strip carries its right neighbour's first columns along in place of zeros.
//
// Computed on the host once a launch, and read from constant memory.
#pragma once

#include "../common/divisor.cuh"
#include "../params.h"
#include "../primitives/warp.h"

namespace fused_sepconv {

// One direction of the images' phases. Index q is output q of a phase; x's index q lies under the last tap of output q.
struct StreamAxis {
  int32_t phases, pitch;  // an undilated convolution for each of `dilation` phases
  int32_t offset;         // of x's index 0 from output 0's pixel number, in the image
  int32_t inputs, outputs;
  int32_t lead;    // positions before output 0
  int32_t length;  // positions of a phase, zeros between two of them included

  StreamAxis(int32_t kernel, int32_t dilation, int32_t padding, int32_t inputs_, int32_t outputs_)
      : phases(dilation),
        pitch(dilation),
        offset((kernel - 1) * dilation - padding),
        inputs(inputs_),
        outputs(outputs_) {
    const int32_t reach = kernel - 1;
    const int32_t longest = (outputs + phases - 1) / phases;  // outputs of phase 0
    // x's pixels of any phase have rho = q + reach, pixel = phase - padding + dilation * rho.
    const int32_t before = padding - (phases - 1);
    const int32_t first = before > 0 ? (before + pitch - 1) / pitch : 0;
    const int32_t last = (inputs - 1 + padding) / pitch;
    lead = first < reach ? reach - first : 0;
    const int32_t tail = last > longest - 1 ? last - (longest - 1) : 0;
    length = longest + (lead > tail ? lead : tail);
  }
  // The output, and the pixel of x, at a position of a phase; outside the image where there is none.
  FSC_DEVICE int32_t output(int32_t phase, int32_t position) const { return phase + pitch * (position - lead); }
  FSC_DEVICE int32_t input(int32_t phase, int32_t position) const { return output(phase, position) + offset; }
};

// The stream, in positions. Its length is the plan's to keep below 2^31.
struct MmaStream {
  StreamAxis vertical, horizontal;
  int32_t strips, strip_columns;  // strips of an image, and the columns of x of each
  int32_t pitch;                  // of a row: a strip's columns, and where there are several, two of its neighbour
  int32_t length;                 // of all images
  int32_t lag;                    // from a position to past the last that it needs, in whole groups of 8
  int32_t part;                   // positions of x of a part
  Divisor by_pitch, by_rows, by_strips, by_phases_w, by_phases_h;

  MmaStream(const ConvShape& shape, const MmaInputTiling& tiling)
      : vertical(shape.kernel_h, shape.dilation_h, shape.pad_top, shape.H, shape.out_h),
        horizontal(shape.kernel_w, shape.dilation_w, shape.pad_left, shape.W, shape.out_w),
        strips(tiling.strips),
        strip_columns((horizontal.length + strips - 1) / strips),
        pitch(strip_columns + (strips > 1 ? shape.kernel_w - 1 : 0)),
        length(static_cast<int32_t>(shape.N) * vertical.phases * horizontal.phases * strips * vertical.length * pitch),
        lag(((shape.kernel_h - 1) * pitch + shape.kernel_w - 1 + 7) / 8 * 8),
        part(tiling.part),
        by_pitch(pitch),
        by_rows(vertical.length),
        by_strips(strips),
        by_phases_w(horizontal.phases),
        by_phases_h(vertical.phases) {}

  // The place of a position that is not negative; past the last one, n is past the last image.
  struct Place {
    int32_t n, phase_h, phase_w, row, column;  // row and column: positions of the phase
    bool owned;                                // false in the columns that a strip has from its neighbour
  };
  FSC_DEVICE Place place(int32_t position) const {
    Place place;
    const int32_t column = by_pitch.split(position);
    place.row = by_rows.split(position);
    const int32_t strip = by_strips.split(position);
    place.phase_w = by_phases_w.split(position);
    place.phase_h = by_phases_h.split(position);
    place.n = position;
    place.column = strip * strip_columns + column;
    place.owned = column < strip_columns;
    return place;
  }
};

template <class Scalar_, int kernel>
struct MmaInputTraits {
  using Scalar = Scalar_;
  static constexpr int kKernel = kernel;
  static constexpr int kTaps = kernel * kernel;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRun = 32;                  // positions of a warp
  static constexpr int kTile = kWarps * kRun;      // positions that are computed at a time
  static constexpr int kGroup = 8;                 // positions of x that are read ahead
  static constexpr int kChannels = 2 * kWarpSize;  // of a block
  static constexpr int kVector = 16 / sizeof(Scalar);
  static constexpr int kFeatures = 16;  // of a slab: a step of mma.sync in depth

  static constexpr int kGradBytes = kTile * kFeatures * sizeof(Scalar);
  static constexpr int kStageBytes = kGradBytes + kFeatures * kChannels * sizeof(Scalar);
  // A position of the ring: 16 bytes more than its channels, so that neighbours' chunks lie in different banks.
  static constexpr int kPitch = kChannels * sizeof(Scalar) + 16;

  static_assert(sizeof(Scalar) == 2, "a lane's two channels are a word, and what ldmatrix transposes has 16 bits");
  static_assert(kernel == 3, "sums and windows of more taps do not fit the registers of two blocks");
  static_assert(kThreads == kTile, "a thread finds the place of one position of a tile");
};

// Where things lie in a block's shared memory, in bytes. What the plan computes as `shared_bytes`.
template <class Traits>
struct MmaInputLayout {
  int32_t capacity;                   // of the ring, in positions; its first 8 are there again past its end
  int32_t bias, ring, stages, bytes;  // the weights lie at 0

  explicit MmaInputLayout(const MmaStream& stream, int32_t stage_count) {
    capacity = Traits::kTile + stream.lag;
    bias = Traits::kTaps * Traits::kChannels * sizeof(typename Traits::Scalar);  // (taps, channels)
    ring = bias + Traits::kThreads * 2 * sizeof(float);                          // two channels' sums of each thread
    stages = ring + (capacity + Traits::kGroup) * Traits::kPitch;
    bytes = stages + stage_count * Traits::kStageBytes;
  }
  static_assert(Traits::kTaps * Traits::kChannels * sizeof(typename Traits::Scalar) % 128 == 0 &&
                    Traits::kGroup * Traits::kPitch % 128 == 0,
                "the stages' swizzles count on their beginning");
};

// An image's strides in units of 16 bytes: the plan sees to it that offsets fit 32 bits.
struct PixelOffsets {
  static constexpr uint32_t kNone = 0x80000000u;  // and what is above: the plan refuses images of 32 GiB
  uint32_t n, h, w;

  PixelOffsets(const Image& image, int element_bytes)
      : n(image.stride_n * element_bytes / 16),
        h(image.stride_h * element_bytes / 16),
        w(image.stride_w * element_bytes / 16) {}
  // The offset of a pixel, kNone where it is outside of an image of so many rows and columns.
  FSC_DEVICE uint32_t of(int32_t image, int32_t row, int32_t column, int32_t rows, int32_t columns) const {
    const bool inside = static_cast<uint32_t>(row) < static_cast<uint32_t>(rows) &&
                        static_cast<uint32_t>(column) < static_cast<uint32_t>(columns);
    return inside ? image * n + row * h + column * w : kNone;
  }
};

// The launch's own params: computed once on the host, and read from constant memory.
template <class Traits>
struct MmaInputLaunch {
  MmaInputParams call;
  MmaStream stream;
  MmaInputLayout<Traits> layout;
  PixelOffsets x, grad_z;
  Divisor by_chunks;  // of channels

  explicit MmaInputLaunch(const MmaInputParams& params)
      : call(params),
        stream(params.shape, params.tiling),
        layout(stream, params.tiling.stages),
        x(params.x, sizeof(typename Traits::Scalar)),
        grad_z(params.grad_z, sizeof(typename Traits::Scalar)),
        by_chunks((params.shape.K + Traits::kChannels - 1) / Traits::kChannels) {}
};

}  // namespace fused_sepconv
