// joins.cuh - BatchNorm's last step, joined to the addition or the max-pooling that reads its result.
//
//     norm_add             x, other --> y = (scale * x + shift) + other, or + (scale' * other + shift')
//     norm_pool            x --> picked, index: of each 3 x 3 window, where scale * x + shift is largest
//     norm_pool_backward   grad, index, x --> grad_x, through the pooling and through BatchNorm
//
// So BatchNorm's result is never written, nor the gradient of it, and an index takes a byte where PyTorch's takes
// eight. The pooled value itself is not written either: the addition that follows makes it of `picked`, from which
// BatchNorm's two sums over the gradient are made too.
//
// Who owns what: a thread has 16 bytes of a pixel of its result: neighbouring threads, neighbouring channels, then
// pixels. There is no shared memory and no barrier. A window's pixels are read by up to four threads (and a gradient's
// windows by as many): rows that lie together in time, so that all but the first reading is in L1 or L2.
//
// Right as PyTorch is: what is compared, and what is added, was rounded to the tensors' type before. Of equal values
// the first in the window's rows is picked; a NaN wins, and the last one of several. A gradient is the sum of its
// windows' in a fixed order, in float32.
//
// Floor: the bytes of the images above, each once.
#pragma once

#include "../common/divisor.cuh"
#include "../params.h"
#include "../primitives/convert.h"
#include "../primitives/vector.h"

namespace fused_sepconv {

constexpr int kJoinThreads = 256;

// A call's params with the divisors that take a thread's number apart.
template <class Params>
struct Joined {
  Params params;
  int count;        // threads that have something to do
  Divisor vectors;  // of a pixel
  Divisor columns;  // of the image whose pixels the threads have
  Divisor rows;
};

template <class Scalar>
constexpr int kJoinVector = 16 / sizeof(Scalar);

template <class Scalar>
using JoinVector = Vector<Scalar, kJoinVector<Scalar>>;

// A channel's values for the channels of a thread.
template <int N>
struct ChannelValues {
  float values[N];

