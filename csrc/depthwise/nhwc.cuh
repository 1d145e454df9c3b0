// nhwc.cuh - what the depthwise kernels for NHWC share: channels of a lane, strips, rows on their way in.
//
// A block owns a chunk of channels and walks down strips. A pixel's chunk is 128 bytes (or 64), a word a lane: a warp
// that reads a pixel reads all banks once. Rows come by cp.async in pieces of 16 bytes into a ring of rows in shared
// memory, a group of rows ahead of the arithmetic.
#pragma once

#include "../common/activation.cuh"
#include "../common/image.cuh"
#include "../primitives/async_copy.h"
#include "../primitives/convert.h"
#include "../primitives/vector.h"
#include "../primitives/warp.h"

namespace fused_sepconv {

constexpr int kDepthwiseColumns = 4;  // neighbouring columns that a thread owns
constexpr int kPieceBytes = 16;       // what a copy moves

// A lane's channels of a pixel as one word of shared memory.
template <class Scalar, int channels>
struct LaneWord;

template <>
struct LaneWord<float, 1> {
  using Word = float;
  static FSC_DEVICE void unpack(Word word, float (&values)[1]) { values[0] = word; }
  static FSC_DEVICE Word pack(const float (&values)[1]) { return values[0]; }
};

template <class Scalar>
struct LaneWord<Scalar, 1> {
  using Word = Scalar;
  static FSC_DEVICE void unpack(Word word, float (&values)[1]) { values[0] = convert<float>(word); }
  static FSC_DEVICE Word pack(const float (&values)[1]) { return convert<Scalar>(values[0]); }
};

template <class Scalar>
struct LaneWord<Scalar, 2> {
  using Word = uint32_t;
  static FSC_DEVICE void unpack(Word word, float (&values)[2]) {
    const float2 pair = fused_sepconv::unpack<Scalar>(word);
    values[0] = pair.x, values[1] = pair.y;
  }
  static FSC_DEVICE Word pack(const float (&values)[2]) { return fused_sepconv::pack<Scalar>(values[0], values[1]); }
};

// What is fixed when a depthwise kernel is compiled. kRows: rows that a thread computes at a time; more of them read
// each row of the window less often, and take more registers.
template <class Scalar_, int kernel, int stride, int rows, int channels, int max_warps, int blocks_per_sm,
          bool normalised = false>
struct NhwcTraits {
  using Scalar = Scalar_;
  using Lane = LaneWord<Scalar, channels>;
  using Word = typename Lane::Word;
  static constexpr int kKernel = kernel;
  static constexpr int kTaps = kernel * kernel;
  static constexpr int kStride = stride;
  static constexpr bool kNormalised = normalised;  // x is scaled and shifted first (Affine in params.h)
  static constexpr int kRows = rows;
  static constexpr int kColumns = kDepthwiseColumns;
  static constexpr int kChannels = channels;            // of a lane
  static constexpr int kChunk = kWarpSize * kChannels;  // channels of a block
  static constexpr int kPixelBytes = kChunk * sizeof(Scalar);
  static constexpr int kPieces = kPixelBytes / kPieceBytes;  // of a pixel
  static constexpr int kPieceChannels = kPieceBytes / sizeof(Scalar);
  static constexpr int kMaxWarps = max_warps;
  static constexpr int kThreads = kWarpSize * kMaxWarps;
  static constexpr int kBlocksPerSm = blocks_per_sm;  // of so many threads

  static_assert(kKernel % 2 == 1 && (kStride == 1 || kStride == 2), "what the windows are computed for");
  static_assert(kRows % kStride == 0 && kColumns % kStride == 0, "groups and threads begin in the same phase");
  static_assert(sizeof(Word) == kChannels * sizeof(Scalar), "a word is a lane's channels");
  static_assert(kWarpSize % kPieces == 0, "a warp copies whole pixels");
};

// A group of rows: which image, phase and tile of columns it is in. Where the strips end, the next one begins.
struct DepthwiseGroup {
  int64_t n;
  int32_t phase_h, phase_w, tile, group;

