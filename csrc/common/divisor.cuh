// divisor.cuh - division by a number that the host knows: a product and a shift, where a division takes a GPU some 25
// instructions.
#pragma once

#include <cstdint>

#include "../primitives/platform.h"

namespace fused_sepconv {

// By a positive divisor, of 0 <= n < 2^31. With 2^(s - 1) < divisor <= 2^s the multiplier is 2^(31 + s) / divisor,
// rounded up: its error is too small to reach the next quotient (Granlund and Montgomery, "Division by Invariant
// Integers using Multiplication", 1994).
class Divisor {
 public:
  explicit Divisor(int divisor) : divisor_(divisor), shift_(31) {
    while ((int64_t{1} << (shift_ - 31)) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor - 1) / divisor);
  }

  FSC_HOST_DEVICE int divisor() const { return divisor_; }
  FSC_DEVICE int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier_ >> shift_);
  }
  // Sets n to its quotient, and returns the remainder.
  FSC_DEVICE int split(int& n) const {
    const int all = n;
    n = quotient(all);
    return all - n * divisor_;
  }

 private:
  int divisor_, shift_;
  uint32_t multiplier_;
};

}  // namespace fused_sepconv
