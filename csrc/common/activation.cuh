// activation.cuh - the seven activations and their derivatives in a kernel's arithmetic (float or double).
#pragma once

#include <cmath>

#include "../params.h"
#include "../primitives/platform.h"

namespace fused_sepconv {

// act(v) as PyTorch defines it, NaN passing through. The branch is the same for a whole grid, so it costs a comparison.
template <class Compute>
FSC_DEVICE Compute activate(Activation activation, Compute v) {
  switch (activation) {
    case Activation::none:
      return v;
    case Activation::relu:
      return v < Compute(0) ? Compute(0) : v;
    case Activation::relu6:
      return v < Compute(0) ? Compute(0) : v > Compute(6) ? Compute(6) : v;
    case Activation::elu:
      return v > Compute(0) ? v : std::expm1(v);
    case Activation::silu:
      return v / (Compute(1) + std::exp(-v));
    case Activation::hardswish: {
      const Compute gate = v + Compute(3);
      return v * (gate < Compute(0) ? Compute(0) : gate > Compute(6) ? Compute(6) : gate) / Compute(6);
    }
    case Activation::gelu:
      return Compute(0.5) * v * (Compute(1) + std::erf(v * Compute(0.70710678118654752440)));
  }
  return v;
}

// grad * act'(z) as PyTorch's autograd has it: past a corner the result is 0, whatever grad is.
template <class Compute>
FSC_DEVICE Compute differentiate(Activation activation, Compute grad, Compute z) {
  switch (activation) {
    case Activation::none:
      return grad;
    case Activation::relu:
      return z <= Compute(0) ? Compute(0) : grad;
    case Activation::relu6:
      return z <= Compute(0) || z >= Compute(6) ? Compute(0) : grad;
    case Activation::elu:
      return z <= Compute(0) ? grad * std::exp(z) : grad;
    case Activation::silu: {
      const Compute sigmoid = Compute(1) / (Compute(1) + std::exp(-z));
      return grad * sigmoid * (Compute(1) + z * (Compute(1) - sigmoid));
    }
    case Activation::hardswish:
      return z <= Compute(-3) ? Compute(0) : z < Compute(3) ? grad * (z / Compute(3) + Compute(0.5)) : grad;
    case Activation::gelu: {
      const Compute cdf = Compute(0.5) * (Compute(1) + std::erf(z * Compute(0.70710678118654752440)));
      const Compute density = std::exp(Compute(-0.5) * z * z) * Compute(0.39894228040143267794);
      return grad * (cdf + z * density);
    }
  }
  return grad;
}

// Several values in registers.
template <int kCount>
struct Values {
  float values[kCount];

  FSC_DEVICE float& operator[](int i) { return values[i]; }
  FSC_DEVICE const float& operator[](int i) const { return values[i]; }
};

// act(v) of each, as a call: unrolled over a tile's values, its exponentials would stand there as often.
template <int kCount>
FSC_OUTLINE Values<kCount> activate_called(Activation activation, Values<kCount> v) {
  FSC_UNROLL
  for (int i = 0; i < kCount; ++i) v[i] = activate(activation, v[i]);
  return v;
}

// act(v) of several values in registers; relu without a call.
template <int kCount>
FSC_DEVICE void activate_all(Activation activation, Values<kCount>& v) {
  if (activation == Activation::none) return;
  if (activation == Activation::relu) {
    FSC_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] = activate(Activation::relu, v[i]);
  } else {
    v = activate_called(activation, v);
  }
}

// grad * act'(z) of each, as a call.
template <int kCount>
FSC_OUTLINE Values<kCount> differentiate_called(Activation activation, Values<kCount> grad, Values<kCount> z) {
  FSC_UNROLL
  for (int i = 0; i < kCount; ++i) grad[i] = differentiate(activation, grad[i], z[i]);
  return grad;
}

// grad * act'(z) of several values in registers; relu without a call.
template <int kCount>
FSC_DEVICE void differentiate_all(Activation activation, Values<kCount>& grad, const Values<kCount>& z) {
  if (activation == Activation::none) return;
  if (activation == Activation::relu) {
    FSC_UNROLL
    for (int i = 0; i < kCount; ++i) grad[i] = differentiate(Activation::relu, grad[i], z[i]);
  } else {
    grad = differentiate_called(activation, grad, z);
  }
}

}  // namespace fused_sepconv
