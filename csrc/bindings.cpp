// bindings.cpp - what Python sees of the native code; the only file that knows pybind11.
//
// A call names its instance, gives the ConvShape that its plan built once, and a tensor as an address, with strides
// where it is an image. Nothing is checked here: fused_sepconv/execution.py is the only caller and has checked
// everything.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
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
using ImageArgument = std::pair<Address, std::array<int64_t, 4>>;  // data_ptr(), stride() of (N, channels, H, W)

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

Image image(const ImageArgument& argument) {
  const auto& [address, strides] = argument;
  return {pointer(address), strides[0], strides[1], strides[2], strides[3]};
}

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

const auto& reduce_instances() {
  static const auto all = by_name({reduce_splits_instances()});
  return all;
}

// Runs an instance; in the emulation, on buffers that the emulator knows.
template <class Made, class Params>
void run(const Made& instance, const Params& params, Stream stream) {
#if defined(FSC_EMULATED) && !defined(FSC_NULL)
  const EmulatedBuffers buffers(instance, params);
#endif
  instance.run(instance, params, stream);
}

void forward(const std::string& instance, const ConvShape& shape, const ImageArgument& x, Address depthwise_weight,
             Address pointwise_weight, Address depthwise_bias, Address bias, const ImageArgument& residual,
             const ImageArgument& grad_output, const ImageArgument& y, const std::array<int32_t, 4>& tiling,
             Stream stream) {
  ForwardParams params;
  params.shape = shape;
  params.tiling = {tiling[0], tiling[1], tiling[2], tiling[3]};
  params.x = image(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.pointwise_weight = pointer(pointwise_weight);
  params.depthwise_bias = pointer(depthwise_bias);
  params.bias = pointer(bias);
  params.residual = image(residual);
  params.grad_output = image(grad_output);
  params.y = image(y);
  run(forward_instances().at(instance), params, stream);
}

// One step of a backward; what the step does not use may be null.
void backward(const std::string& instance, const ConvShape& shape, const ImageArgument& x, Address depthwise_weight,
              Address pointwise_weight, Address depthwise_bias, const ImageArgument& grad_z,
              const ImageArgument& grad_t, const ImageArgument& grad_x, Address partial_weight, Address partial_bias,
              int64_t pixels_per_split, int splits, const std::array<int32_t, 5>& mma_weight, Stream stream) {
  BackwardParams params;
  params.shape = shape;
  params.x = image(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.pointwise_weight = pointer(pointwise_weight);
  params.depthwise_bias = pointer(depthwise_bias);
  params.grad_z = image(grad_z);
  params.grad_t = image(grad_t);
  params.grad_x = image(grad_x);
  params.partial_weight = pointer(partial_weight);
  params.partial_bias = pointer(partial_bias);
  params.pixels_per_split = pixels_per_split;
  params.splits = splits;
  params.mma_weight = {mma_weight[0], mma_weight[1], mma_weight[2], mma_weight[3], mma_weight[4]};
  run(backward_instances().at(instance), params, stream);
}

void depthwise_forward(const std::string& instance, const ConvShape& shape, const NhwcTiling& tiling,
                       const NchwTiling& planes, const ImageArgument& x, Address depthwise_weight,
                       Address depthwise_bias, const ImageArgument& grad_output, const ImageArgument& y,
                       Stream stream) {
  DepthwiseForwardParams params;
  params.shape = shape;
  params.tiling = tiling;
  params.planes = planes;
  params.x = image(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.depthwise_bias = pointer(depthwise_bias);
  params.grad_output = image(grad_output);
  params.y = image(y);
  run(depthwise_forward_kernels().at(instance), params, stream);
}

void depthwise_backward(const std::string& instance, const ConvShape& shape, const NhwcTiling& tiling,
                        const NchwTiling& planes, const ImageArgument& x, Address depthwise_weight,
                        Address depthwise_bias, const ImageArgument& grad_output, const ImageArgument& grad_x,
                        Address partial_weight, Address partial_bias, Stream stream) {
  DepthwiseBackwardParams params;
  params.shape = shape;
  params.tiling = tiling;
  params.planes = planes;
  params.x = image(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.depthwise_bias = pointer(depthwise_bias);
  params.grad_output = image(grad_output);
  params.grad_x = image(grad_x);
  params.partial_weight = static_cast<float*>(pointer(partial_weight));
  params.partial_bias = static_cast<float*>(pointer(partial_bias));
  run(depthwise_backward_kernels().at(instance), params, stream);
}

// The tiling is (strips, part, parts, stages).
void mma_backward_input(const std::string& instance, const ConvShape& shape, const std::array<int32_t, 4>& tiling,
                        const ImageArgument& x, Address depthwise_weight, Address pointwise_weight,
                        const ImageArgument& grad_z, Address grad_x, Address partial_weight, Address partial_bias,
                        Stream stream) {
  MmaInputParams params;
  params.shape = shape;
  params.tiling = {tiling[0], tiling[1], tiling[2], tiling[3]};
  params.x = image(x);
  params.depthwise_weight = pointer(depthwise_weight);
  params.pointwise_weight = pointer(pointwise_weight);
  params.grad_z = image(grad_z);
  params.grad_x = pointer(grad_x);
  params.partial_weight = static_cast<float*>(pointer(partial_weight));
  params.partial_bias = static_cast<float*>(pointer(partial_bias));
  run(mma_input_instances().at(instance), params, stream);
}

void reduce(const std::string& instance, Address partials, Address out, int64_t count, int splits, Stream stream) {
  run(reduce_instances().at(instance), ReduceParams{pointer(partials), pointer(out), count, splits}, stream);
}

template <class Body>
void for_each_instance(const Body& body) {
  for (const auto& [name, instance] : forward_instances()) body(instance);
  for (const auto& [name, instance] : backward_instances()) body(instance);
  for (const auto& [name, instance] : depthwise_forward_kernels()) body(instance);
  for (const auto& [name, instance] : depthwise_backward_kernels()) body(instance);
  for (const auto& [name, instance] : mma_input_instances()) body(instance);
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

// The CUDA version that the driver serves, as 1000 * major + 10 * minor; 0 where there is no driver.
int driver_version() {
  int version = 0;
#ifndef FSC_EMULATED
  check(cudaDriverGetVersion(&version), "the driver", "cudaDriverGetVersion");
#endif
  return version;
}

// What the driver says of every instance on the current device. Raises where there is no usable driver, no device, or
// no code for its architecture.
py::dict attributes() {
  py::dict result;
#ifndef FSC_EMULATED
  for_each_instance([&](const Instance& instance) {
    cudaFuncAttributes of;
    check(cudaFuncGetAttributes(&of, instance.kernel), instance.name.c_str(), "cudaFuncGetAttributes");
    py::dict figures;
    figures["registers"] = of.numRegs;
    figures["local_bytes"] = of.localSizeBytes;
    figures["binary_version"] = of.binaryVersion;
    result[py::str(instance.name)] = figures;
  });
#endif
  return result;
}

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

  py::class_<NhwcTiling>(m, "NhwcTiling", py::module_local())
      .def(py::init<>())
      .def_readwrite("phases_h", &NhwcTiling::phases_h)
      .def_readwrite("phases_w", &NhwcTiling::phases_w)
      .def_readwrite("column_tiles", &NhwcTiling::column_tiles)
      .def_readwrite("tile_columns", &NhwcTiling::tile_columns)
      .def_readwrite("first_row", &NhwcTiling::first_row)
      .def_readwrite("first_column", &NhwcTiling::first_column)
      .def_readwrite("groups", &NhwcTiling::groups)
      .def_readwrite("groups_per_part", &NhwcTiling::groups_per_part)
      .def_readwrite("parts", &NhwcTiling::parts)
      .def_readwrite("warps", &NhwcTiling::warps)
      .def_readwrite("shared_bytes", &NhwcTiling::shared_bytes);

  py::class_<NchwTiling>(m, "NchwTiling", py::module_local())
      .def(py::init<>())
      .def_readwrite("images", &NchwTiling::images)
      .def_readwrite("rows", &NchwTiling::rows)
      .def_readwrite("bands", &NchwTiling::bands)
      .def_readwrite("first_row", &NchwTiling::first_row)
      .def_readwrite("first_column", &NchwTiling::first_column)
      .def_readwrite("columns", &NchwTiling::columns)
      .def_readwrite("units_per_part", &NchwTiling::units_per_part)
      .def_readwrite("parts", &NchwTiling::parts)
      .def_readwrite("shared_bytes", &NchwTiling::shared_bytes);

  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("forward", &forward, without_gil, py::arg("instance"), py::arg("shape"), py::arg("x"),
        py::arg("depthwise_weight"), py::arg("pointwise_weight"), py::arg("depthwise_bias"), py::arg("bias"),
        py::arg("residual"), py::arg("grad_output"), py::arg("y"), py::arg("tiling"), py::arg("stream"));
  m.def("backward", &backward, without_gil, py::arg("instance"), py::arg("shape"), py::arg("x"),
        py::arg("depthwise_weight"), py::arg("pointwise_weight"), py::arg("depthwise_bias"), py::arg("grad_z"),
        py::arg("grad_t"), py::arg("grad_x"), py::arg("partial_weight"), py::arg("partial_bias"),
        py::arg("pixels_per_split"), py::arg("splits"), py::arg("mma_weight"), py::arg("stream"));
  m.def("depthwise_forward", &depthwise_forward, without_gil, py::arg("instance"), py::arg("shape"), py::arg("tiling"),
        py::arg("planes"), py::arg("x"), py::arg("depthwise_weight"), py::arg("depthwise_bias"), py::arg("grad_output"),
        py::arg("y"), py::arg("stream"));
  m.def("depthwise_backward", &depthwise_backward, without_gil, py::arg("instance"), py::arg("shape"),
        py::arg("tiling"), py::arg("planes"), py::arg("x"), py::arg("depthwise_weight"), py::arg("depthwise_bias"),
        py::arg("grad_output"), py::arg("grad_x"), py::arg("partial_weight"), py::arg("partial_bias"),
        py::arg("stream"));
  m.def("mma_backward_input", &mma_backward_input, without_gil, py::arg("instance"), py::arg("shape"),
        py::arg("tiling"), py::arg("x"), py::arg("depthwise_weight"), py::arg("pointwise_weight"), py::arg("grad_z"),
        py::arg("grad_x"), py::arg("partial_weight"), py::arg("partial_bias"), py::arg("stream"));
  m.def("reduce", &reduce, without_gil, py::arg("instance"), py::arg("partials"), py::arg("out"), py::arg("count"),
        py::arg("splits"), py::arg("stream"));
  m.def("instances", &instances);
  m.def("attributes", &attributes);
  m.def("driver_version", &driver_version);
  m.def("build_info", &build_info);

#ifdef FSC_EMULATED
  bind_emulator(m);
#endif
}
