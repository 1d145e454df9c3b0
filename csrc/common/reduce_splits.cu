// reduce_splits.cu - instances and grids of the ordered reduction.

#include "instances_of.h"
#include "reduce_splits.cuh"

namespace fused_sepconv {
namespace {

template <class Scalar, class Compute>
void run(const Instance& instance, const ReduceParams& params, Stream stream) {
  launch(instance.name.c_str(), reduce_splits<Scalar, Compute>,
         {tiles(params.count, kReduceThreads), instance.threads, instance.shared_bytes}, stream, params);
}

template <class Scalar, class Compute>
ReduceInstance make(const std::string& name) {
  auto made = make_instance<ReduceInstance, Scalar, Compute, reduce_splits<Scalar, Compute>>(name, kReduceThreads, 0);
  made.run = run<Scalar, Compute>;
  return made;
}

}  // namespace

std::vector<ReduceInstance> reduce_splits_instances() {
  return {make<double, double>("reduce_splits_float64"), make<float, float>("reduce_splits_float32"),
          make<__half, float>("reduce_splits_float16"), make<__nv_bfloat16, float>("reduce_splits_bfloat16")};
}

}  // namespace fused_sepconv
