// instances_of.h - the dtypes and layouts that a family is compiled for, and the names of its instances.
#pragma once

#include <cxxabi.h>

#include <cstdlib>
#include <initializer_list>
#include <string>
#include <typeinfo>
#include <vector>

#include "image.cuh"
#include "instance.h"
#include "launch.h"

namespace fused_sepconv {

inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <auto kernel>
struct KernelName {};

// A kernel's C++ spelling, such as "void fused_sepconv::reduce_splits<float, float>(fused_sepconv::ReduceParams)". It
// is read from a type's name: a kernel's own symbol is the compiler's affair, and local to the object.
template <auto kernel>
std::string spelling_of() {
  int status = 0;
  char* demangled = abi::__cxa_demangle(typeid(KernelName<kernel>).name(), nullptr, nullptr, &status);
  const std::string type = status == 0 ? demangled : "";
  std::free(demangled);
  const size_t begin = type.find("&(");
  const size_t end = type.rfind(")>");
  return begin == std::string::npos || end == std::string::npos ? "" : type.substr(begin + 2, end - begin - 2);
}

// Everything that a kernel's launch needs besides its params. `Made` is one of the Instance structs.
template <class Made, class Scalar, class Compute, auto kernel>
Made make_instance(const std::string& name, int threads, int shared_bytes) {
  Made made;
  made.name = name;
  made.spelling = spelling_of<kernel>();
  made.scalar_bytes = sizeof(Scalar);
  made.compute_bytes = sizeof(Compute);
  made.threads = threads;
  made.shared_bytes = shared_bytes;
  made.kernel = reinterpret_cast<const void*>(kernel);
  return made;
}

// An instance that is launched with the params of the call, its own threads and shared memory, and `blocks(params)`.
template <class Made, class Scalar, class Compute, auto kernel, auto blocks>
Made make_plain_instance(const std::string& name, int threads, int shared_bytes) {
  Made made = make_instance<Made, Scalar, Compute, kernel>(name, threads, shared_bytes);
  made.run = [](const Instance& instance, const auto& params, Stream stream) {
    launch(instance.name.c_str(), kernel, {blocks(params), instance.threads, instance.shared_bytes}, stream, params);
  };
  return made;
}

// {Family::make<Scalar, Compute, layout>("<family>_<dtype>_<layout>"), ...}: every dtype in both layouts. 16-bit types
// are stored as they are and calculated in float32.
template <class Family>
auto in_every_dtype_and_layout(const std::string& family) {
  return std::vector{
      Family::template make<double, double, Layout::nhwc>(family + "_float64_nhwc"),
      Family::template make<double, double, Layout::nchw>(family + "_float64_nchw"),
      Family::template make<float, float, Layout::nhwc>(family + "_float32_nhwc"),
      Family::template make<float, float, Layout::nchw>(family + "_float32_nchw"),
      Family::template make<__half, float, Layout::nhwc>(family + "_float16_nhwc"),
      Family::template make<__half, float, Layout::nchw>(family + "_float16_nchw"),
      Family::template make<__nv_bfloat16, float, Layout::nhwc>(family + "_bfloat16_nhwc"),
      Family::template make<__nv_bfloat16, float, Layout::nchw>(family + "_bfloat16_nchw"),
  };
}

// {Family::make<Scalar, kernel, stride>("<family>_<kernel>x<kernel>_s<stride>_<dtype>"), ...}: the kernels that are
// compiled for a kernel size and a stride, in the dtypes that are calculated in float32. (Family is a type and no
// template: g++ takes a function with a template of an unnamed namespace for the same in all files.)
template <class Family, int kernel, int stride>
auto in_every_narrow_dtype(const std::string& family) {
  return std::vector{
      Family::template make<float, kernel, stride>(family + "_float32"),
      Family::template make<__half, kernel, stride>(family + "_float16"),
      Family::template make<__nv_bfloat16, kernel, stride>(family + "_bfloat16"),
  };
}

template <class Made>
std::vector<Made> all_of(std::initializer_list<std::vector<Made>> parts) {
  std::vector<Made> all;
  for (const std::vector<Made>& some : parts) all.insert(all.end(), some.begin(), some.end());
  return all;
}

template <class Made, class Family>
std::vector<Made> for_every_kernel(const std::string& family) {
  return all_of<Made>({
      in_every_narrow_dtype<Family, 3, 1>(family + "_3x3_s1"),
      in_every_narrow_dtype<Family, 3, 2>(family + "_3x3_s2"),
      in_every_narrow_dtype<Family, 5, 1>(family + "_5x5_s1"),
      in_every_narrow_dtype<Family, 5, 2>(family + "_5x5_s2"),
      in_every_narrow_dtype<Family, 7, 1>(family + "_7x7_s1"),
      in_every_narrow_dtype<Family, 7, 2>(family + "_7x7_s2"),
  });
}

// The same of the kernels that normalise their input: "<family>_<kernel>x<kernel>_s<stride>_<dtype>", up to 5x5.
template <class Made, class Family>
std::vector<Made> for_every_normalised_kernel(const std::string& family) {
  return all_of<Made>({
      in_every_narrow_dtype<Family, 3, 1>(family + "_3x3_s1"),
      in_every_narrow_dtype<Family, 3, 2>(family + "_3x3_s2"),
      in_every_narrow_dtype<Family, 5, 1>(family + "_5x5_s1"),
      in_every_narrow_dtype<Family, 5, 2>(family + "_5x5_s2"),
  });
}

// The same of kernels that take a dilation: "<family>_<kernel>x<kernel>_dilated_<dtype>".
template <class Made, class Family>
std::vector<Made> for_every_dilated_kernel(const std::string& family) {
  return all_of<Made>({
      in_every_narrow_dtype<Family, 3, 1>(family + "_3x3_dilated"),
      in_every_narrow_dtype<Family, 5, 1>(family + "_5x5_dilated"),
      in_every_narrow_dtype<Family, 7, 1>(family + "_7x7_dilated"),
  });
}

}  // namespace fused_sepconv
