// nchw.cuh - what the depthwise kernels for NCHW share: runs of rows on their way in and out.
//
// Rows of 19 or 147 elements are aligned to their element alone, but a run of whole rows of a plane is one range of
// addresses. It comes into shared memory as aligned pieces of 16 bytes, rounded outwards, to a place that is as far
// from a multiple of 16 as it is in memory; and goes out of one the same way, with single elements at its two ends.
#pragma once

#include "../common/divisor.cuh"
#include "nhwc.cuh"

namespace fused_sepconv {

constexpr int kNchwThreads = 128;
constexpr int kNchwColumns = 2;  // neighbouring columns that a thread owns

// What is fixed when a kernel for NCHW is compiled. A word is 4 bytes: what an activation is applied to at a time.
// A dilated kernel has stride 1 in each phase of the image (phases.cuh); what the call's stride is it asks the shape.
template <class Scalar_, int kernel, int stride, bool dilated, int rows, int blocks_per_sm, bool normalised = false>
struct NchwTraits {
  using Scalar = Scalar_;
  static constexpr int kChannels = 4 / sizeof(Scalar);  // elements of a word, which here are of one channel
  using Lane = LaneWord<Scalar, kChannels>;
  using Word = typename Lane::Word;
  static constexpr int kKernel = kernel;
  static constexpr int kTaps = kernel * kernel;
  static constexpr int kStride = stride;
  static constexpr bool kDilated = dilated;
  static constexpr bool kNormalised = normalised;  // x is scaled and shifted first (Affine in params.h)
  static constexpr int kRows = rows;
  static constexpr int kColumns = kNchwColumns;
  static constexpr int kPieceElements = kPieceBytes / sizeof(Scalar);
  static constexpr int kThreads = kNchwThreads;
  static constexpr int kBlocksPerSm = blocks_per_sm;

  static_assert(kKernel % 2 == 1 && (kStride == 1 || kStride == 2), "what the windows are computed for");
  static_assert(kRows % kStride == 0 && kColumns % kStride == 0, "threads begin in the same phase");
  static_assert(!kDilated || kStride == 1, "what the pitches are computed for");
};

// How far apart neighbours lie, along an axis: those of a window in x, and those of a thread. A dilated convolution is
// several plain ones side by side, and a thread's outputs and their windows are of one of them. Constants without
// dilation.
struct NchwPitch {
  int32_t stride;  // of the convolution: from an output to the next, in x
  int32_t taps;    // from a tap to the next, in x
  int32_t own;     // from an output of a thread to its next
};

template <class Traits>
FSC_HOST_DEVICE NchwPitch vertical_pitch(const ConvShape& shape) {
  if (!Traits::kDilated) return {Traits::kStride, 1, 1};
  return {shape.stride_h, shape.dilation_h, shape.dilation_h / shape.stride_h};
}
template <class Traits>
FSC_HOST_DEVICE NchwPitch horizontal_pitch(const ConvShape& shape) {
  if (!Traits::kDilated) return {Traits::kStride, 1, 1};
  return {shape.stride_w, shape.dilation_w, shape.dilation_w / shape.stride_w};
}

// How many items, each of `count` rows (or columns) that lie `pitch` apart, cover `size` of them.
template <int count>
FSC_HOST_DEVICE int items_over(int size, int pitch) {
  return (size + count * pitch - 1) / (count * pitch) * pitch;
}

// An item of a unit: what a thread computes at a time, from this image, row and column on.
struct NchwItem {
  int image, row, column;
};

// The items of a unit, of kRows x kColumns each, numbered column by column, row by row, image by image. Items side by
// side take in turn what lies between the rows (columns) of one. The host knows what numbers are divided by.
template <class Traits, int kRows>
class NchwItems {
 public:
  // Over `height` rows of an image, where a unit has several, and `width` columns.
  NchwItems(const ConvShape& shape, int height, int width)
      : pitch_h_(kRows == 1 ? 1 : vertical_pitch<Traits>(shape).own),
        pitch_w_(horizontal_pitch<Traits>(shape).own),
        rows_(items_over<kRows>(height, pitch_h_.divisor())),
        columns_(items_over<Traits::kColumns>(width, pitch_w_.divisor())) {}

  FSC_DEVICE int over(int images, int height) const {
    return images * items_over<kRows>(height, Traits::kDilated ? pitch_h_.divisor() : 1) * columns_.divisor();
  }
  FSC_DEVICE NchwItem at(int item, int images) const {
    NchwItem place{0, item, 0};
    place.column = begin<Traits::kColumns>(columns_.split(place.row), pitch_w_);
    if (images > 1) {
      place.image = place.row;
      place.row = rows_.split(place.image);
    }
    place.row = begin<kRows>(place.row, pitch_h_);
    return place;
  }

 private:
  template <int count>
  static FSC_DEVICE int begin(int item, const Divisor& pitch) {
    if (!Traits::kDilated || count == 1) return item * count;
    const int within = pitch.split(item);
    return item * count * pitch.divisor() + within;
  }

  Divisor pitch_h_, pitch_w_, rows_, columns_;
};

// Pieces of a slot for a run of so many elements, wherever it begins.
template <class Scalar>
int slot_pieces(int elements) {
  return (elements * static_cast<int>(sizeof(Scalar)) + 2 * kPieceBytes - 1) / kPieceBytes;
}

// A unit: which images, and which band of their rows. Where the bands end, the next images begin.
struct NchwUnit {
  int64_t n;       // first image
  int32_t images;  // how many
  int32_t band;

