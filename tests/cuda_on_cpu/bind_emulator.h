// bind_emulator.h - the emulator's controls, for a Python module of emulated device code.
#pragma once

#include <pybind11/pybind11.h>

// Adds set_schedule, executed, counters, reset_counters, is_checked and GuardedMemory to `module`.
void bind_emulator(pybind11::module_& module);
