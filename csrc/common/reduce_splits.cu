// reduce_splits.cu - instances and grids of the ordered reduction.

#include "instances_of.h"
#include "reduce_splits.cuh"

namespace fused_sepconv {
namespace {

int64_t blocks(const ReduceParams& params) { return tiles(params.count, kReduceThreads); }

template <class Scalar, class Compute>
ReduceInstance make(const std::string& name) {
  return make_plain_instance<ReduceInstance, Scalar, Compute, reduce_splits<Scalar, Compute>, blocks>(
      name, kReduceThreads, 0);
}

}  // namespace

std::vector<ReduceInstance> reduce_splits_instances() {
  return {make<double, double>("reduce_splits_float64"), make<float, float>("reduce_splits_float32"),
          make<__half, float>("reduce_splits_float16"), make<__nv_bfloat16, float>("reduce_splits_bfloat16")};
}

}  // namespace fused_sepconv