  FSC_DEVICE NchwUnit(const ConvShape& shape, const NchwTiling& tiling, int64_t number) {
    const int64_t group = number / tiling.bands;
    band = static_cast<int32_t>(number - group * tiling.bands);
    n = group * tiling.images;
    count_images(shape, tiling);
  }

  FSC_DEVICE void advance(const ConvShape& shape, const NchwTiling& tiling) {
    if (++band < tiling.bands) return;
    band = 0;
    n += tiling.images;
    count_images(shape, tiling);
  }

 private:
  FSC_DEVICE void count_images(const ConvShape& shape, const NchwTiling& tiling) {
    images = static_cast<int32_t>(n + tiling.images <= shape.N ? tiling.images : shape.N - n);
  }
};

FSC_DEVICE int64_t plane_units(const ConvShape& shape, const NchwTiling& tiling) {
  return (shape.N + tiling.images - 1) / tiling.images * tiling.bands;
}

// Runs of rows, one an image of a unit, in slots of shared memory. In the first image the run begins at `data`; those
// of other images are stride_n elements further.
template <class Traits>
struct NchwRows {
  using Scalar = typename Traits::Scalar;
  unsigned char* slots;
  const Divisor& pieces;  // of a slot
  const Scalar* data;
  int64_t stride_n;
  int32_t rows, count;  // rows and elements of a run

  FSC_DEVICE int pitch() const { return pieces.divisor() * kPieceBytes; }
  FSC_DEVICE const Scalar* run(int image) const { return data + image * stride_n; }
  // Bytes between a multiple of 16 and the run.
  FSC_DEVICE int shift(int image) const {
    return static_cast<int>(reinterpret_cast<uintptr_t>(run(image)) % kPieceBytes);
  }
  FSC_DEVICE Scalar* slot(int image) const { return reinterpret_cast<Scalar*>(slots + image * pitch() + shift(image)); }

  // body(image, piece): the pieces that a thread copies, and does what else is to be done to them.
  template <class Body>
  FSC_DEVICE void for_each_own_piece(int images, const Body& body) const {
    for (int i = threadIdx.x; i < images * pieces.divisor(); i += Traits::kThreads) {
      int image = 0, piece = i;
      if (images > 1) {
        image = i;
        piece = pieces.split(image);
      }
      body(image, piece);
    }
  }

  // Starts the copies, of whole pieces but for what lies past a run's end. The tensor begins at a multiple of 16, so no
  // piece begins before it.
  FSC_DEVICE void copy(int images) const {
    for_each_own_piece(images, [&](int image, int piece) {
      const int at = piece * kPieceBytes - shift(image);  // of the piece in the run, in bytes
      const int left = count * static_cast<int>(sizeof(Scalar)) - at;
      if (left <= 0) return;
      async_copy_some(shared_address(slots + image * pitch() + piece * kPieceBytes),
                      reinterpret_cast<const unsigned char*>(run(image)) + at, left < kPieceBytes ? left : kPieceBytes);
    });
  }

  // Applies an activation to what this thread has copied, from these slots to others of the same pitch.
  FSC_DEVICE void activate_own(int images, Activation activation, unsigned char* to) const {
    for_each_own_piece(images, [&](int image, int piece) {
      if (piece * kPieceBytes - shift(image) >= count * static_cast<int>(sizeof(Scalar))) return;
      const int at = image * pitch() + piece * kPieceBytes;
      activate_piece<Traits>(activation, slots + at, to + at);
    });
  }

  // The same of scale (x) * value + shift (y). A piece may reach beyond its run: that is never read.
  FSC_DEVICE void normalise_own(int images, Activation activation, float2 affine, unsigned char* to) const {
    for_each_own_piece(images, [&](int image, int piece) {
      if (piece * kPieceBytes - shift(image) >= count * static_cast<int>(sizeof(Scalar))) return;
      const int at = image * pitch() + piece * kPieceBytes;
      const auto same = [&](int) { return affine; };
      normalise_piece<Traits>(activation, slots + at, to + at, same, same);
    });
  }

  // Stores the slots' elements [begin, end) to an output whose runs lie as these do: whole pieces 16 bytes at a time.
  FSC_DEVICE void store_all(int images, Scalar* output, int begin, int end) const {
    for_each_own_piece(images, [&](int image, int piece) {
      const int first = piece * Traits::kPieceElements - shift(image) / static_cast<int>(sizeof(Scalar));
      Scalar* destination = output + image * stride_n + first;
      const Scalar* source = reinterpret_cast<const Scalar*>(slots + image * pitch() + piece * kPieceBytes);
      if (first >= begin && first + Traits::kPieceElements <= end) {
        store_global(destination, load<Traits::kPieceElements>(source));
        return;
      }
      for (int i = 0; i < Traits::kPieceElements; ++i)
        if (first + i >= begin && first + i < end) destination[i] = source[i];
    });
  }
};

// Reads a thread's window of a run of rows of W elements, whose `rows` rows begin at `pixels`: every pitch-th of row
// `row` from `column` on; zeros stand for what is beyond.
template <class Scalar, int count>
FSC_DEVICE void read_window(const Scalar* pixels, int rows, int W, int row, int column, int pitch,
                            float (&window)[count][1]) {
  const bool row_inside = static_cast<uint32_t>(row) < static_cast<uint32_t>(rows);
  FSC_UNROLL
  for (int b = 0; b < count; ++b) {
    const bool inside = row_inside && static_cast<uint32_t>(column + b * pitch) < static_cast<uint32_t>(W);
    window[b][0] = inside ? convert<float>(pixels[row * W + column + b * pitch]) : 0.0f;
  }
}

}  // namespace fused_sepconv
