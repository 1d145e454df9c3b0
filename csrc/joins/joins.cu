// joins.cu - instances and grids of BatchNorm's joins.

#include "../common/instances_of.h"
#include "joins.cuh"

namespace fused_sepconv {
namespace {

template <class Scalar, class Params, auto kernel>
void run(const Instance& instance, const Params& params, int64_t pixels, int channels, int columns, int rows,
         Stream stream) {
  const int vectors = channels / kJoinVector<Scalar>;
  const Joined<Params> joined{params, static_cast<int>(pixels * vectors), Divisor(vectors), Divisor(columns),
                              Divisor(rows)};
  launch(instance.name.c_str(), kernel, {tiles(joined.count, kJoinThreads), kJoinThreads, 0}, stream, joined);
}

template <class Scalar>
NormAddInstance make_add(const std::string& dtype) {
  auto made = make_instance<NormAddInstance, Scalar, float, norm_add<Scalar>>("norm_add_" + dtype, kJoinThreads, 0);
  made.run = [](const Instance& instance, const NormAddParams& params, Stream stream) {
    run<Scalar, NormAddParams, norm_add<Scalar>>(instance, params, params.pixels, params.C, 1, 1, stream);
  };
  return made;
}

template <class Scalar>
NormPoolInstance make_pool(const std::string& dtype) {
  auto made = make_instance<NormPoolInstance, Scalar, float, norm_pool<Scalar>>("norm_pool_" + dtype, kJoinThreads, 0);
  made.run = [](const Instance& instance, const NormPoolParams& params, Stream stream) {
    const PoolShape& shape = params.shape;
    run<Scalar, NormPoolParams, norm_pool<Scalar>>(instance, params, shape.N * shape.out_h * shape.out_w, shape.C,
                                                   shape.out_w, shape.out_h, stream);
  };
  return made;
}

template <class Scalar>
NormPoolBackwardInstance make_pool_backward(const std::string& dtype) {
  auto made = make_instance<NormPoolBackwardInstance, Scalar, float, norm_pool_backward<Scalar>>(
      "norm_pool_backward_" + dtype, kJoinThreads, 0);
  made.run = [](const Instance& instance, const NormPoolBackwardParams& params, Stream stream) {
    const PoolShape& shape = params.shape;
    run<Scalar, NormPoolBackwardParams, norm_pool_backward<Scalar>>(instance, params, shape.N * shape.H * shape.W,
                                                                    shape.C, shape.W, shape.H, stream);
  };
  return made;
}

}  // namespace

std::vector<NormAddInstance> norm_add_instances() {
  return {make_add<float>("float32"), make_add<__half>("float16"), make_add<__nv_bfloat16>("bfloat16")};
}

std::vector<NormPoolInstance> norm_pool_instances() {
  return {make_pool<float>("float32"), make_pool<__half>("float16"), make_pool<__nv_bfloat16>("bfloat16")};
}

std::vector<NormPoolBackwardInstance> norm_pool_backward_instances() {
  return {make_pool_backward<float>("float32"), make_pool_backward<__half>("float16"),
          make_pool_backward<__nv_bfloat16>("bfloat16")};
}

}  // namespace fused_sepconv
