// cuda_language.h - the words of CUDA C++ that kernels use directly, with CUDA's spelling and meaning.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "device.h"

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())
#define warpSize 32

using std::max;
using std::min;

namespace emulator {

// One lane's part in a shuffle: what it gives, whose value it asks for, what it gets.
template <class T>
struct ShuffleArgument {
  T value;
  int source;
  T result;
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable<T>::value, "a shuffle moves plain bits");
  ShuffleArgument<T> argument{value, source, value};
  auto exchange = [](const WarpArguments& arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* mine = static_cast<ShuffleArgument<T>*>(arguments.of_lane[lane]);
      if (!mine) continue;
      auto* theirs = static_cast<ShuffleArgument<T>*>(arguments.of_lane[mine->source]);
      if (theirs)
        mine->result = theirs->value;
      else
        std::memset(static_cast<void*>(&mine->result), 0xff, sizeof(T));  // a lane outside the mask: undefined
    }
  };
  warp_collective(name, mask, &argument, exchange, site);
  return argument.result;
}

template <class T>
struct ReductionArgument {
  T value;
  T result;
};

// Combines the values of all lanes in `mask`, lowest lane first, and gives every lane the result.
template <class Combine, class T>
T reduce(const char* name, unsigned mask, T value, Site site) {
  ReductionArgument<T> argument{value, value};
  auto combine_all = [](const WarpArguments& arguments) {
    T result{};
    bool first = true;
    for (void* lane : arguments.of_lane) {
      if (!lane) continue;
      const T& value = static_cast<ReductionArgument<T>*>(lane)->value;
      result = first ? value : Combine::apply(result, value);
      first = false;
    }
    for (void* lane : arguments.of_lane)
      if (lane) static_cast<ReductionArgument<T>*>(lane)->result = result;
  };
  warp_collective(name, mask, &argument, combine_all, site);
  return argument.result;
}

struct Sum {
  template <class T>
  static T apply(T a, T b) {
    return a + b;
  }
};
struct Maximum {
  template <class T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
struct Minimum {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct BitwiseOr {
  template <class T>
  static T apply(T a, T b) {
    return a | b;
  }
};

}  // namespace emulator

// ---- barriers and fences

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::barrier_sync(0, 0, site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
  emulator::sync_warp(mask, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warp shuffles: `width` lanes (a power of two) form a group, and lanes ask within their group

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int group = emulator::lane_index() & ~(width - 1);
  return emulator::shuffle("__shfl_sync", mask, value, group + (source & (width - 1)), site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = emulator::lane_index();
  const int source = lane ^ (bits & 31);
  // As on the device, a lane of an earlier group can be read but one of a later group cannot.
  const int group_end = (lane & ~(width - 1)) + width;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source < group_end ? source : lane, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::here()) {
  const int lane = emulator::lane_index();
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return emulator::shuffle("__shfl_down_sync", mask, value, inside ? lane + static_cast<int>(delta) : lane, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int lane = emulator::lane_index();
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return emulator::shuffle("__shfl_up_sync", mask, value, inside ? lane - static_cast<int>(delta) : lane, site);
}

// ---- warp votes and reductions

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  const unsigned bit = predicate ? 1u << emulator::lane_index() : 0u;
  return emulator::reduce<emulator::BitwiseOr>("__ballot_sync", mask, bit, site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::reduce<emulator::Maximum>("__any_sync", mask, predicate != 0 ? 1 : 0, site);
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::reduce<emulator::Minimum>("__all_sync", mask, predicate != 0 ? 1 : 0, site);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {
  static_assert(std::is_integral<T>::value, "redux.sync is for integers");
  return emulator::reduce<emulator::Sum>("__reduce_add_sync", mask, value, site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {
  static_assert(std::is_integral<T>::value, "redux.sync is for integers");
  return emulator::reduce<emulator::Maximum>("__reduce_max_sync", mask, value, site);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {
  static_assert(std::is_integral<T>::value, "redux.sync is for integers");
  return emulator::reduce<emulator::Minimum>("__reduce_min_sync", mask, value, site);
}

// ---- memory

// Adds to memory in one step and returns the value before; other threads' atomics never come between.
template <class T>
T atomicAdd(T* address, T addend, emulator::Site site = emulator::Site::here()) {
  T previous;
  auto add = [](void* value, const void* operand) {
    *static_cast<T*>(value) = *static_cast<T*>(value) + *static_cast<const T*>(operand);
  };
  emulator::atomic_update(address, sizeof(T), add, &addend, &previous, site);
  return previous;
}

// A load through the read-only cache.
template <class T>
T __ldg(const T* address, emulator::Site site = emulator::Site::here()) {
  T value;
  emulator::read_memory(&value, address, sizeof(T), site);
  return value;
}
