// instrumentation.cpp - what the compiler calls before every access of code built with -fsanitize=thread, and where an
// index is too large for its array in code built with -fsanitize=bounds.
//
// The flag is used for its instrumentation alone: these functions stand in for the ThreadSanitizer runtime, which
// knows nothing of CUDA's barriers and is not linked; likewise for UndefinedBehaviorSanitizer's. Accesses that the
// compiler knows to be aligned are reported by size, all others (packed structs, sizes that are no power of two) as
// ranges.
#include "failure.h"
#include "memory_checker.h"
#include "state.h"

namespace {

using emulator::Access;

void check(void* address, size_t bytes, size_t alignment, Access access, void* instruction) {
  // Host code of the same files runs outside any thread of a kernel.
  if (!emulator::current_worker || !emulator::current_worker->running) return;
  // The return address is that of the instruction after the call, which may belong to the next line.
  const void* call = static_cast<char*>(instruction) - 1;
  emulator::check_access(emulator::current_thread(), address, bytes, alignment, access,
                         emulator::Origin::of_instruction(call));
}

}  // namespace

extern "C" {

void __tsan_init() { emulator::checked_build = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define ACCESS_OF(bytes)                                                                                        \
  void __tsan_read##bytes(void* p) { check(p, bytes, bytes, Access::read, __builtin_return_address(0)); }       \
  void __tsan_write##bytes(void* p) { check(p, bytes, bytes, Access::write, __builtin_return_address(0)); }     \
  void __tsan_unaligned_read##bytes(void* p) { check(p, bytes, 1, Access::read, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* p) { check(p, bytes, 1, Access::write, __builtin_return_address(0)); }
ACCESS_OF(1)
ACCESS_OF(2)
ACCESS_OF(4)
ACCESS_OF(8)
ACCESS_OF(16)
#undef ACCESS_OF

void __tsan_read_range(void* p, size_t bytes) { check(p, bytes, 1, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { check(p, bytes, 1, Access::write, __builtin_return_address(0)); }

// Host code's own atomics: guards of static variables and the standard library's counts. Kernels use atomicAdd.
#define ATOMICS_OF(bits, type)                                                                                  \
  type __tsan_atomic##bits##_load(const volatile type* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile type* p, type v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {                                          \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                             \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) {                                         \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) {                                         \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* expected, type desired, int, int) { \
    return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }
ATOMICS_OF(8, unsigned char)
ATOMICS_OF(16, unsigned short)
ATOMICS_OF(32, unsigned)
ATOMICS_OF(64, unsigned long)
#undef ATOMICS_OF

// Of the compiler's description of the array the front alone is used: a source location, and its type.
struct ArrayType {
  uint16_t kind, info;
  char name[];  // such as "float [4]", in quotes
};
struct ArrayBounds {
  const char* file;
  uint32_t line, column;
  const ArrayType* array;
};
void __ubsan_handle_out_of_bounds(const ArrayBounds* bounds, uintptr_t index) {
  if (!emulator::current_worker || !emulator::current_worker->running) return;
  const void* call = static_cast<char*>(__builtin_return_address(0)) - 1;
  emulator::fail(emulator::current_thread(), emulator::Origin::of_instruction(call), "index %ld out of bounds of %s",
                 static_cast<long>(index), bounds->array->name);
}

}  // extern "C"
