// convert.h - between storage and arithmetic types.
#pragma once

#include <cstring>
#include <type_traits>

#include "platform.h"

#if defined(FSC_EMULATED) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace fused_sepconv {

// float16 to float32, exact.
FSC_DEVICE float half_to_float(__half value) {
#if defined(FSC_EMULATED) && defined(__F16C__)
  // One instruction; the toolkit's host code takes some 20 times as long.
  unsigned short bits;
  memcpy(&bits, &value, sizeof bits);
  return _cvtsh_ss(bits);
#else
  return __half2float(value);
#endif
}

// float32 to float16, to the nearest, ties to even; NaN becomes the one NaN 0x7fff.
FSC_DEVICE __half float_to_half(float value) {
#if defined(FSC_EMULATED) && defined(__F16C__)
  const unsigned short bits = value != value ? 0x7fff : _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  __half half;
  memcpy(static_cast<void*>(&half), &bits, sizeof bits);
  return half;
#else
  return __float2half_rn(value);
#endif
}

// A value of one type as another: between equal types, and between float32 and float16 or bfloat16 (rounding to the
// nearest, ties to even).
template <class To, class From>
FSC_DEVICE To convert(From value) {
  if constexpr (std::is_same<To, From>::value) {
    return value;
  } else if constexpr (std::is_same<From, __half>::value) {
    static_assert(std::is_same<To, float>::value, "float16 converts to float32");
    return half_to_float(value);
  } else if constexpr (std::is_same<From, __nv_bfloat16>::value) {
    static_assert(std::is_same<To, float>::value, "bfloat16 converts to float32");
    return __bfloat162float(value);
  } else if constexpr (std::is_same<To, __half>::value) {
    static_assert(std::is_same<From, float>::value, "float16 is made from float32");
    return float_to_half(value);
  } else {
    static_assert(std::is_same<To, __nv_bfloat16>::value && std::is_same<From, float>::value, "no such conversion");
    return __float2bfloat16_rn(value);
  }
}

// Two float32 as two float16 or bfloat16 in one register, `low` in the lower half: the layout of matrix operands.
template <class T>
FSC_DEVICE uint32_t pack(float low, float high) {
  uint32_t bits;
#ifdef FSC_EMULATED
  const T pair[2] = {convert<T>(low), convert<T>(high)};
  memcpy(&bits, pair, sizeof bits);
#else
  // One conversion instruction for the pair.
  if constexpr (std::is_same<T, __half>::value) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    static_assert(std::is_same<T, __nv_bfloat16>::value, "packs float16 or bfloat16");
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
#endif
  return bits;
}

// The two float16 or bfloat16 of a register as float32, the lower half in x.
template <class T>
FSC_DEVICE float2 unpack(uint32_t bits) {
#ifndef FSC_EMULATED
  // A bfloat16 is a float32's upper half: one instruction each, where the header's conversion takes two.
  if constexpr (std::is_same<T, __nv_bfloat16>::value)
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
#endif
  T pair[2];
  memcpy(static_cast<void*>(pair), &bits, sizeof bits);
  return make_float2(convert<float>(pair[0]), convert<float>(pair[1]));
}

// The values of a register (two float16 or bfloat16, or one float32), those below zero as zero; NaN stays NaN.
template <class T>
FSC_DEVICE uint32_t relu_packed(uint32_t bits) {
#ifndef FSC_EMULATED
  if constexpr (std::is_same<T, __half>::value) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof bits);
    pair = __hmax2_nan(pair, __half2half2(__ushort_as_half(0)));
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    __nv_bfloat162 pair;
    memcpy(&pair, &bits, sizeof bits);
    pair = __hmax2_nan(pair, __bfloat162bfloat162(__ushort_as_bfloat16(0)));
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
#endif
  T values[4 / sizeof(T)];
  memcpy(static_cast<void*>(values), &bits, sizeof bits);
  for (T& value : values)
    if (convert<float>(value) < 0.0f) value = convert<T>(0.0f);
  memcpy(&bits, values, sizeof bits);
  return bits;
}

// All ones where the values of a register (two float16 or bfloat16) are not at or below zero, NaN among them, and zeros
// where they are: what relu's derivative does to a gradient of the same type.
template <class T>
FSC_DEVICE uint32_t relu_mask(uint32_t bits) {
#ifdef FSC_EMULATED
  const float2 values = unpack<T>(bits);
  return (values.x <= 0.0f ? 0u : 0xffffu) | (values.y <= 0.0f ? 0u : 0xffff0000u);
#else
  if constexpr (std::is_same<T, __half>::value) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof bits);
    return __hgtu2_mask(pair, __half2half2(__ushort_as_half(0)));
  } else {
    static_assert(std::is_same<T, __nv_bfloat16>::value, "two float16 or bfloat16");
    __nv_bfloat162 pair;
    memcpy(&pair, &bits, sizeof bits);
    return __hgtu2_mask(pair, __bfloat162bfloat162(__ushort_as_bfloat16(0)));
  }
#endif
}

// The bits of a float32 rounded to tf32's 10-bit fraction: to the nearest, ties away from zero. The low bits are zero.
FSC_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
#ifdef FSC_EMULATED
  constexpr uint32_t kExponent = 0x7f800000u;
  constexpr uint32_t kHalfUnit = 0x00001000u;
  constexpr uint32_t kKept = 0xffffe000u;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & kExponent) == kExponent) return value != value ? 0x7fffe000u : bits;
  return (bits + kHalfUnit) & kKept;
#else
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

}  // namespace fused_sepconv
