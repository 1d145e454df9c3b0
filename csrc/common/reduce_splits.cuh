// reduce_splits.cuh - adds the parts of a split sum: out[i] = partials[0][i] + partials[1][i] + ..., in that order.
//
// One thread an element, neighbouring threads on neighbouring elements. No atomics and no dependence on the schedule:
// the same bits in every run. In float64, as there may be hundreds of parts and it costs nothing beside reading them.
#pragma once

#include "../params.h"
#include "../primitives/platform.h"

namespace fused_sepconv {

constexpr int kReduceThreads = 256;

template <class Scalar, class Compute>
FSC_KERNEL(kReduceThreads, 4)
reduce_splits(const FSC_CONST_PARAM ReduceParams params) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i >= params.count) return;
  const Compute* partials = static_cast<const Compute*>(params.partials);
  double sum = 0;
  for (int split = 0; split < params.splits; ++split) sum += partials[split * params.count + i];
  static_cast<Scalar*>(params.out)[i] = static_cast<Scalar>(sum);
}

}  // namespace fused_sepconv
