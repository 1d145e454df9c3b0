// device.h - what a thread of a running kernel can ask of the emulator: the CPU bodies of csrc/primitives call these.
//
// All of them take the line of the call, which errors and counters name.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

#include "site.h"

namespace emulator {

// ---- who am I. Constant while a thread runs, hence the attribute: the compiler may keep the result.

__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();
__attribute__((const)) int lane_index();  // 0 to 31 within the warp

// ---- memory

// The block's dynamic shared memory, 1024-byte aligned. An error if the launch gave fewer than `bytes`.
unsigned char* shared_memory(size_t bytes, Site site = Site::here());

// A 32-bit shared-memory address, as on the device: an offset into the block's memory.
using SharedAddress = uint32_t;

SharedAddress shared_address(const void* pointer, Site site = Site::here());
unsigned char* shared_pointer(SharedAddress address, size_t bytes, Site site = Site::here());

// One access of 1, 2, 4, 8 or 16 bytes, which must be aligned to its size.
void read_memory(void* value, const void* address, size_t bytes, Site site);
void write_memory(void* address, const void* value, size_t bytes, Site site);

// ---- barriers

// Waits at barrier `id` until `threads` threads came; 0 means all threads of the block that have not exited.
void barrier_sync(int id, int threads, Site site);

// Counts as having come to barrier `id`, without waiting.
void barrier_arrive(int id, int threads, Site site);

// Waits for the lanes in `mask` and makes their writes visible to each other.
void sync_warp(uint32_t mask, Site site);

// ---- warp collectives

// What the body of a collective sees: each taking-part lane's argument, null for the lanes that are not in the mask.
struct WarpArguments {
  uint32_t mask;
  void* of_lane[32];
};
using CollectiveBody = void (*)(const WarpArguments& arguments);

// Waits until all lanes in `mask` made the same call from the same line, then runs `body` once.
void warp_collective(const char* name, uint32_t mask, void* argument, CollectiveBody body, Site site);

// ---- asynchronous copies: the bytes arrive when the copying thread waits, and are NaN until then

// Copies `valid_bytes` (0 to `bytes`) from global to shared memory and fills the rest of `bytes` with zeros.
void async_copy(SharedAddress destination, const void* source, int bytes, int valid_bytes, Site site);
void async_copy_commit(Site site);
void async_copy_wait(int pending_groups, Site site);  // until at most so many committed groups are pending

// ---- matrices

// ldmatrix and stmatrix of `count` (1, 2, 4) 8x8 matrices of 16-bit elements; lane 8m + r gives the address of row r of
// matrix m.
void load_matrices(uint32_t* fragments, int count, bool transposed, SharedAddress row, Site site);
void store_matrices(const uint32_t* fragments, int count, bool transposed, SharedAddress row, Site site);

// mma.sync: accumulator += a * b, with the operands spread over the warp as PTX lays them out. Products are exact, sums
// are float32 in ascending order of k; the tensor cores' own order and rounding of sums differ slightly.
void mma_m16n8k16_f16(float* accumulator, const uint32_t* a, const uint32_t* b, Site site);
void mma_m16n8k16_bf16(float* accumulator, const uint32_t* a, const uint32_t* b, Site site);
void mma_m16n8k8_tf32(float* accumulator, const uint32_t* a, const uint32_t* b, Site site);

// ---- atomics

// Replaces the value at `address` by update(value, operand) in one step; `previous` gets the value before.
using AtomicUpdate = void (*)(void* value, const void* operand);
void atomic_update(void* address, size_t bytes, AtomicUpdate update, const void* operand, void* previous, Site site);

}  // namespace emulator
