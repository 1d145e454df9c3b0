// ready_set.h - the threads that could run, and which of them goes next.
#pragma once

#include <cstdint>
#include <vector>

#include "control.h"

namespace emulator {

// xorshift64: fast, and the same on every machine.
class Random {
 public:
  void seed(uint64_t seed) { state_ = seed * 0x9e3779b97f4a7c15ull | 1; }
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }

 private:
  uint64_t state_ = 1;
};

class ReadySet {
 public:
  static constexpr int kNone = -1;

  void reset(int slots, Order order, uint64_t seed);
  void insert(int slot) { words_[slot / 64] |= uint64_t{1} << (slot % 64); }
  int take();  // removes and returns the slot that runs next, kNone if nothing is ready
  bool random() const { return order_ == Order::random; }

 private:
  int next();

  std::vector<uint64_t> words_;  // one bit a slot
  Order order_ = Order::forward;
  Random random_;
};

}  // namespace emulator