  FSC_DEVICE DepthwiseGroup(const NhwcTiling& tiling, int64_t number) {
    const int64_t strip = number / tiling.groups;
    group = static_cast<int32_t>(number - strip * tiling.groups);
    const int64_t row_of_strips = strip / tiling.column_tiles;
    tile = static_cast<int32_t>(strip - row_of_strips * tiling.column_tiles);
    const int64_t phase = row_of_strips / tiling.phases_w;
    phase_w = static_cast<int32_t>(row_of_strips - phase * tiling.phases_w);
    n = phase / tiling.phases_h;
    phase_h = static_cast<int32_t>(phase - n * tiling.phases_h);
  }

  FSC_DEVICE void advance(const NhwcTiling& tiling) {
    if (++group < tiling.groups) return;
    group = 0;
    if (++tile < tiling.column_tiles) return;
    tile = 0;
    if (++phase_w < tiling.phases_w) return;
    phase_w = 0;
    if (++phase_h < tiling.phases_h) return;
    phase_h = 0;
    ++n;
  }
};

FSC_DEVICE int64_t depthwise_groups(const ConvShape& shape, const NhwcTiling& tiling) {
  return shape.N * tiling.phases_h * tiling.phases_w * tiling.column_tiles * tiling.groups;
}

// Rows and columns of one phase of an image: index i of the phase is row origin + i * pitch of the image.
struct PhaseAxis {
  int32_t origin, pitch, size;  // size: of the image

  FSC_DEVICE int32_t at(int32_t i) const { return origin + i * pitch; }
  FSC_DEVICE bool inside(int32_t i) const { return static_cast<uint32_t>(at(i)) < static_cast<uint32_t>(size); }
};

// The phase that a group is in: of x, and of the output.
FSC_DEVICE PhaseAxis input_rows(const ConvShape& shape, const DepthwiseGroup& group) {
  return {shape.stride_h * group.phase_h - shape.pad_top, shape.dilation_h, shape.H};
}
FSC_DEVICE PhaseAxis input_columns(const ConvShape& shape, const DepthwiseGroup& group) {
  return {shape.stride_w * group.phase_w - shape.pad_left, shape.dilation_w, shape.W};
}
FSC_DEVICE PhaseAxis output_rows(const ConvShape& shape, const NhwcTiling& tiling, const DepthwiseGroup& group) {
  return {group.phase_h, tiling.phases_h, shape.out_h};
}
FSC_DEVICE PhaseAxis output_columns(const ConvShape& shape, const NhwcTiling& tiling, const DepthwiseGroup& group) {
  return {group.phase_w, tiling.phases_w, shape.out_w};
}

// Rows of pixels in shared memory, used one after the other and round again. A place is where a row begins, in bytes.
template <class Traits>
struct RowRing {
  unsigned char* bytes;
  int32_t columns;  // of a row
  int32_t size;     // bytes of all rows

  FSC_DEVICE RowRing(unsigned char* bytes_, int columns_, int rows)
      : bytes(bytes_), columns(columns_), size(rows * columns_ * Traits::kPixelBytes) {}

  // The place so many rows further on, at most once round.
  FSC_DEVICE int32_t after(int32_t place, int32_t rows) const {
    const uint32_t further = place + rows * columns * Traits::kPixelBytes, round = further - size;
    return further < round ? further : round;  // the smaller: what is not yet round wraps to the largest numbers
  }
  FSC_DEVICE unsigned char* pixel(int32_t place, int32_t column) const {
    return bytes + place + column * Traits::kPixelBytes;
  }
  // A thread's pieces are those of every step-th column, in all rows; copying and whatever a thread does to its own
  // pieces agree.
  FSC_DEVICE int32_t own_column() const { return threadIdx.x / Traits::kPieces; }
  FSC_DEVICE int32_t own_step() const { return blockDim.x / Traits::kPieces; }
  FSC_DEVICE unsigned char* own_piece(int32_t place, int32_t column) const {
    return pixel(place, column) + threadIdx.x % Traits::kPieces * kPieceBytes;
  }
  template <class Body>
  FSC_DEVICE void for_each_own_piece(int32_t place, int32_t rows, const Body& body) const {
    for (int32_t column = own_column(); column < columns; column += own_step()) {
      int32_t at = place;
      for (int32_t row = 0; row < rows; ++row) {
        body(own_piece(at, column));
        at = after(at, 1);
      }
    }
  }
};

// The steps of an image in a block of so many warps: `pitch_h` and `pitch_w` are those of its phases.
template <class Traits>
StripSteps strip_steps(const Image& image, int pitch_h, int pitch_w, int warps) {
  const int64_t size = sizeof(typename Traits::Scalar);
  const int columns = warps * kWarpSize / Traits::kPieces;  // that a block copies at once
  return {pitch_h * image.stride_h * size, int64_t{columns} * pitch_w * image.stride_w * size};
}

// A thread's copies of an image's rows into a ring, down a strip: what a row's addresses need is found once a strip,
// and then is an addition a row. Zeros stand for what is outside the image, for columns past the strip's, and for
// channels from `channels` on.
template <class Traits>
class RowCopies {
 public:
  // The axes are those of any phase.
  FSC_DEVICE RowCopies(const Image& image, const StripSteps& steps, const PhaseAxis& vertical,
                       const PhaseAxis& horizontal, int first_channel, int channels)
      : image_(image),
        steps_(steps),
        height_(vertical.size),
        width_(horizontal.size),
        pitch_h_(vertical.pitch),
        pitch_w_(horizontal.pitch),
        first_channel_(first_channel + own_channel()),
        exists_(own_channel() < channels) {}

