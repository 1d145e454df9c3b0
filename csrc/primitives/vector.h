// vector.h - several elements in one memory instruction.
#pragma once

#include <cstring>
#include <type_traits>

#include "platform.h"

namespace fused_sepconv {

// N elements that move as one: 2, 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N == 2 || sizeof(T) * N == 4 || sizeof(T) * N == 8 || sizeof(T) * N == 16,
                "no instruction moves so many bytes");
  T values[N];

  FSC_DEVICE T& operator[](int i) { return values[i]; }
  FSC_DEVICE const T& operator[](int i) const { return values[i]; }
};

#ifndef FSC_EMULATED
namespace detail {

// The register type that makes the compiler choose an instruction of so many bytes.
template <int Bytes>
using Word = std::conditional_t<Bytes == 2, unsigned short,
                                std::conditional_t<Bytes == 4, unsigned, std::conditional_t<Bytes == 8, uint2, uint4>>>;

}  // namespace detail
#endif

// Reads N elements at once from global or shared memory; `source` is aligned to them.
template <int N, class T>
FSC_DEVICE Vector<T, N> load(const T* source, Site site = Site::here()) {
  Vector<T, N> vector;
#ifdef FSC_EMULATED
  ::emulator::read_memory(&vector, source, sizeof vector, site);
#else
  const auto word = *reinterpret_cast<const detail::Word<sizeof(vector)>*>(source);
  memcpy(&vector, &word, sizeof vector);
#endif
  return vector;
}

// As load, through the read-only cache: global memory that no thread writes while the kernel runs.
template <int N, class T>
FSC_DEVICE Vector<T, N> load_read_only(const T* source, Site site = Site::here()) {
  Vector<T, N> vector;
#ifdef FSC_EMULATED
  ::emulator::read_memory(&vector, source, sizeof vector, site);
#else
  const auto word = __ldg(reinterpret_cast<const detail::Word<sizeof(vector)>*>(source));
  memcpy(&vector, &word, sizeof vector);
#endif
  return vector;
}

// A word of global memory that no thread writes while the kernel runs; 0 where `inside` is false, and nothing is read.
// One predicated instruction: from a branch, nvcc 13.0 makes a load, a zero and a choice.
FSC_DEVICE uint32_t load_word_or_zero(const void* source, bool inside, Site site = Site::here()) {
  uint32_t word = 0;
#ifdef FSC_EMULATED
  if (inside) ::emulator::read_memory(&word, source, sizeof word, site);
#else
  asm volatile(
      "{\n"
      ".reg .pred inside;\n"
      "setp.ne.b32 inside, %2, 0;\n"
      "@inside ld.global.nc.b32 %0, [%1];\n"
      "}\n"
      : "+r"(word)
      : "l"(__cvta_generic_to_global(source)), "r"(static_cast<int>(inside)));
#endif
  return word;
}

// Writes N elements at once to global or shared memory; `destination` is aligned to them.
template <int N, class T>
FSC_DEVICE void store(T* destination, const Vector<T, N>& vector, Site site = Site::here()) {
#ifdef FSC_EMULATED
  ::emulator::write_memory(destination, &vector, sizeof vector, site);
#else
  detail::Word<sizeof(vector)> word;
  memcpy(&word, &vector, sizeof vector);
  *reinterpret_cast<detail::Word<sizeof(vector)>*>(destination) = word;
#endif
}

// As store, 16 bytes, and to global memory: in one instruction whatever the vector was made of. (What was loaded and is
// stored unchanged, nvcc 13.0 stores 4 bytes at a time.)
template <int N, class T>
FSC_DEVICE void store_global(T* destination, const Vector<T, N>& vector, Site site = Site::here()) {
  static_assert(sizeof(vector) == 16, "16 bytes");
#ifdef FSC_EMULATED
  ::emulator::write_memory(destination, &vector, sizeof vector, site);
#else
  uint4 word;
  memcpy(&word, &vector, sizeof vector);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(destination)), "r"(word.x),
               "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
#endif
}

// The 16 bytes with that number from `base` on. One multiply-add, where nvcc 13.0 makes four instructions of it.
FSC_DEVICE const void* vector_at(const void* base, uint32_t index) {
#ifdef FSC_EMULATED
  return static_cast<const unsigned char*>(base) + static_cast<uint64_t>(index) * 16;
#else
  const void* address;
  asm("mad.wide.u32 %0, %1, 16, %2;\n" : "=l"(address) : "r"(index), "l"(base));
  return address;
#endif
}

// As store_global where `condition` holds, and nothing elsewhere: without a branch.
template <int N, class T>
FSC_DEVICE void store_global_where(bool condition, T* destination, const Vector<T, N>& vector,
                                   Site site = Site::here()) {
  static_assert(sizeof(vector) == 16, "16 bytes");
#ifdef FSC_EMULATED
  if (condition) ::emulator::write_memory(destination, &vector, sizeof vector, site);
#else
  uint4 word;
  memcpy(&word, &vector, sizeof vector);
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"l"(
                   __cvta_generic_to_global(destination)),
               "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "r"(static_cast<int>(condition))
               : "memory");
#endif
}

}  // namespace fused_sepconv
