// matrix.h - warp-wide matrix instructions: ldmatrix, stmatrix, mma.sync (sm_80 and newer).
//
// All 32 lanes call them together. Lane l has g = l / 4 and q = l % 4. An 8x8 matrix of 16-bit elements lies as
// eight 16-byte rows in shared memory and as one register a lane: row g, columns 2q and 2q + 1.
//
// clang-format off
//   operands of mma, a 16x8 product of depth K:
//
//             A (16 x K, row by row)       B (K x 8, column by column)   D (16 x 8)
//   16 bits,  a[0] row g,   k 2q, 2q+1     b0 column g, k 2q, 2q+1       d[0], d[1] row g,   columns 2q, 2q+1
//   K = 16    a[1] row g+8, k 2q, 2q+1     b1 column g, k 2q+8, 2q+9     d[2], d[3] row g+8, columns 2q, 2q+1
//             a[2] row g,   k 2q+8, 2q+9
//             a[3] row g+8, k 2q+8, 2q+9
//   tf32,     a[0] row g,   k q            b0 column g, k q              as above
//   K = 8     a[1] row g+8, k q            b1 column g, k q+4
//             a[2] row g,   k q+4
//             a[3] row g+8, k q+4
// clang-format on
#pragma once

#include <type_traits>

#include "shared_address.h"

namespace fused_sepconv {

// Loads four matrices; lane 8m + r gives row r of matrix m.
FSC_DEVICE void ldmatrix_x4(uint32_t (&fragments)[4], SharedAddress row, Site site = Site::here()) {
#ifdef FSC_EMULATED
  ::emulator::load_matrices(fragments, 4, false, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(row)
               : "memory");
#endif
}

// As ldmatrix_x4, transposing each matrix: the lane gets rows 2q and 2q + 1 of column g.
FSC_DEVICE void ldmatrix_x4_trans(uint32_t (&fragments)[4], SharedAddress row, Site site = Site::here()) {
#ifdef FSC_EMULATED
  ::emulator::load_matrices(fragments, 4, true, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(row)
               : "memory");
#endif
}

// Stores four matrices to the rows that ldmatrix_x4 would load. One instruction from sm_90 on; before that, every lane
// learns the row that it has a part of from the lane that gave it, and stores four bytes.
FSC_DEVICE void stmatrix_x4(SharedAddress row, const uint32_t (&fragments)[4], Site site = Site::here()) {
#ifdef FSC_EMULATED
  ::emulator::store_matrices(fragments, 4, false, row, site);
#elif __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row), "r"(fragments[0]),
               "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
  FSC_UNROLL
  for (int m = 0; m < 4; ++m) {
    const SharedAddress own_row = __shfl_sync(0xffffffffu, row, 8 * m + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(own_row + 4 * (lane % 4)), "r"(fragments[m]) : "memory");
  }
#endif
}

// d += A * B with A 16x16 and B 16x8 of float16, sums in float32.
FSC_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 Site site = Site::here()) {
#ifdef FSC_EMULATED
  const uint32_t b[2] = {b0, b1};
  ::emulator::mma_m16n8k16_f16(d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// d += A * B with A 16x16 and B 16x8 of bfloat16, sums in float32.
FSC_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  Site site = Site::here()) {
#ifdef FSC_EMULATED
  const uint32_t b[2] = {b0, b1};
  ::emulator::mma_m16n8k16_bf16(d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// d += A * B with A 16x8 and B 8x8 of tf32: float32 bits of which the lowest 13 are ignored, so round first (to_tf32).
FSC_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 Site site = Site::here()) {
#ifdef FSC_EMULATED
  const uint32_t b[2] = {b0, b1};
  ::emulator::mma_m16n8k8_tf32(d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The one of the above for operands of type T; float32 stands for tf32, in half the depth.
template <class T>
FSC_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  if constexpr (sizeof(T) == 4)
    mma_m16n8k8_tf32(d, a, b0, b1, site);
  else if constexpr (std::is_same<T, __half>::value)
    mma_m16n8k16_f16(d, a, b0, b1, site);
  else
    mma_m16n8k16_bf16(d, a, b0, b1, site);
}

}  // namespace fused_sepconv