  // The next row is `row` of the phase, from `column` on; those from `column_end` on are not the strip's.
  FSC_DEVICE void start(int64_t n, const PhaseAxis& vertical, const PhaseAxis& horizontal, int32_t row, int32_t column,
                        int32_t column_end) {
    row_ = vertical.at(row);
    column_ = horizontal.at(column + own_column());
    const int32_t end = horizontal.at(column_end);
    column_end_ = end < 0 ? 0 : end < width_ ? end : width_;  // a strip may lie in the padding alone
    source_ = reinterpret_cast<const unsigned char*>(static_cast<const Scalar*>(image_.data) +
                                                     offset(image_, n, first_channel_, row_, column_));
  }

  // Starts the copies of the next kCount rows to a place of the ring.
  template <int kCount>
  FSC_DEVICE void bring(const RowRing<Traits>& ring, int32_t place) {
    bring_rows(ring, place, kCount, [](const auto& bring_one) {
      FSC_UNROLL
      for (int i = 0; i < kCount; ++i) bring_one();
    });
  }
  // The same for as many as a strip begins with: rarely, and so in little code.
  FSC_DEVICE void bring_first(const RowRing<Traits>& ring, int32_t place, int32_t count) {
    bring_rows(ring, place, count, [count](const auto& bring_one) {
      FSC_ROLLED
      for (int i = 0; i < count; ++i) bring_one();
    });
  }

 private:
  using Scalar = typename Traits::Scalar;
  static FSC_DEVICE int own_channel() { return threadIdx.x % Traits::kPieces * Traits::kPieceChannels; }
  static FSC_DEVICE int own_column() { return threadIdx.x / Traits::kPieces; }

  template <class Repeat>
  FSC_DEVICE void bring_rows(const RowRing<Traits>& ring, int32_t place, int32_t count, const Repeat& repeat) {
    const int32_t columns_at_once = ring.own_step();
    const unsigned char* next_column = source_;
    int32_t column = column_;
    for (int32_t j = ring.own_column(); j < ring.columns; j += columns_at_once) {
      const bool inside = exists_ && static_cast<uint32_t>(column) < static_cast<uint32_t>(column_end_);
      const unsigned char* source = next_column;
      int32_t to = place, row = row_;
      repeat([&] {
        const bool is_there = inside && static_cast<uint32_t>(row) < static_cast<uint32_t>(height_);
        async_copy<kPieceBytes>(shared_address(ring.own_piece(to, j)), is_there ? source : image_.data, is_there);
        to = ring.after(to, 1);
        source += steps_.row;
        row += pitch_h_;
      });
      next_column += steps_.column;
      column += columns_at_once * pitch_w_;
    }
    source_ += count * steps_.row;
    row_ += count * pitch_h_;
  }

