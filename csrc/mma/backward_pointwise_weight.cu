// backward_pointwise_weight.cu - instances and grids of the gradients of the pointwise weight and the last bias
// on the tensor cores.

#include "../common/instances_of.h"
#include "backward_pointwise_weight.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const BackwardParams& params, Stream stream) {
  const MmaWeightParams<Traits> own(params);
  const int64_t blocks = int64_t{own.tiles.feature_tiles} * own.tiles.channel_tiles * params.splits;
  launch(instance.name.c_str(), mma_backward_pointwise_weight<Traits>,
         {blocks, instance.threads, own.layout.bytes(own.tiles)}, stream, own);
}

template <class Scalar, int kernel, int inner_stride, int cell_rows>
BackwardInstance make(const std::string& kind, const std::string& dtype) {
  using Traits = MmaWeightTraits<Scalar, kernel, inner_stride, cell_rows>;
  auto made = make_instance<BackwardInstance, Scalar, float, mma_backward_pointwise_weight<Traits>>(
      "mma_backward_pointwise_weight_" + kind + "_" + dtype, Traits::kThreads, kLargestSharedBytes);
  made.step = BackwardStep::pointwise_weight;
  made.run = run<Traits>;
  return made;
}

template <class Scalar>
void add_kinds(std::vector<BackwardInstance>& instances, const std::string& dtype) {
  instances.push_back(make<Scalar, 3, 1, 4>("3x3", dtype));
  instances.push_back(make<Scalar, 3, 2, 2>("3x3_stride2", dtype));
  instances.push_back(make<Scalar, 0, 0, 2>("any", dtype));
}

}  // namespace

std::vector<BackwardInstance> mma_backward_pointwise_weight_instances() {
  std::vector<BackwardInstance> instances;
  add_kinds<__nv_bfloat16>(instances, "bfloat16");
  add_kinds<__half>(instances, "float16");
  add_kinds<float>(instances, "tf32");
  return instances;
}

}  // namespace fused_sepconv
