// primitives.cu - one kernel a primitive: inputs in array 0 (and 1), results in the last array.
//
// The same kernels make the conformance vectors on a GPU, so they are plain functions of their inputs.
#include "named_barrier.h"
#include "primitives/async_copy.h"
#include "primitives/convert.h"
#include "primitives/matrix.h"
#include "primitives/shared_address.h"
#include "primitives/vector.h"
#include "primitives/warp.h"
#include "registry.h"

namespace fused_sepconv {
namespace {

struct alignas(16) Tile16 {
  uint16_t values[32 * 8];  // four 8x8 matrices, a row every 16 bytes
};

// Thread i copies its N elements.
template <class T, int N>
FSC_KERNEL(32, 1)
copy_vectors(FSC_CONST_PARAM const Arguments arguments) {
  const auto vector = load<N>(arguments.array<T>(0) + threadIdx.x * N);
  const auto same = load_read_only<N>(arguments.array<T>(0) + threadIdx.x * N);
  Vector<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = i % 2 ? vector[i] : same[i];
  store(arguments.array<T>(1) + threadIdx.x * N, result);
}
const Registration copy_4_bytes("copy_4_bytes", copy_vectors<uint16_t, 2>);
const Registration copy_8_bytes("copy_8_bytes", copy_vectors<uint16_t, 4>);
const Registration copy_16_bytes("copy_16_bytes", copy_vectors<uint16_t, 8>);

// Thread i copies its Bytes through shared memory; with zeros where i % 3 is 0. Two groups are pending at a time.
template <int Bytes>
FSC_KERNEL(32, 1)
async_copies(FSC_CONST_PARAM const Arguments arguments) {
  struct alignas(16) Shared {
    unsigned char values[2][32 * Bytes];
  };
  FSC_SHARED(Shared, shared);
  const int mine = threadIdx.x * Bytes;
  const bool inside = threadIdx.x % 3 != 0;
  const unsigned char* source = arguments.array<unsigned char>(0);
  for (int stage = 0; stage < 2; ++stage) {
    async_copy<Bytes>(shared_address(&shared.values[stage][mine]), source + stage * 32 * Bytes + mine, inside);
    async_copy_commit();
  }
  for (int stage = 0; stage < 2; ++stage) {
    if (stage == 0)
      async_copy_wait<1>();
    else
      async_copy_wait<0>();
    for (int i = 0; i < Bytes; ++i)
      arguments.array<unsigned char>(1)[stage * 32 * Bytes + mine + i] = shared.values[stage][mine + i];
  }
}
const Registration async_copy_4("async_copy_4", async_copies<4>, 2 * 32 * 4);
const Registration async_copy_8("async_copy_8", async_copies<8>, 2 * 32 * 8);
const Registration async_copy_16("async_copy_16", async_copies<16>, 2 * 32 * 16);

FSC_DEVICE void fill_tile(Tile16& tile, const uint16_t* values) {
  for (int i = 0; i < 8; ++i) tile.values[threadIdx.x * 8 + i] = values[threadIdx.x * 8 + i];
  __syncwarp();
}

// Fragments of four matrices, as every lane gets them.
template <bool Transposed>
FSC_KERNEL(32, 1)
load_fragments(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Tile16, shared);
  fill_tile(shared, arguments.array<uint16_t>(0));
  const SharedAddress row = shared_address(&shared.values[threadIdx.x * 8]);
  uint32_t fragments[4];
  if constexpr (Transposed)
    ldmatrix_x4_trans(fragments, row);
  else
    ldmatrix_x4(fragments, row);
  for (int m = 0; m < 4; ++m) arguments.array<uint32_t>(1)[threadIdx.x * 4 + m] = fragments[m];
}
const Registration ldmatrix("ldmatrix_x4", load_fragments<false>, sizeof(Tile16));
const Registration ldmatrix_trans("ldmatrix_x4_trans", load_fragments<true>, sizeof(Tile16));

// Four matrices from every lane's fragments, back to rows.
FSC_KERNEL(32, 1)
store_fragments(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Tile16, shared);
  uint32_t fragments[4];
  for (int m = 0; m < 4; ++m) fragments[m] = arguments.array<uint32_t>(0)[threadIdx.x * 4 + m];
  const SharedAddress row = shared_address(&shared.values[threadIdx.x * 8]);
  stmatrix_x4(row, fragments);
  __syncwarp();
  for (int i = 0; i < 8; ++i) arguments.array<uint16_t>(1)[threadIdx.x * 8 + i] = shared.values[threadIdx.x * 8 + i];
}
const Registration stmatrix("stmatrix_x4", store_fragments, sizeof(Tile16));

enum class Format { f16, bf16, tf32 };

