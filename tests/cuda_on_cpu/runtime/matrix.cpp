// matrix.cpp - ldmatrix, stmatrix and mma.sync, with the fragment layouts of the PTX manual.
//
// In all of them lane l belongs to group l / 4 and has place l % 4 in it.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "device.h"
#include "failure.h"
#include "memory_checker.h"
#include "state.h"

namespace emulator {
namespace {

constexpr int kRows = 8;       // of the 8x8 matrices that ldmatrix moves
constexpr int kRowBytes = 16;  // eight elements of 16 bits
constexpr int kLanesPerGroup = 4;

struct MatrixArgument {
  uint32_t* fragments;
  int count;
  bool transposed;
  SharedAddress row;
  Site site;
};

const MatrixArgument& argument_of(const WarpArguments& arguments, int lane) {
  return *static_cast<const MatrixArgument*>(arguments.of_lane[lane]);
}

// A matrix's rows are moved in one cycle if they lie in different banks; 16-byte groups of banks repeat every 128
// bytes. Counts the cycles beyond the first: rows in the group most used, where equal addresses count once.
int extra_cycles(const SharedAddress (&rows)[kRows]) {
  constexpr int kBankGroups = 8;
  int most = 1;
  for (int group = 0; group < kBankGroups; ++group) {
    SharedAddress seen[kRows];
    int distinct = 0;
    for (SharedAddress row : rows) {
      if (static_cast<int>(row / kRowBytes % kBankGroups) != group) continue;
      if (std::find(seen, seen + distinct, row) == seen + distinct) seen[distinct++] = row;
    }
    most = std::max(most, distinct);
  }
  return most - 1;
}

// Resolves the rows of matrix `m`, checks the access of each by the lane that gave its address, counts conflicts.
void find_rows(const WarpArguments& arguments, int m, Access access, unsigned char* (&rows)[kRows]) {
  const Thread& self = current_thread();
  SharedAddress addresses[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int lane = m * kRows + r;
    const MatrixArgument& argument = argument_of(arguments, lane);
    const Thread& giver = self.block->threads[self.warp() * kWarpSize + lane];
    addresses[r] = argument.row;
    if (argument.row % kRowBytes != 0)
      fail(giver, argument.site, "misaligned matrix row: byte %u is no multiple of %d", argument.row, kRowBytes);
    rows[r] = shared_pointer(argument.row, kRowBytes, argument.site);
    check_access(giver, rows[r], kRowBytes, kRowBytes, access, argument.site);
  }
  const Site site = argument_of(arguments, m * kRows).site;
  current_worker->bank_conflicts[{site.file, site.line}] += extra_cycles(addresses);
}

// Where lane `lane` finds its two elements of a matrix: (row, column) pairs.
struct ElementPair {
  int row[2], column[2];
};
ElementPair elements_of_lane(int lane, bool transposed) {
  const int group = lane / kLanesPerGroup;
  const int first = 2 * (lane % kLanesPerGroup);
  if (transposed) return {{first, first + 1}, {group, group}};
  return {{group, group}, {first, first + 1}};
}

void load_all(const WarpArguments& arguments) {
  const MatrixArgument& any = argument_of(arguments, 0);
  for (int m = 0; m < any.count; ++m) {
    unsigned char* rows[kRows];
    find_rows(arguments, m, Access::read, rows);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const ElementPair pair = elements_of_lane(lane, any.transposed);
      uint16_t elements[2];
      for (int i = 0; i < 2; ++i) std::memcpy(&elements[i], rows[pair.row[i]] + 2 * pair.column[i], 2);
      argument_of(arguments, lane).fragments[m] = elements[0] | static_cast<uint32_t>(elements[1]) << 16;
    }
  }
}

void store_all(const WarpArguments& arguments) {
  const MatrixArgument& any = argument_of(arguments, 0);
  for (int m = 0; m < any.count; ++m) {
    unsigned char* rows[kRows];
    find_rows(arguments, m, Access::write, rows);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const ElementPair pair = elements_of_lane(lane, any.transposed);
      const uint32_t fragment = argument_of(arguments, lane).fragments[m];
      const uint16_t elements[2] = {static_cast<uint16_t>(fragment), static_cast<uint16_t>(fragment >> 16)};
      for (int i = 0; i < 2; ++i) std::memcpy(rows[pair.row[i]] + 2 * pair.column[i], &elements[i], 2);
    }
  }
}