  const Image& image_;
  const StripSteps& steps_;
  const int32_t height_, width_, pitch_h_, pitch_w_;
  const int32_t first_channel_;
  const bool exists_;
  const unsigned char* source_;        // the thread's channels in the next row and its first column
  int32_t row_, column_, column_end_;  // of the image
};

// The weights of a lane's channels; of channels past the last those of another. Those of large kernels go through the
// block's shared memory, to be read from memory in the order in which they lie.
template <class Traits>
FSC_DEVICE void load_weights(const void* weight, int first_channel, int K, unsigned char* shared,
                             float (&weights)[Traits::kTaps][Traits::kChannels]) {
  using Scalar = typename Traits::Scalar;
  constexpr bool kStaged = Traits::kTaps > 9;  // 3x3 has too few to wait for twice
  const Scalar* source = static_cast<const Scalar*>(weight) + static_cast<int64_t>(first_channel) * Traits::kTaps;
  const int channels = K - first_channel < Traits::kChunk ? K - first_channel : Traits::kChunk;
  Scalar* staged = reinterpret_cast<Scalar*>(shared);
  if (kStaged) {
    for (int i = threadIdx.x; i < channels * Traits::kTaps; i += blockDim.x) staged[i] = source[i];
    __syncthreads();
  }
  FSC_UNROLL
  for (int v = 0; v < Traits::kChannels; ++v) {
    const int own = threadIdx.x % kWarpSize * Traits::kChannels + v;
    const int channel = own < channels ? own : 0;
    FSC_UNROLL
    for (int tap = 0; tap < Traits::kTaps; ++tap)
      weights[tap][v] = convert<float>((kStaged ? staged : source)[channel * Traits::kTaps + tap]);
  }
  if (kStaged) __syncthreads();
}

// Adds the taps of neighbouring outputs to their sums: read(a, window) gives row a of the window that they share.
template <int kKernel, int kStride, int kRows, int kColumns, int kChannels, class Read>
FSC_DEVICE void add_taps(float (&sums)[kRows][kColumns][kChannels],
                         const float (&weights)[kKernel * kKernel][kChannels], const Read& read) {
  FSC_UNROLL
  for (int a = 0; a < (kRows - 1) * kStride + kKernel; ++a) {
    float window[(kColumns - 1) * kStride + kKernel][kChannels];
    read(a, window);
    FSC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int i = a - r * kStride;  // the tap that lies on this row
      if (i < 0 || i >= kKernel) continue;
      FSC_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        FSC_UNROLL
        for (int j = 0; j < kKernel; ++j) {
          FSC_UNROLL
          for (int v = 0; v < kChannels; ++v) sums[r][c][v] += weights[i * kKernel + j][v] * window[c * kStride + j][v];
        }
      }
    }
  }
}

// Applies an activation to `count` words. Rolled: a kernel has it once.
template <class Traits>
FSC_DEVICE void activate_words(Activation activation, const typename Traits::Word* from, typename Traits::Word* to,
                               int count) {
  FSC_ROLLED
  for (int i = 0; i < count; ++i) {
    float values[Traits::kChannels];
    Traits::Lane::unpack(from[i], values);
    FSC_UNROLL
    for (int v = 0; v < Traits::kChannels; ++v) values[v] = activate(activation, values[v]);
    to[i] = Traits::Lane::pack(values);
  }
}

// relu of a lane's channels as they are packed.
template <class Traits>
FSC_DEVICE typename Traits::Word relu_word(typename Traits::Word word) {
  if constexpr (Traits::kChannels == 2) {
    return relu_packed<typename Traits::Scalar>(word);
  } else {
    return activate(Activation::relu, convert<float>(word)) == 0.0f ? convert<typename Traits::Word>(0.0f) : word;
  }
}

// Applies an activation to a piece; relu to packed values, in an instruction a word.
template <class Traits>
FSC_DEVICE void activate_piece(Activation activation, const unsigned char* from, unsigned char* to) {
  using Word = typename Traits::Word;
  if (activation != Activation::relu) {
    activate_words<Traits>(activation, reinterpret_cast<const Word*>(from), reinterpret_cast<Word*>(to),
                           kPieceBytes / sizeof(Word));
    return;
  }
  Vector<uint32_t, 4> words = load<4>(reinterpret_cast<const uint32_t*>(from));
  FSC_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = relu_packed<typename Traits::Scalar>(words[i]);
  store(reinterpret_cast<uint32_t*>(to), words);
}

