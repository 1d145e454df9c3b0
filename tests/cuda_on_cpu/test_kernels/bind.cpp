// bind.cpp - the Python module of the emulator's test kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../bind_emulator.h"
#include "registry.h"

std::map<std::string, TestKernel>& test_kernels() {
  static std::map<std::string, TestKernel> kernels;
  return kernels;
}

namespace {

namespace py = pybind11;

// `roles` has a letter for every array: i(nput), o(utput), b(oth); '-' is not registered with the checker.
void run(const std::string& name, const std::vector<py::buffer>& arrays, const std::string& roles,
         const std::vector<int64_t>& numbers, int64_t blocks, int threads, int bug) {
  const TestKernel& test = test_kernels().at(name);
  if (arrays.size() > 6 || roles.size() != arrays.size() || numbers.size() > 4)
    throw py::value_error("at most 6 arrays, as many roles, at most 4 numbers");
  Arguments arguments{};
  arguments.bug = bug;
  for (size_t i = 0; i < numbers.size(); ++i) arguments.numbers[i] = numbers[i];
  emulator::BufferScope scope;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const py::buffer_info info = arrays[i].request(roles[i] != 'i');
    const size_t bytes = static_cast<size_t>(info.size * info.itemsize);
    const std::string label = "array " + std::to_string(i);
    arguments.arrays[i] = info.ptr;
    if (roles[i] == 'i') scope.input(label.c_str(), info.ptr, bytes);
    if (roles[i] == 'o') scope.output(label.c_str(), info.ptr, bytes);
    if (roles[i] == 'b') scope.inout(label.c_str(), info.ptr, bytes);
  }
  emulator::launch(name.c_str(), blocks, threads, test.shared_bytes, [&] { test.kernel(arguments); });
}

}  // namespace

PYBIND11_MODULE(_emulator_tests, module) {
  bind_emulator(module);
  module.def("run", &run, py::arg("name"), py::arg("arrays"), py::arg("roles"),
             py::arg("numbers") = std::vector<int64_t>{}, py::arg("blocks") = 1, py::arg("threads") = 32,
             py::arg("bug") = 0);
}
