// operand.cuh - a word of a matrix operand: two channels of 16 bits, or one float32.
#pragma once

#include "../primitives/convert.h"
#include "activation.cuh"

namespace fused_sepconv {

template <class Scalar>
using WordOf = Values<4 / sizeof(Scalar)>;

template <class Scalar>
FSC_DEVICE WordOf<Scalar> floats_of(uint32_t word) {
  WordOf<Scalar> values;
  if constexpr (sizeof(Scalar) == 4) {
    memcpy(&values[0], &word, sizeof word);
  } else {
    const float2 pair = unpack<Scalar>(word);
    values[0] = pair.x;
    values[1] = pair.y;
  }
  return values;
}

// The operands of mma.sync: float32 is rounded to TF32.
template <class Scalar>
FSC_DEVICE uint32_t operand_of(const float* values) {
  if constexpr (sizeof(Scalar) == 4)
    return to_tf32(values[0]);
  else
    return pack<Scalar>(values[0], values[1]);
}

}  // namespace fused_sepconv