// Makes act(scale * x + shift) of a piece, in float32 and rounded once. known(i) is the scale (x) and shift (y) of its
// i-th value from registers; looked_up(i) the same for the activations that are rolled, where i is no constant.
template <class Traits, class Known, class LookedUp>
FSC_DEVICE void normalise_piece(Activation activation, const unsigned char* from, unsigned char* to, const Known& known,
                                const LookedUp& looked_up) {
  using Word = typename Traits::Word;
  using Lane = typename Traits::Lane;
  constexpr int kCount = Traits::kChannels;  // values of a word
  static_assert(sizeof(Word) == 4, "words of which activations are packed");
  if (activation != Activation::relu && activation != Activation::none) {
    FSC_ROLLED
    for (int i = 0; i < kPieceBytes / 4; ++i) {
      float values[kCount];
      Lane::unpack(reinterpret_cast<const Word*>(from)[i], values);
      FSC_UNROLL
      for (int v = 0; v < kCount; ++v) {
        const float2 affine = looked_up(i * kCount + v);
        values[v] = activate(activation, affine.x * values[v] + affine.y);
      }
      reinterpret_cast<Word*>(to)[i] = Lane::pack(values);
    }
    return;
  }
  Vector<uint32_t, 4> words = load<4>(reinterpret_cast<const uint32_t*>(from));
  FSC_UNROLL
  for (int i = 0; i < 4; ++i) {
    Word word;
    memcpy(&word, &words[i], sizeof word);
    float values[kCount];
    Lane::unpack(word, values);
    FSC_UNROLL
    for (int v = 0; v < kCount; ++v) {
      const float2 affine = known(i * kCount + v);
      values[v] = affine.x * values[v] + affine.y;
    }
    word = Lane::pack(values);
    memcpy(&words[i], &word, sizeof word);
    if (activation == Activation::relu) words[i] = relu_packed<typename Traits::Scalar>(words[i]);
  }
  store(reinterpret_cast<uint32_t*>(to), words);
}

// Normalises the rows of x in NHWC, with the scale and shift of a block's channels in its shared memory.
template <class Traits>
class NhwcPrologue {
 public:
  // The block's channels from `first` on, `channels` of them at most, to `shared`. Waits for the block.
  FSC_DEVICE NhwcPrologue(const Affine& affine, Activation activation, int first, int channels, unsigned char* shared)
      : activation_(activation),
        exists_(own_channel() < channels),
        scale_(reinterpret_cast<float*>(shared)),
        shift_(scale_ + Traits::kChunk) {
    for (int i = threadIdx.x; i < Traits::kChunk; i += blockDim.x) {
      reinterpret_cast<float*>(shared)[i] = i < channels ? affine.scale[first + i] : 0.0f;
      reinterpret_cast<float*>(shared)[Traits::kChunk + i] = i < channels ? affine.shift[first + i] : 0.0f;
    }
    __syncthreads();
  }

  // scale * x + shift of a channel of the chunk.
  FSC_DEVICE float argument(int channel, float x) const { return scale_[channel] * x + shift_[channel]; }

  // Normalises what this thread has copied of `rows` rows at a place of the ring, from `row` and `column` of the phase
  // on, and puts it `beside` bytes further. What is outside the image is zero, and stays.
  FSC_DEVICE void apply(const RowRing<Traits>& ring, int32_t place, int rows, const PhaseAxis& vertical,
                        const PhaseAxis& horizontal, int32_t row, int32_t column, int32_t beside) const {
    const float *own_scale = scale_ + own_channel(), *own_shift = shift_ + own_channel();
    for (int32_t j = ring.own_column(); j < ring.columns; j += ring.own_step()) {
      const bool column_inside = exists_ && horizontal.inside(column + j);
      float2 affine[Traits::kPieceChannels];
      FSC_UNROLL
      for (int i = 0; i < Traits::kPieceChannels; i += 4) {
        const Vector<float, 4> scale = load<4>(own_scale + i), shift = load<4>(own_shift + i);
        FSC_UNROLL
        for (int v = 0; v < 4; ++v) affine[i + v] = make_float2(scale[v], shift[v]);
      }
      int32_t at = place;
      for (int32_t i = 0; i < rows; ++i) {
        unsigned char* piece = ring.own_piece(at, j);
        if (column_inside && vertical.inside(row + i))
          normalise_piece<Traits>(
              activation_, piece, piece + beside, [&](int c) { return affine[c]; },
              [&](int c) { return make_float2(own_scale[c], own_shift[c]); });
        else if (beside != 0)
          store(reinterpret_cast<uint32_t*>(piece + beside), Vector<uint32_t, 4>{});
        at = ring.after(at, 1);
      }
    }
  }

