// bindings.cpp - what Python sees of the native code; the only file that knows pybind11.
//
// A launch is prepared once for a signature: its instance, its ConvShape and tiling, and the strides of its tensors. A
// call gives addresses and a stream. Nothing is checked here: the families' launch.py are the only callers, and all is
// checked before.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "common/instance.h"

#ifdef FSC_EMULATED
#include "bind_emulator.h"
#include "emulated_buffers.h"
#endif

namespace py = pybind11;

namespace fused_sepconv {
namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// The instances of several families, by name.
template <class Made>
std::unordered_map<std::string, Made> by_name(std::initializer_list<std::vector<Made>> families) {
  std::unordered_map<std::string, Made> all;
  for (const auto& family : families)
    for (const Made& instance : family) all.emplace(instance.name, instance);
  return all;
}

const auto& forward_instances() {
  static const auto all = by_name({simt_forward_instances(), mma_forward_instances()});
  return all;
}

const auto& backward_instances() {
  static const auto all =
      by_name({simt_backward_intermediate_instances(), simt_backward_input_instances(),
               simt_backward_depthwise_weight_instances(), simt_backward_pointwise_weight_instances(),
               mma_backward_pointwise_weight_instances()});
  return all;
}

const auto& depthwise_forward_kernels() {
  static const auto all =
      by_name({simt_depthwise_forward_instances(), depthwise_forward_instances(), depthwise_nchw_forward_instances()});
  return all;
}

const auto& depthwise_backward_kernels() {
  static const auto all = by_name({depthwise_backward_instances(), depthwise_nchw_backward_instances()});
  return all;
}

const auto& mma_input_instances() {
  static const auto all = by_name({mma_backward_input_instances()});
  return all;
}

const auto& norm_add_kernels() {
  static const auto all = by_name({norm_add_instances()});
  return all;
}

const auto& norm_pool_kernels() {
  static const auto all = by_name({norm_pool_instances()});
  return all;
}

const auto& norm_pool_backward_kernels() {
  static const auto all = by_name({norm_pool_backward_instances()});
  return all;
}

const auto& reduce_instances() {
  static const auto all = by_name({reduce_splits_instances()});
  return all;
}

// Launches since the last reset_launch_counts(), whichever threads made them.
std::mutex counting;
std::unordered_map<const Instance*, int64_t> launches;

// Runs an instance, and counts it where the launch succeeded; in the emulation, on buffers that the emulator knows.
template <class Made, class Params>
void run(const Made& instance, const Params& params, Stream stream) {
#ifdef FSC_EMULATED
  std::optional<EmulatedBuffers> buffers;  // none in the null build: no launch touches them
  if (emulator::launches_run) buffers.emplace(instance, params);
#else
  load(instance);
#endif
  instance.run(instance, params, stream);
  const std::lock_guard<std::mutex> alone(counting);
  ++launches[&instance];
}

std::unordered_map<std::string, int64_t> launch_counts() {
  const std::lock_guard<std::mutex> alone(counting);
  std::unordered_map<std::string, int64_t> counts;
  for (const auto& [instance, count] : launches) counts.emplace(instance->name, count);
  return counts;
}

void reset_launch_counts() {
  const std::lock_guard<std::mutex> alone(counting);
  launches.clear();
}

// A prepared launch: an instance and its params, filled once for a signature of tensors. A call copies the params, so
// that threads may share one, sets the addresses and runs. Strides of a tensor that is not there are zeros.
template <class Made, class Params>
struct Launch {
  const Made& made;
  Params params;
};

using Strides = std::array<int64_t, 4>;  // of (N, channels, H, W), in elements

Image unplaced(const Strides& strides) { return {nullptr, strides[0], strides[1], strides[2], strides[3]}; }

// A tiling as Python gives it: its fields in the order of params.h.
template <class Tiling>
using Fields = std::array<int32_t, sizeof(Tiling) / sizeof(int32_t)>;

template <class Tiling>
Tiling tiling_of(const Fields<Tiling>& fields) {
  static_assert(sizeof fields == sizeof(Tiling) && std::is_trivially_copyable_v<Tiling>, "int32_t fields alone");
  Tiling tiling;
  std::memcpy(&tiling, &fields, sizeof tiling);
  return tiling;
}

using ForwardLaunch = Launch<ForwardInstance, ForwardParams>;

ForwardLaunch forward_launch(const std::string& instance, const ConvShape& shape, const Fields<MmaTiling>& tiling,
                             const Strides& x, const Strides& residual, const Strides& grad_output, const Strides& y) {
  ForwardParams params{};
  params.shape = shape;
  params.tiling = tiling_of<MmaTiling>(tiling);
  params.x = unplaced(x);
  params.residual = unplaced(residual);
  params.grad_output = unplaced(grad_output);
  params.y = unplaced(y);
  return {forward_instances().at(instance), params};
}

void run_forward(const ForwardLaunch& launch, Address x, Address depthwise_weight, Address pointwise_weight,
                 Address bias, Address depthwise_bias, Address residual, Address grad_output, Address y,
                 Stream stream) {
  ForwardParams params = launch.params;
  params.x.data = pointer(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.pointwise_weight = pointer(pointwise_weight);
  params.bias = pointer(bias);
  params.depthwise_bias = pointer(depthwise_bias);
  params.residual.data = pointer(residual);
  params.grad_output.data = pointer(grad_output);
  params.y.data = pointer(y);
  run(launch.made, params, stream);
}

using BackwardLaunch = Launch<BackwardInstance, BackwardParams>;

// One step of a backward; what the step does not use may be zeros and null.
BackwardLaunch backward_launch(const std::string& instance, const ConvShape& shape,
                               const Fields<MmaWeightTiling>& mma_weight, int64_t pixels_per_split, int splits,
                               const Strides& x, const Strides& grad_z, const Strides& grad_t, const Strides& grad_x) {
  BackwardParams params{};
  params.shape = shape;
  params.mma_weight = tiling_of<MmaWeightTiling>(mma_weight);
  params.pixels_per_split = pixels_per_split;
  params.splits = splits;
  params.x = unplaced(x);
  params.grad_z = unplaced(grad_z);
  params.grad_t = unplaced(grad_t);
  params.grad_x = unplaced(grad_x);
  return {backward_instances().at(instance), params};
}

void run_backward(const BackwardLaunch& launch, Address x, Address depthwise_weight, Address pointwise_weight,
                  Address depthwise_bias, Address grad_z, Address grad_t, Address grad_x, Address partial_weight,
                  Address partial_bias, Stream stream) {
  BackwardParams params = launch.params;
  params.x.data = pointer(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.pointwise_weight = pointer(pointwise_weight);
  params.depthwise_bias = pointer(depthwise_bias);
  params.grad_z.data = pointer(grad_z);
  params.grad_t.data = pointer(grad_t);
  params.grad_x.data = pointer(grad_x);
  params.partial_weight = pointer(partial_weight);
  params.partial_bias = pointer(partial_bias);
  run(launch.made, params, stream);
}

using DepthwiseForwardLaunch = Launch<DepthwiseForwardInstance, DepthwiseForwardParams>;

DepthwiseForwardLaunch depthwise_forward_launch(const std::string& instance, const ConvShape& shape,
                                                const Fields<NhwcTiling>& tiling, const Fields<NchwTiling>& planes,
                                                const Strides& x, const Strides& grad_output, const Strides& y) {
  DepthwiseForwardParams params{};
  params.shape = shape;
  params.tiling = tiling_of<NhwcTiling>(tiling);
  params.planes = tiling_of<NchwTiling>(planes);
  params.x = unplaced(x);
  params.grad_output = unplaced(grad_output);
  params.y = unplaced(y);
  return {depthwise_forward_kernels().at(instance), params};
}

void run_depthwise_forward(const DepthwiseForwardLaunch& launch, Address x, Address depthwise_weight,
                           Address depthwise_bias, Address grad_output, Address y, Stream stream) {
  DepthwiseForwardParams params = launch.params;
  params.x.data = pointer(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.depthwise_bias = pointer(depthwise_bias);
  params.grad_output.data = pointer(grad_output);
  params.y.data = pointer(y);
  run(launch.made, params, stream);
}

// A prepared launch of a normalised instance.
void run_normalised_forward(const DepthwiseForwardLaunch& launch, Address x, Address scale, Address shift,
                            Address depthwise_weight, Address depthwise_bias, Address y, Stream stream) {
  DepthwiseForwardParams params = launch.params;
  params.x.data = pointer(x);
  params.affine = {static_cast<float*>(pointer(scale)), static_cast<float*>(pointer(shift))};
  params.depthwise_weight = pointer(depthwise_weight);
  params.depthwise_bias = pointer(depthwise_bias);
  params.y.data = pointer(y);
  run(launch.made, params, stream);
}

using DepthwiseBackwardLaunch = Launch<DepthwiseBackwardInstance, DepthwiseBackwardParams>;

DepthwiseBackwardLaunch depthwise_backward_launch(const std::string& instance, const ConvShape& shape,
                                                  const Fields<NhwcTiling>& tiling, const Fields<NchwTiling>& planes,
                                                  const Strides& x, const Strides& grad_output, const Strides& grad_x) {
  DepthwiseBackwardParams params{};
  params.shape = shape;
  params.tiling = tiling_of<NhwcTiling>(tiling);
  params.planes = tiling_of<NchwTiling>(planes);
  params.x = unplaced(x);
  params.grad_output = unplaced(grad_output);
  params.grad_x = unplaced(grad_x);
  return {depthwise_backward_kernels().at(instance), params};
}

void run_depthwise_backward(const DepthwiseBackwardLaunch& launch, Address x, Address depthwise_weight,
                            Address depthwise_bias, Address grad_output, Address grad_x, Address partial_weight,
                            Address partial_bias, Stream stream) {
  DepthwiseBackwardParams params = launch.params;
  params.x.data = pointer(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.depthwise_bias = pointer(depthwise_bias);
  params.grad_output.data = pointer(grad_output);
  params.grad_x.data = pointer(grad_x);
  params.partial_weight = static_cast<float*>(pointer(partial_weight));
  params.partial_bias = static_cast<float*>(pointer(partial_bias));
  run(launch.made, params, stream);
}

// A prepared launch of a normalised instance.
void run_normalised_backward(const DepthwiseBackwardLaunch& launch, Address x, Address scale, Address shift,
                             Address mean, Address depthwise_weight, Address grad_t, Address dz, Address partial_weight,
                             Address partial_bias, Address partial_affine, Stream stream) {
  DepthwiseBackwardParams params = launch.params;
  params.x.data = pointer(x);
  params.affine = {static_cast<float*>(pointer(scale)), static_cast<float*>(pointer(shift))};
  params.mean = static_cast<float*>(pointer(mean));
  params.depthwise_weight = pointer(depthwise_weight);
  params.grad_output.data = pointer(grad_t);
  params.grad_x.data = pointer(dz);
  params.partial_weight = static_cast<float*>(pointer(partial_weight));
  params.partial_bias = static_cast<float*>(pointer(partial_bias));
  params.partial_affine = static_cast<float*>(pointer(partial_affine));
  run(launch.made, params, stream);
}

using MmaInputLaunch = Launch<MmaInputInstance, MmaInputParams>;

MmaInputLaunch mma_input_launch(const std::string& instance, const ConvShape& shape,
                                const Fields<MmaInputTiling>& tiling, const Strides& x, const Strides& grad_z) {
  MmaInputParams params{};
  params.shape = shape;
  params.tiling = tiling_of<MmaInputTiling>(tiling);
  params.x = unplaced(x);
  params.grad_z = unplaced(grad_z);
  return {mma_input_instances().at(instance), params};
}

void run_mma_input(const MmaInputLaunch& launch, Address x, Address depthwise_weight, Address pointwise_weight,
                   Address grad_z, Address grad_x, Address partial_weight, Address partial_bias, Stream stream) {
  MmaInputParams params = launch.params;
  params.x.data = pointer(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.pointwise_weight = pointer(pointwise_weight);
  params.grad_z.data = pointer(grad_z);
  params.grad_x = pointer(grad_x);
  params.partial_weight = static_cast<float*>(pointer(partial_weight));
  params.partial_bias = static_cast<float*>(pointer(partial_bias));
  run(launch.made, params, stream);
}

Affine affine_of(Address scale, Address shift) {
  return {static_cast<float*>(pointer(scale)), static_cast<float*>(pointer(shift))};
}

using NormAddLaunch = Launch<NormAddInstance, NormAddParams>;

NormAddLaunch norm_add_launch(const std::string& instance, int64_t pixels, int channels) {
  NormAddParams params{};
  params.pixels = pixels;
  params.C = channels;
  return {norm_add_kernels().at(instance), params};
}

void run_norm_add(const NormAddLaunch& launch, Address x, Address scale, Address shift, Address other,
                  Address other_scale, Address other_shift, Address y, Stream stream) {
  NormAddParams params = launch.params;
  params.x = pointer(x);
  params.affine = affine_of(scale, shift);
  params.other = pointer(other);
  params.other_affine = affine_of(other_scale, other_shift);
  params.y = pointer(y);
  run(launch.made, params, stream);
}

// N, C, H, W, out_h, out_w, pad_top, pad_left.
PoolShape pool_shape_of(const std::array<int64_t, 8>& sizes) {
  const auto size = [&](int i) { return static_cast<int32_t>(sizes[i]); };
  return {sizes[0], size(1), size(2), size(3), size(4), size(5), size(6), size(7)};
}

using NormPoolLaunch = Launch<NormPoolInstance, NormPoolParams>;

NormPoolLaunch norm_pool_launch(const std::string& instance, const std::array<int64_t, 8>& sizes) {
  NormPoolParams params{};
  params.shape = pool_shape_of(sizes);
  return {norm_pool_kernels().at(instance), params};
}

void run_norm_pool(const NormPoolLaunch& launch, Address x, Address scale, Address shift, Address picked, Address index,
                   Stream stream) {
  NormPoolParams params = launch.params;
  params.x = pointer(x);
  params.affine = affine_of(scale, shift);
  params.picked = pointer(picked);
  params.index = static_cast<uint8_t*>(pointer(index));
  run(launch.made, params, stream);
}

using NormPoolBackwardLaunch = Launch<NormPoolBackwardInstance, NormPoolBackwardParams>;

NormPoolBackwardLaunch norm_pool_backward_launch(const std::string& instance, const std::array<int64_t, 8>& sizes) {
  NormPoolBackwardParams params{};
  params.shape = pool_shape_of(sizes);
  return {norm_pool_backward_kernels().at(instance), params};
}

void run_norm_pool_backward(const NormPoolBackwardLaunch& launch, Address grad, Address index, Address x,
                            Address factor, Address mean, Address mean_g, Address slope, Address grad_x,
                            Stream stream) {
  NormPoolBackwardParams params = launch.params;
  params.grad = pointer(grad);
  params.index = static_cast<uint8_t*>(pointer(index));
  params.x = pointer(x);
  params.factor = static_cast<float*>(pointer(factor));
  params.mean = static_cast<float*>(pointer(mean));
  params.mean_g = static_cast<float*>(pointer(mean_g));
  params.slope = static_cast<float*>(pointer(slope));
  params.grad_x = pointer(grad_x);
  run(launch.made, params, stream);
}

using ReduceLaunch = Launch<ReduceInstance, ReduceParams>;

ReduceLaunch reduce_launch(const std::string& instance, int64_t count, int splits) {
  return {reduce_instances().at(instance), ReduceParams{nullptr, nullptr, count, splits}};
}

void run_reduce(const ReduceLaunch& launch, Address partials, Address out, Stream stream) {
  ReduceParams params = launch.params;
  params.partials = pointer(partials);
  params.out = pointer(out);
  run(launch.made, params, stream);
}

template <class Body>
void for_each_instance(const Body& body) {
  for (const auto& [name, instance] : forward_instances()) body(instance);
  for (const auto& [name, instance] : backward_instances()) body(instance);
  for (const auto& [name, instance] : depthwise_forward_kernels()) body(instance);
  for (const auto& [name, instance] : depthwise_backward_kernels()) body(instance);
  for (const auto& [name, instance] : mma_input_instances()) body(instance);
  for (const auto& [name, instance] : norm_add_kernels()) body(instance);
  for (const auto& [name, instance] : norm_pool_kernels()) body(instance);
  for (const auto& [name, instance] : norm_pool_backward_kernels()) body(instance);
  for (const auto& [name, instance] : reduce_instances()) body(instance);
}

py::list instances() {
  py::list result;
  for_each_instance([&](const Instance& instance) {
    py::dict figures;
    figures["name"] = instance.name;
    figures["spelling"] = instance.spelling;
    figures["threads"] = instance.threads;
    figures["shared_bytes"] = instance.shared_bytes;
    result.append(figures);
  });
  return result;
}

py::dict build_info() {
  py::dict result;
#ifdef FSC_EMULATED
  result["emulated"] = true;  // built by the tests from the sources at hand: there is nothing else to tell
#else
  result["emulated"] = false;
  result["version"] = FUSED_SEPCONV_VERSION;
  result["architectures"] = FUSED_SEPCONV_ARCHITECTURES;
  result["nvcc"] = FUSED_SEPCONV_NVCC;
  result["sources"] = FUSED_SEPCONV_SOURCES;
#endif
  return result;
}

// The CUDA version that the driver supports, as 1000 * major + 10 * minor; 0 where there is no driver.
int driver_version() {
  int version = 0;
#ifndef FSC_EMULATED
  check(cudaDriverGetVersion(&version), "the driver", "cudaDriverGetVersion");
#endif
  return version;
}

#ifndef FSC_EMULATED

// The driver's figures of every instance on the current device. Loads them all. Raises where there is no usable driver,
// no device, or no code for its architecture.
py::dict attributes() {
  py::dict result;
  for_each_instance([&](const Instance& instance) {
    cudaFuncAttributes of;
    check(cudaFuncGetAttributes(&of, instance.kernel), instance.name.c_str(), "cudaFuncGetAttributes");
    py::dict figures;
    figures["registers"] = of.numRegs;
    figures["local_bytes"] = of.localSizeBytes;
    figures["binary_version"] = of.binaryVersion;
    result[py::str(instance.name)] = figures;
  });
  return result;
}

// Whether the build runs on the current device: loads one small kernel. (error's name, what it says, whether asking
// again can't change it); empty strings where it runs.
std::tuple<std::string, std::string, bool> probe() {
  cudaFuncAttributes of;
  const cudaError_t status = cudaFuncGetAttributes(&of, reduce_instances().at("reduce_splits_float32").kernel);
  if (status == cudaSuccess) return {"", "", false};
  (void)cudaGetLastError();
  bool permanent = false;
  for (const cudaError_t lasting :
       {cudaErrorInsufficientDriver, cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction,
        cudaErrorUnsupportedPtxVersion, cudaErrorJitCompilerNotFound, cudaErrorInvalidPtx, cudaErrorInvalidKernelImage,
        cudaErrorSystemDriverMismatch, cudaErrorCompatNotSupportedOnDevice})
    permanent = permanent || status == lasting;
  return {cudaGetErrorName(status), cudaGetErrorString(status), permanent};
}

// Makes a device current, with its primary context.
void set_device(int index) { check(cudaSetDevice(index), "the device", "cudaSetDevice"); }

// A device's figures, as the driver has them; no context is made.
py::dict device_attributes(int index) {
  py::dict result;
  for (const auto& [name, attribute] : std::initializer_list<std::pair<const char*, cudaDeviceAttr>>{
           {"major", cudaDevAttrComputeCapabilityMajor},
           {"minor", cudaDevAttrComputeCapabilityMinor},
           {"sms", cudaDevAttrMultiProcessorCount},
           {"clock_khz", cudaDevAttrClockRate},
           {"memory_clock_khz", cudaDevAttrMemoryClockRate},
           {"memory_bus_bits", cudaDevAttrGlobalMemoryBusWidth},
           {"l2_bytes", cudaDevAttrL2CacheSize},
           {"block_shared_bytes", cudaDevAttrMaxSharedMemoryPerBlockOptin},
           {"sm_shared_bytes", cudaDevAttrMaxSharedMemoryPerMultiprocessor},
           {"sm_threads", cudaDevAttrMaxThreadsPerMultiProcessor},
           {"sm_registers", cudaDevAttrMaxRegistersPerMultiprocessor}}) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, index), "the device", "cudaDeviceGetAttribute");
    result[name] = value;
  }
  return result;
}

#endif

}  // namespace
}  // namespace fused_sepconv

PYBIND11_MODULE(_native, m) {
  using namespace fused_sepconv;
  m.doc() = "The kernels of fused_sepconv.";

  // Types are local to the module, so that a process may hold the device's and the emulation's.
  py::enum_<Activation>(m, "Activation", py::module_local())
      .value("none", Activation::none)
      .value("relu", Activation::relu)
      .value("relu6", Activation::relu6)
      .value("elu", Activation::elu)
      .value("silu", Activation::silu)
      .value("hardswish", Activation::hardswish)
      .value("gelu", Activation::gelu);

  py::class_<ConvShape>(m, "ConvShape", py::module_local())
      .def(py::init<>())
      .def_readwrite("N", &ConvShape::N)
      .def_readwrite("C", &ConvShape::C)
      .def_readwrite("H", &ConvShape::H)
      .def_readwrite("W", &ConvShape::W)
      .def_readwrite("K", &ConvShape::K)
      .def_readwrite("F", &ConvShape::F)
      .def_readwrite("out_h", &ConvShape::out_h)
      .def_readwrite("out_w", &ConvShape::out_w)
      .def_readwrite("multiplier", &ConvShape::multiplier)
      .def_readwrite("kernel_h", &ConvShape::kernel_h)
      .def_readwrite("kernel_w", &ConvShape::kernel_w)
      .def_readwrite("stride_h", &ConvShape::stride_h)
      .def_readwrite("stride_w", &ConvShape::stride_w)
      .def_readwrite("pad_top", &ConvShape::pad_top)
      .def_readwrite("pad_left", &ConvShape::pad_left)
      .def_readwrite("dilation_h", &ConvShape::dilation_h)
      .def_readwrite("dilation_w", &ConvShape::dilation_w)
      .def_readwrite("pre_activation", &ConvShape::pre_activation)
      .def_readwrite("mid_activation", &ConvShape::mid_activation)
      .def_readwrite("activation", &ConvShape::activation);

  const py::call_guard<py::gil_scoped_release> without_gil;
  py::class_<ForwardLaunch>(m, "ForwardLaunch", py::module_local())
      .def(py::init(&forward_launch), py::arg("instance"), py::arg("shape"), py::arg("tiling"), py::arg("x"),
           py::arg("residual"), py::arg("grad_output"), py::arg("y"))
      .def("__call__", &run_forward, without_gil);
  py::class_<BackwardLaunch>(m, "BackwardLaunch", py::module_local())
      .def(py::init(&backward_launch), py::arg("instance"), py::arg("shape"), py::arg("mma_weight"),
           py::arg("pixels_per_split"), py::arg("splits"), py::arg("x"), py::arg("grad_z"), py::arg("grad_t"),
           py::arg("grad_x"))
      .def("__call__", &run_backward, without_gil);
  py::class_<DepthwiseForwardLaunch>(m, "DepthwiseForwardLaunch", py::module_local())
      .def(py::init(&depthwise_forward_launch), py::arg("instance"), py::arg("shape"), py::arg("tiling"),
           py::arg("planes"), py::arg("x"), py::arg("grad_output"), py::arg("y"))
      .def("__call__", &run_depthwise_forward, without_gil)
      .def("normalised", &run_normalised_forward, without_gil);
  py::class_<DepthwiseBackwardLaunch>(m, "DepthwiseBackwardLaunch", py::module_local())
      .def(py::init(&depthwise_backward_launch), py::arg("instance"), py::arg("shape"), py::arg("tiling"),
           py::arg("planes"), py::arg("x"), py::arg("grad_output"), py::arg("grad_x"))
      .def("__call__", &run_depthwise_backward, without_gil)
      .def("normalised", &run_normalised_backward, without_gil);
  py::class_<MmaInputLaunch>(m, "MmaInputLaunch", py::module_local())
      .def(py::init(&mma_input_launch), py::arg("instance"), py::arg("shape"), py::arg("tiling"), py::arg("x"),
           py::arg("grad_z"))
      .def("__call__", &run_mma_input, without_gil);
  py::class_<NormAddLaunch>(m, "NormAddLaunch", py::module_local())
      .def(py::init(&norm_add_launch), py::arg("instance"), py::arg("pixels"), py::arg("channels"))
      .def("__call__", &run_norm_add, without_gil);
  py::class_<NormPoolLaunch>(m, "NormPoolLaunch", py::module_local())
      .def(py::init(&norm_pool_launch), py::arg("instance"), py::arg("sizes"))
      .def("__call__", &run_norm_pool, without_gil);
  py::class_<NormPoolBackwardLaunch>(m, "NormPoolBackwardLaunch", py::module_local())
      .def(py::init(&norm_pool_backward_launch), py::arg("instance"), py::arg("sizes"))
      .def("__call__", &run_norm_pool_backward, without_gil);
  py::class_<ReduceLaunch>(m, "ReduceLaunch", py::module_local())
      .def(py::init(&reduce_launch), py::arg("instance"), py::arg("count"), py::arg("splits"))
      .def("__call__", &run_reduce, without_gil);
  m.def("launch_counts", &launch_counts, "{instance name: launches since the last reset_launch_counts()}.");
  m.def("reset_launch_counts", &reset_launch_counts);
  m.def("instances", &instances);
  m.def("driver_version", &driver_version);
  m.def("build_info", &build_info);

#ifdef FSC_EMULATED
  bind_emulator(m);
#else
  m.def("attributes", &attributes);
  m.def("probe", &probe);
  m.def("set_device", &set_device, py::arg("index"));
  m.def("device_attributes", &device_attributes, py::arg("index"));
#endif
}
