// registry.h - the emulator's test kernels by name, as test_emulator.py runs them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "primitives/platform.h"

// What every test kernel gets: up to six arrays and four numbers. A kernel with a planted bug takes it where `bug`
// is 1.
struct Arguments {
  void* arrays[6];
  int64_t numbers[4];
  int bug;

  template <class T>
  FSC_DEVICE T* array(int index) const {
    return static_cast<T*>(arrays[index]);
  }
};

struct TestKernel {
  void (*kernel)(Arguments);
  int shared_bytes;
};

std::map<std::string, TestKernel>& test_kernels();

// Static objects of this type fill test_kernels().
struct Registration {
  Registration(const char* name, void (*kernel)(Arguments), int shared_bytes = 0) {
    test_kernels()[name] = {kernel, shared_bytes};
  }
};

constexpr uint32_t kAllLanes = 0xffffffffu;
