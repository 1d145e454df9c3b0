// forward.cu - instances and grids of the fused forward on the tensor cores.

#include "../common/instances_of.h"
#include "forward.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const ForwardParams& params, Stream stream) {
  const MmaForwardParams<Traits> own(params);
  launch(instance.name.c_str(), mma_forward<Traits>, {params.tiling.blocks, instance.threads, own.layout.bytes}, stream,
         own);
}

template <class Scalar, int kernel, int inner_stride, int pixels, int slab_bytes>
ForwardInstance make(const std::string& dtype, const std::string& kind) {
  using Traits = MmaForwardTraits<Scalar, kernel, inner_stride, pixels, slab_bytes>;
  const std::string shape = std::to_string(pixels) + "x" + std::to_string(Traits::kFeatures);
  auto made = make_instance<ForwardInstance, Scalar, float, mma_forward<Traits>>(
      "mma_forward_" + kind + "_" + shape + "_" + dtype, Traits::kThreads, kLargestSharedBytes);
  made.run = run<Traits>;
  return made;
}

// 256 pixels x 128 features only where the matrix product takes as long as the depthwise work: under larger kernels it
// does not matter that half of the features of the other shape are none.
template <class Scalar>
void add_kinds(std::vector<ForwardInstance>& instances, const std::string& dtype) {
  instances.push_back(make<Scalar, 3, 1, 128, 128>(dtype, "3x3"));
  instances.push_back(make<Scalar, 3, 1, 256, 128>(dtype, "3x3"));
  instances.push_back(make<Scalar, 3, 2, 128, 64>(dtype, "3x3_stride2"));
  instances.push_back(make<Scalar, 3, 2, 256, 64>(dtype, "3x3_stride2"));
  instances.push_back(make<Scalar, 5, 1, 128, 64>(dtype, "5x5"));
  instances.push_back(make<Scalar, 5, 2, 128, 64>(dtype, "5x5_stride2"));
  instances.push_back(make<Scalar, 7, 1, 128, 64>(dtype, "7x7"));
  instances.push_back(make<Scalar, 7, 2, 128, 64>(dtype, "7x7_stride2"));
  instances.push_back(make<Scalar, 0, 0, 128, 64>(dtype, "any"));
}

}  // namespace

std::vector<ForwardInstance> mma_forward_instances() {
  std::vector<ForwardInstance> instances;
  add_kinds<__nv_bfloat16>(instances, "bfloat16");
  add_kinds<__half>(instances, "float16");
  add_kinds<float>(instances, "tf32");
  return instances;
}

}  // namespace fused_sepconv