// D (16 x 8) = A (16 x K) * B (8 columns of K) + array 2; operands as the PTX manual lays them out.
template <Format F>
FSC_KERNEL(32, 1)
multiply(FSC_CONST_PARAM const Arguments arguments) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  const uint32_t* a_words = arguments.array<uint32_t>(0);  // eight words a row, in both formats
  const uint32_t* b_words = arguments.array<uint32_t>(1);  // eight words a column
  for (int i = 0; i < 4; ++i) a[i] = a_words[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)];
  for (int i = 0; i < 2; ++i) b[i] = b_words[g * 8 + t + 4 * i];
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = arguments.array<float>(2)[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  if constexpr (F == Format::f16) mma_m16n8k16_f16(d, a, b[0], b[1]);
  if constexpr (F == Format::bf16) mma_m16n8k16_bf16(d, a, b[0], b[1]);
  if constexpr (F == Format::tf32) mma_m16n8k8_tf32(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) arguments.array<float>(3)[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}
const Registration mma_f16("mma_m16n8k16_f16", multiply<Format::f16>);
const Registration mma_bf16("mma_m16n8k16_bf16", multiply<Format::bf16>);
const Registration mma_tf32("mma_m16n8k8_tf32", multiply<Format::tf32>);

// Thread i converts two float32 to T and back: bits in array 1, values in array 2.
template <class T>
FSC_KERNEL(32, 1)
convert_both_ways(FSC_CONST_PARAM const Arguments arguments) {
  const int64_t count = arguments.numbers[0];
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const float low = arguments.array<float>(0)[2 * i], high = arguments.array<float>(0)[2 * i + 1];
    const uint32_t bits = pack<T>(low, high);
    const float2 values = unpack<T>(bits);
    arguments.array<uint32_t>(1)[i] = bits;
    arguments.array<float>(2)[2 * i] = values.x;
    arguments.array<float>(2)[2 * i + 1] = values.y;
  }
}
const Registration convert_f16("convert_f16", convert_both_ways<__half>);
const Registration convert_bf16("convert_bf16", convert_both_ways<__nv_bfloat16>);

FSC_KERNEL(32, 1) convert_tf32(FSC_CONST_PARAM const Arguments arguments) {
  const int64_t count = arguments.numbers[0];
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    arguments.array<uint32_t>(1)[i] = to_tf32(arguments.array<float>(0)[i]);
}
const Registration convert_tf32_registration("convert_tf32", convert_tf32);

// Every lane's sum of groups of Width lanes.
template <class T, int Width>
FSC_KERNEL(32, 1)
reduce_warp(FSC_CONST_PARAM const Arguments arguments) {
  const T value = arguments.array<T>(0)[threadIdx.x];
  arguments.array<T>(1)[threadIdx.x] = warp_sum<Width>(value);
}
const Registration reduce_float_32("reduce_float_32", reduce_warp<float, 32>);
const Registration reduce_float_8("reduce_float_8", reduce_warp<float, 8>);
const Registration reduce_double_32("reduce_double_32", reduce_warp<double, 32>);

// Every lane: the values of lane 5, of its neighbour, of the lanes above and below, and the ballot of odd values.
FSC_KERNEL(32, 1) exchange(FSC_CONST_PARAM const Arguments arguments) {
  const int value = arguments.array<int>(0)[threadIdx.x];
  int* out = arguments.array<int>(1) + threadIdx.x * 8;
  out[0] = warp_shuffle(value, 5);
  out[1] = warp_shuffle_xor(value, 1);
  out[2] = __shfl_down_sync(kFullWarp, value, 3);
  out[3] = __shfl_up_sync(kFullWarp, value, 3);
  out[4] = static_cast<int>(__ballot_sync(kFullWarp, value & 1));
  out[5] = __any_sync(kFullWarp, value == 7);
  out[6] = __shfl_down_sync(kFullWarp, value, 1, 8);
  out[7] = __shfl_sync(kFullWarp, value, 2, 16);
}
const Registration exchange_registration("exchange", exchange);

// Warps 0-1 fill a ring of two buffers, warps 2-3 double what they find, with named barriers alone.
struct Ring {
  float values[2][64];
};
FSC_KERNEL(128, 1) ring(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Ring, shared);
  const int64_t rounds = arguments.numbers[0];
  const int place = threadIdx.x % 64;
  const bool producer = threadIdx.x < 64;
  const auto full = [](int stage) { return 1 + stage; };
  const auto empty = [](int stage) { return 3 + stage; };
  for (int64_t round = 0; round < rounds; ++round) {
    const int stage = round % 2;
    if (producer) {
      if (round >= 2 && !arguments.bug) barrier_sync(empty(stage), 128);
      shared.values[stage][place] = arguments.array<float>(0)[round * 64 + place];  // BUG ring
      barrier_arrive(full(stage), 128);
    } else {
      barrier_sync(full(stage), 128);
      arguments.array<float>(1)[round * 64 + place] = 2 * shared.values[stage][63 - place];
      if (round + 2 < rounds && !arguments.bug) barrier_arrive(empty(stage), 128);
    }
  }
}
const Registration ring_registration("ring", ring, sizeof(Ring));

}  // namespace
}  // namespace fused_sepconv