// ---- mma

constexpr int kM = 16, kN = 8;

struct MmaArgument {
  float* accumulator;
  const uint32_t* a;
  const uint32_t* b;
};

const MmaArgument& mma_argument(const WarpArguments& arguments, int lane) {
  return *static_cast<const MmaArgument*>(arguments.of_lane[lane]);
}

struct F16 {
  static float widen(uint16_t bits) { return _cvtsh_ss(bits); }
};
struct BF16 {
  static float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// A tf32 operand is a float32 of which the tensor core reads the upper 19 bits.
float read_tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The warp's operands, gathered from all lanes.
template <int K>
struct Product {
  float a[kM][K];
  float b[K][kN];
  float sum[kM][kN];

  void gather_sum(const WarpArguments& arguments) {
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < 4; ++i) sum_of_lane(lane, i) = mma_argument(arguments, lane).accumulator[i];
  }
  void scatter_sum(const WarpArguments& arguments) {
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < 4; ++i) mma_argument(arguments, lane).accumulator[i] = sum_of_lane(lane, i);
  }
  void multiply() {
    for (int k = 0; k < K; ++k)
      for (int m = 0; m < kM; ++m)
        for (int n = 0; n < kN; ++n) sum[m][n] = std::fma(a[m][k], b[k][n], sum[m][n]);
  }

 private:
  float& sum_of_lane(int lane, int i) {
    return sum[lane / kLanesPerGroup + 8 * (i / 2)][2 * (lane % kLanesPerGroup) + i % 2];
  }
};

template <class Format>
void multiply_16bit(const WarpArguments& arguments) {
  Product<16> product;
  product.gather_sum(arguments);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaArgument& argument = mma_argument(arguments, lane);
    const int group = lane / kLanesPerGroup;
    const int pair = 2 * (lane % kLanesPerGroup);
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half;
      for (int i = 0; i < 4; ++i)
        product.a[group + 8 * (i % 2)][pair + 8 * (i / 2) + half] =
            Format::widen(static_cast<uint16_t>(argument.a[i] >> shift));
      for (int i = 0; i < 2; ++i)
        product.b[pair + 8 * i + half][group] = Format::widen(static_cast<uint16_t>(argument.b[i] >> shift));
    }
  }
  product.multiply();
  product.scatter_sum(arguments);
}

void multiply_tf32(const WarpArguments& arguments) {
  Product<8> product;
  product.gather_sum(arguments);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MmaArgument& argument = mma_argument(arguments, lane);
    const int group = lane / kLanesPerGroup;
    const int place = lane % kLanesPerGroup;
    for (int i = 0; i < 4; ++i) product.a[group + 8 * (i % 2)][place + 4 * (i / 2)] = read_tf32(argument.a[i]);
    for (int i = 0; i < 2; ++i) product.b[place + 4 * i][group] = read_tf32(argument.b[i]);
  }
  product.multiply();
  product.scatter_sum(arguments);
}

constexpr uint32_t kAllLanes = 0xffffffffu;

}  // namespace

void load_matrices(uint32_t* fragments, int count, bool transposed, SharedAddress row, Site site) {
  MatrixArgument argument{fragments, count, transposed, row, site};
  warp_collective("ldmatrix", kAllLanes, &argument, load_all, site);
}

void store_matrices(const uint32_t* fragments, int count, bool transposed, SharedAddress row, Site site) {
  MatrixArgument argument{const_cast<uint32_t*>(fragments), count, transposed, row, site};
  warp_collective("stmatrix", kAllLanes, &argument, store_all, site);
}

void mma_m16n8k16_f16(float* accumulator, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument argument{accumulator, a, b};
  warp_collective("mma.m16n8k16.f16", kAllLanes, &argument, multiply_16bit<F16>, site);
}

void mma_m16n8k16_bf16(float* accumulator, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument argument{accumulator, a, b};
  warp_collective("mma.m16n8k16.bf16", kAllLanes, &argument, multiply_16bit<BF16>, site);
}

void mma_m16n8k8_tf32(float* accumulator, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument argument{accumulator, a, b};
  warp_collective("mma.m16n8k8.tf32", kAllLanes, &argument, multiply_tf32, site);
}

}  // namespace emulator
