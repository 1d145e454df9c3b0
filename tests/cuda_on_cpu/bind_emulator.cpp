#include "bind_emulator.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "runtime/control.h"

namespace {

namespace py = pybind11;

emulator::Order order_of_name(const std::string& name) {
  if (name == "forward") return emulator::Order::forward;
  if (name == "reverse") return emulator::Order::reverse;
  if (name == "random") return emulator::Order::random;
  throw py::value_error("order must be \"forward\", \"reverse\" or \"random\", got \"" + name + "\"");
}

void set_schedule(const std::string& order, uint64_t seed, int os_threads) {
  emulator::set_schedule({order_of_name(order), seed, os_threads});
}

py::dict counters() {
  const emulator::Counters counters = emulator::counters();
  py::dict result;
  result["bytes_read"] = counters.bytes_read;
  result["bytes_written"] = counters.bytes_written;
  result["bank_conflicts"] = counters.bank_conflicts;
  result["shared_bytes"] = counters.shared_bytes;
  return result;
}

py::buffer_info bytes_of(emulator::GuardedMemory& memory) {
  return py::buffer_info(static_cast<unsigned char*>(memory.data()), static_cast<py::ssize_t>(memory.size()));
}

}  // namespace

void bind_emulator(py::module_& module) {
  py::register_local_exception<emulator::Error>(module, "EmulatorError", PyExc_RuntimeError);
  module.def(
      "set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 1, py::arg("os_threads") = 0,
      "Order in which threads and blocks run, from the next launch on. os_threads 0: as many as the machine has.");
  module.def("executed", &emulator::executed, "Launches by instance name since the last reset_counters().");
  module.def("counters", &counters,
             "Since the last reset_counters(): bytes_read and bytes_written by buffer (checked build), "
             "bank_conflicts of ldmatrix and stmatrix by \"file:line\", shared_bytes of a block by instance name.");
  module.def("reset_counters", &emulator::reset_counters);
  module.def("is_checked", &emulator::is_checked, "Whether every memory access of device code is checked.");
  py::class_<emulator::GuardedMemory>(module, "GuardedMemory", py::buffer_protocol(), py::module_local(),
                                      "Memory that ends at an unreadable page; a buffer of bytes, filled with 0xff.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer(&bytes_of);
}
