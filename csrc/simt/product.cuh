// product.cuh - the matrix product of the SIMT family: a block's tile, slab by slab, on the CUDA cores.
//
//     a [depth][row]     b [depth][column]       one slab in shared memory, written by whoever knows what it holds
//            \            /
//      acc [row][column] += a * b                registers: each thread owns a square corner of the tile
//
// The forward multiplies depthwise results (pixel x channel) with weights, the backward gradients with weights and
// gradients with depthwise results: three products, one tile.
#pragma once

#include "../common/image.cuh"
#include "../params.h"
#include "../primitives/platform.h"

namespace fused_sepconv {

// Scalar is what memory holds, Compute what is calculated and accumulated in.
template <class Scalar_, class Compute_, Layout layout>
struct SimtTraits {
  using Scalar = Scalar_;
  using Compute = Compute_;
  static constexpr Layout kLayout = layout;
  static constexpr int kRows = 64;
  static constexpr int kColumns = 64;
  static constexpr int kDepth = 16;
  static constexpr int kSide = 16;   // the block's threads as a square over the tile
  static constexpr int kCorner = 4;  // rows and columns of the tile that a thread owns
  static constexpr int kThreads = kSide * kSide;
  static constexpr int kBlocksPerSm = 2;  // 104 to 114 registers in float64, 71 to 106 in the others: both fit

  static_assert(kRows == kSide * kCorner && kColumns == kSide * kCorner, "the corners cover the tile");
  static_assert(kThreads % kDepth == 0 && kThreads % kRows == 0, "a thread keeps its fast index while it fills a slab");

  // Rows are padded by 4 elements: a warp that writes a column of 16 depths then meets each bank twice, not 16 times,
  // and rows stay 16-byte aligned for the reads.
  struct Slab {
    Compute a[kDepth][kRows + 4];
    Compute b[kDepth][kColumns + 4];
  };
};

// Calls body(fast, slow) for every pair of indices below kFast and kSlow, spread over the block so that neighbouring
// threads differ in the fast one.
template <class Traits, int kFast, int kSlow, class Body>
FSC_DEVICE void for_each(const Body& body) {
  static_assert(kFast * kSlow % Traits::kThreads == 0, "no ragged fills");
  FSC_UNROLL
  for (int step = 0; step < kFast * kSlow / Traits::kThreads; ++step) {
    const int i = threadIdx.x + step * Traits::kThreads;
    body(i % kFast, i / kFast);
  }
}

// The same for (channel, pixel) pairs of an image in the traits' layout: channels are the fast index in NHWC.
template <class Traits, int kChannels, int kPixels, class Body>
FSC_DEVICE void for_each_channel_and_pixel(const Body& body) {
  if constexpr (Traits::kLayout == Layout::nhwc)
    for_each<Traits, kChannels, kPixels>(body);
  else
    for_each<Traits, kPixels, kChannels>([&](int pixel, int channel) { body(channel, pixel); });
}

// The corner of the tile that a thread owns, and its part of the product.
template <class Traits>
struct Corner {
  using Compute = typename Traits::Compute;
  int row, column;  // first of kCorner
  Compute acc[Traits::kCorner][Traits::kCorner];

  // Neighbouring threads own neighbouring columns, or rows: whichever are neighbours in the memory that the result
  // goes to.
  FSC_DEVICE explicit Corner(bool columns_are_fast) {
    const int fast = threadIdx.x % Traits::kSide * Traits::kCorner;
    const int slow = threadIdx.x / Traits::kSide * Traits::kCorner;
    row = columns_are_fast ? slow : fast;
    column = columns_are_fast ? fast : slow;
    FSC_UNROLL
    for (int i = 0; i < Traits::kCorner; ++i) {
      FSC_UNROLL
      for (int j = 0; j < Traits::kCorner; ++j) acc[i][j] = Compute(0);
    }
  }

  // Adds a slab's product. In float32 a slab is summed by itself first: one long chain of 728 additions strayed 2.2
  // times as far from the truth as PyTorch's blocked product, and sums of sums stay well within it.
  FSC_DEVICE void multiply(const typename Traits::Slab& slab) {
    if constexpr (sizeof(Compute) == sizeof(double)) {
      accumulate(slab, acc);
    } else {
      Compute sum[Traits::kCorner][Traits::kCorner] = {};
      accumulate(slab, sum);
      FSC_UNROLL
      for (int i = 0; i < Traits::kCorner; ++i) {
        FSC_UNROLL
        for (int j = 0; j < Traits::kCorner; ++j) acc[i][j] += sum[i][j];
      }
    }
  }

 private:
  FSC_DEVICE void accumulate(const typename Traits::Slab& slab, Compute (&into)[Traits::kCorner][Traits::kCorner]) {
    FSC_UNROLL
    for (int depth = 0; depth < Traits::kDepth; ++depth) {
      Compute a[Traits::kCorner], b[Traits::kCorner];
      FSC_UNROLL
      for (int i = 0; i < Traits::kCorner; ++i) a[i] = slab.a[depth][row + i];
      FSC_UNROLL
      for (int j = 0; j < Traits::kCorner; ++j) b[j] = slab.b[depth][column + j];
      FSC_UNROLL
      for (int i = 0; i < Traits::kCorner; ++i) {
        FSC_UNROLL
        for (int j = 0; j < Traits::kCorner; ++j) into[i][j] += a[i] * b[j];
      }
    }
  }
};

// Where kPixels output pixels from `first` on lie; those past `end` are marked as absent.
template <class Traits, int kPixels>
FSC_DEVICE void locate_pixels(const ConvShape& shape, int64_t first, int64_t end, Place (&places)[kPixels]) {
  for (int i = threadIdx.x; i < kPixels; i += Traits::kThreads)
    places[i] = first + i < end ? place_of(shape, first + i) : Place{-1, 0, 0};
}

}  // namespace fused_sepconv