 private:
  static FSC_DEVICE int own_channel() { return threadIdx.x % Traits::kPieces * Traits::kPieceChannels; }

  const Activation activation_;
  const bool exists_;
  const float *scale_, *shift_;
};

// Stands in its place where x is taken as it is.
struct NoPrologue {
  template <class... Anything>
  FSC_DEVICE explicit NoPrologue(const Anything&...) {}
  template <class... Anything>
  FSC_DEVICE void apply(const Anything&...) const {}
  FSC_DEVICE float argument(int, float x) const { return x; }
};

// Shared memory of a block for it.
template <class Traits>
constexpr int prologue_bytes() {
  return Traits::kNormalised ? 2 * Traits::kChunk * sizeof(float) : 0;
}

template <class Traits>
using Prologue = std::conditional_t<Traits::kNormalised, NhwcPrologue<Traits>, NoPrologue>;

// A warp's stores of groups of kRows x kColumns pixels, down a strip: 16 bytes a lane of what the warp's lanes have
// left in shared memory. Not past the image, the strip's columns or `channels`.
template <class Traits>
class RowStores {
 public:
  // The axes are those of any phase.
  FSC_DEVICE RowStores(const Image& image, const StripSteps& steps, const PhaseAxis& vertical,
                       const PhaseAxis& horizontal, int first_channel, int channels)
      : image_(image),
        steps_(steps),
        height_(vertical.size),
        width_(horizontal.size),
        pitch_h_(vertical.pitch),
        pitch_w_(horizontal.pitch),
        first_channel_(first_channel + own_channel()),
        exists_(own_channel() < channels) {}

  // The next group is from row `row` and column `column` of the phase on.
  FSC_DEVICE void start(int64_t n, const PhaseAxis& vertical, const PhaseAxis& horizontal, int32_t row, int32_t column,
                        int32_t column_end) {
    column += lane() / Traits::kPieces % Traits::kColumns;
    inside_ = exists_ && column < column_end && horizontal.inside(column);
    row_ = vertical.at(row + own_row());
    destination_ = reinterpret_cast<unsigned char*>(static_cast<Scalar*>(image_.data) +
                                                    offset(image_, n, first_channel_, row_, horizontal.at(column)));
  }

  // staged(row, column): where in shared memory a pixel's channels begin.
  template <class Staged>
  FSC_DEVICE void store(const Staged& staged) {
    FSC_UNROLL
    for (int i = 0; i < Traits::kRows; i += kRowsAtOnce) {
      const void* source = staged(own_row() + i, lane() / Traits::kPieces % Traits::kColumns);
      store_global_where(inside_ && static_cast<uint32_t>(row_) < static_cast<uint32_t>(height_),
                         reinterpret_cast<Scalar*>(destination_),
                         load<Traits::kPieceChannels>(static_cast<const Scalar*>(source) + own_channel()));
      destination_ += kRowsAtOnce * steps_.row;
      row_ += kRowsAtOnce * pitch_h_;
    }
  }

 private:
  using Scalar = typename Traits::Scalar;
  static constexpr int kRowsAtOnce = kWarpSize / Traits::kPieces / Traits::kColumns;  // of one instruction
  static_assert(kRowsAtOnce > 0 && Traits::kRows % kRowsAtOnce == 0, "a lane keeps to its column");
  static FSC_DEVICE int lane() { return threadIdx.x % kWarpSize; }
  static FSC_DEVICE int own_channel() { return lane() % Traits::kPieces * Traits::kPieceChannels; }
  static FSC_DEVICE int own_row() { return lane() / Traits::kPieces / Traits::kColumns; }

  const Image& image_;
  const StripSteps& steps_;
  const int32_t height_, width_, pitch_h_, pitch_w_;
  const int32_t first_channel_;
  const bool exists_;
  bool inside_;
  unsigned char* destination_;
  int32_t row_;  // of the image
};

}  // namespace fused_sepconv
