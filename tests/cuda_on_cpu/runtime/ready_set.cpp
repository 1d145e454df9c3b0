#include "ready_set.h"

namespace emulator {
namespace {

int lowest_bit(uint64_t word) { return __builtin_ctzll(word); }
int highest_bit(uint64_t word) { return 63 - __builtin_clzll(word); }

uint64_t rotate_right(uint64_t word, int bits) { return bits ? word >> bits | word << (64 - bits) : word; }

}  // namespace

void ReadySet::reset(int slots, Order order, uint64_t seed) {
  words_.assign((slots + 63) / 64, 0);
  order_ = order;
  random_.seed(seed);
  for (int i = 0; i < 4; ++i) random_.next();  // neighbouring seeds give alike first draws
}

int ReadySet::take() {
  const int slot = next();
  if (slot != kNone) words_[slot / 64] &= ~(uint64_t{1} << (slot % 64));
  return slot;
}

int ReadySet::next() {
  const int count = static_cast<int>(words_.size());
  if (order_ == Order::forward) {
    for (int i = 0; i < count; ++i)
      if (words_[i]) return i * 64 + lowest_bit(words_[i]);
  } else if (order_ == Order::reverse) {
    for (int i = count - 1; i >= 0; --i)
      if (words_[i]) return i * 64 + highest_bit(words_[i]);
  } else {
    // The first ready slot from a random place on. Not uniform, but every slot has its chance.
    const int first_word = static_cast<int>(random_.next() % count);
    const int first_bit = static_cast<int>(random_.next() % 64);
    for (int k = 0; k < count; ++k) {
      const int i = (first_word + k) % count;
      if (words_[i]) return i * 64 + (lowest_bit(rotate_right(words_[i], first_bit)) + first_bit) % 64;
    }
  }
  return kNone;
}

}  // namespace emulator
