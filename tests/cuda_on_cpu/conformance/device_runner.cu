// device_runner.cu - the primitives' test kernels on a real GPU, as a Python module; the twin of test_kernels/bind.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../test_kernels/registry.h"

std::map<std::string, TestKernel>& test_kernels() {
  static std::map<std::string, TestKernel> kernels;
  return kernels;
}

namespace {

namespace py = pybind11;

void check(cudaError_t status, const char* step) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(step) + ": " + cudaGetErrorString(status));
}

// The same call as in the emulated module: arrays are copied to the device before the launch and back after it.
void run(const std::string& name, const std::vector<py::buffer>& arrays, const std::string& roles,
         const std::vector<int64_t>& numbers, int64_t blocks, int threads) {
  const TestKernel& test = test_kernels().at(name);
  if (arrays.size() > 6 || roles.size() != arrays.size() || numbers.size() > 4)
    throw py::value_error("at most 6 arrays, as many roles, at most 4 numbers");
  Arguments arguments{};
  for (size_t i = 0; i < numbers.size(); ++i) arguments.numbers[i] = numbers[i];
  for (size_t i = 0; i < arrays.size(); ++i) {
    const py::buffer_info info = arrays[i].request();
    const size_t bytes = static_cast<size_t>(info.size * info.itemsize);
    check(cudaMalloc(&arguments.arrays[i], bytes), "cudaMalloc");
    check(cudaMemcpy(arguments.arrays[i], info.ptr, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  test.kernel<<<static_cast<unsigned>(blocks), threads, test.shared_bytes>>>(arguments);
  check(cudaGetLastError(), "launch");
  check(cudaDeviceSynchronize(), name.c_str());
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (roles[i] != 'i') {
      const py::buffer_info info = arrays[i].request(true);
      const size_t bytes = static_cast<size_t>(info.size * info.itemsize);
      check(cudaMemcpy(info.ptr, arguments.arrays[i], bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    }
    check(cudaFree(arguments.arrays[i]), "cudaFree");
  }
}

std::string device_name() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return properties.name;
}

}  // namespace

PYBIND11_MODULE(_conformance_device, module) {
  module.def("device_name", &device_name);
  module.def("run", &run, py::arg("name"), py::arg("arrays"), py::arg("roles"),
             py::arg("numbers") = std::vector<int64_t>{}, py::arg("blocks") = 1, py::arg("threads") = 32);
}