  FSC_DEVICE explicit ChannelValues(const float* source) {
    FSC_UNROLL
    for (int j = 0; j < N; j += 4) {
      const auto four = load_read_only<4>(source + j);
      FSC_UNROLL
      for (int i = 0; i < 4; ++i) values[j + i] = four[i];
    }
  }
  FSC_DEVICE float operator[](int j) const { return values[j]; }
};

// scale * x + shift as BatchNorm would have written it.
template <class Scalar>
FSC_DEVICE float normalised(Scalar x, float scale, float shift) {
  return convert<float>(convert<Scalar>(scale * convert<float>(x) + shift));
}

template <class Scalar>
FSC_KERNEL(kJoinThreads, 4)
norm_add(const FSC_CONST_PARAM Joined<NormAddParams> launch) {
  constexpr int kVector = kJoinVector<Scalar>;
  using Channels = ChannelValues<kVector>;
  const NormAddParams& params = launch.params;
  int rest = static_cast<int>(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (rest >= launch.count) return;
  const int64_t at = static_cast<int64_t>(rest) * kVector;
  const int channel = launch.vectors.split(rest) * kVector;

  const auto x = load_read_only<kVector>(static_cast<const Scalar*>(params.x) + at);
  const Channels scale(params.affine.scale + channel), shift(params.affine.shift + channel);
  float sum[kVector];
  FSC_UNROLL
  for (int j = 0; j < kVector; ++j) sum[j] = normalised(x[j], scale[j], shift[j]);
  if (params.other != nullptr) {
    const auto other = load_read_only<kVector>(static_cast<const Scalar*>(params.other) + at);
    if (params.other_affine.scale != nullptr) {
      const Channels its_scale(params.other_affine.scale + channel), its_shift(params.other_affine.shift + channel);
      FSC_UNROLL
      for (int j = 0; j < kVector; ++j) sum[j] += normalised(other[j], its_scale[j], its_shift[j]);
    } else {
      FSC_UNROLL
      for (int j = 0; j < kVector; ++j) sum[j] += convert<float>(other[j]);
    }
  }
  JoinVector<Scalar> y;
  FSC_UNROLL
  for (int j = 0; j < kVector; ++j) y[j] = convert<Scalar>(sum[j]);
  store_global(static_cast<Scalar*>(params.y) + at, y);
}

template <class Scalar>
FSC_KERNEL(kJoinThreads, 4)
norm_pool(const FSC_CONST_PARAM Joined<NormPoolParams> launch) {
  constexpr int kVector = kJoinVector<Scalar>;
  using Channels = ChannelValues<kVector>;
  const NormPoolParams& params = launch.params;
  const PoolShape& shape = params.shape;
  int rest = static_cast<int>(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (rest >= launch.count) return;
  const int64_t at = static_cast<int64_t>(rest) * kVector;
  const int channel = launch.vectors.split(rest) * kVector;
  const int left = 2 * launch.columns.split(rest) - shape.pad_left;
  const int top = 2 * launch.rows.split(rest) - shape.pad_top;
  const Scalar* image = static_cast<const Scalar*>(params.x) + channel;
  const int64_t first_row = static_cast<int64_t>(rest) * shape.H;

  const Channels scale(params.affine.scale + channel), shift(params.affine.shift + channel);
  JoinVector<Scalar> picked;
  float largest[kVector];
  int place[kVector];
  FSC_UNROLL
  for (int j = 0; j < kVector; ++j) place[j] = -1;
  FSC_ROLLED
  for (int row = 0; row < 3; ++row) {
    if (static_cast<unsigned>(top + row) >= static_cast<unsigned>(shape.H)) continue;
    FSC_UNROLL
    for (int column = 0; column < 3; ++column) {
      if (static_cast<unsigned>(left + column) >= static_cast<unsigned>(shape.W)) continue;
      const int64_t pixel = (first_row + top + row) * shape.W + left + column;
      const auto x = load_read_only<kVector>(image + pixel * shape.C);
      FSC_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const float u = normalised(x[j], scale[j], shift[j]);
        if (place[j] >= 0 && u <= largest[j]) continue;
        if (place[j] >= 0 && u == u && largest[j] != largest[j]) continue;  // a NaN stays
        largest[j] = u;
        picked[j] = x[j];
        place[j] = 3 * row + column;
      }
    }
  }
  Vector<uint8_t, kVector> index;
  FSC_UNROLL
  for (int j = 0; j < kVector; ++j) index[j] = static_cast<uint8_t>(place[j]);
  store_global(static_cast<Scalar*>(params.picked) + at, picked);
  store(params.index + at, index);
}

template <class Scalar>
FSC_KERNEL(kJoinThreads, 4)
norm_pool_backward(const FSC_CONST_PARAM Joined<NormPoolBackwardParams> launch) {
  constexpr int kVector = kJoinVector<Scalar>;
  using Channels = ChannelValues<kVector>;
  const NormPoolBackwardParams& params = launch.params;
  const PoolShape& shape = params.shape;
  int rest = static_cast<int>(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (rest >= launch.count) return;
  const int64_t at = static_cast<int64_t>(rest) * kVector;
  const int channel = launch.vectors.split(rest) * kVector;
  const int column = launch.columns.split(rest) + shape.pad_left;
  const int row = launch.rows.split(rest) + shape.pad_top;
  const int64_t first_row = static_cast<int64_t>(rest) * shape.out_h;

  // Window w covers rows 2w to 2w + 2 of the padded image: a row lies in one window or in two.
  float g[kVector] = {};
  FSC_ROLLED
  for (int h = (row > 0 ? row - 1 : 0) / 2; h <= row / 2 && h < shape.out_h; ++h) {
    FSC_ROLLED
    for (int w = (column > 0 ? column - 1 : 0) / 2; w <= column / 2 && w < shape.out_w; ++w) {
      const int64_t from = ((first_row + h) * shape.out_w + w) * shape.C + channel;
      const auto index = load_read_only<kVector>(params.index + from);
      const auto grad = load_read_only<kVector>(static_cast<const Scalar*>(params.grad) + from);
      const int place = 3 * (row - 2 * h) + column - 2 * w;
      FSC_UNROLL
      for (int j = 0; j < kVector; ++j)
        if (index[j] == place) g[j] += convert<float>(grad[j]);
    }
  }

  const Channels factor(params.factor + channel);
  JoinVector<Scalar> grad_x;
  if (params.slope != nullptr) {
    const auto x = load_read_only<kVector>(static_cast<const Scalar*>(params.x) + at);
    const Channels mean(params.mean + channel), mean_g(params.mean_g + channel), slope(params.slope + channel);
    FSC_UNROLL
    for (int j = 0; j < kVector; ++j) g[j] -= mean_g[j] + (convert<float>(x[j]) - mean[j]) * slope[j];
  }
  FSC_UNROLL
  for (int j = 0; j < kVector; ++j) grad_x[j] = convert<Scalar>(factor[j] * g[j]);
  store_global(static_cast<Scalar*>(params.grad_x) + at, grad_x);
}

}  // namespace fused_sepconv
