// execution.cu - threads, barriers and memory: each kernel is correct where `bug` is 0 and breaks one rule where it
// is 1.
//
// The line that a report must name ends in "BUG <kernel>".
#include "named_barrier.h"
#include "primitives/async_copy.h"
#include "primitives/matrix.h"
#include "primitives/vector.h"
#include "primitives/warp.h"
#include "registry.h"

namespace fused_sepconv {
namespace {

constexpr int kThreads = 128;

struct Row {
  alignas(16) float values[kThreads];
};

// Every block turns its part of array 0 round, through shared memory. Bug: no barrier between writing and reading.
FSC_KERNEL(kThreads, 1) reverse_block(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Row, shared);
  const int64_t start = int64_t{blockIdx.x} * blockDim.x;
  shared.values[threadIdx.x] = arguments.array<float>(0)[start + threadIdx.x];
  if (!arguments.bug) __syncthreads();
  arguments.array<float>(1)[start + threadIdx.x] = shared.values[blockDim.x - 1 - threadIdx.x];  // BUG reverse_block
}
const Registration reverse_block_("reverse_block", reverse_block, sizeof(Row));

// The same row is filled twice. Bug: the second filling does not wait for the readers of the first.
FSC_KERNEL(kThreads, 1) refill(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Row, shared);
  for (int round = 0; round < 2; ++round) {
    const float value = arguments.array<float>(0)[round * kThreads + threadIdx.x];
    shared.values[threadIdx.x] = value;  // BUG refill
    __syncthreads();
    const float other = shared.values[kThreads - 1 - threadIdx.x];  // BUG refill
    arguments.array<float>(1)[round * kThreads + threadIdx.x] = other;
    if (!arguments.bug) __syncthreads();
  }
}
const Registration refill_("refill", refill, sizeof(Row));

// Neighbouring lanes exchange values. Bug: no __syncwarp.
FSC_KERNEL(kThreads, 1) swap_in_warp(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Row, shared);
  shared.values[threadIdx.x] = arguments.array<float>(0)[threadIdx.x];
  if (!arguments.bug) __syncwarp();
  arguments.array<float>(1)[threadIdx.x] = shared.values[threadIdx.x ^ 1];  // BUG swap_in_warp
}
const Registration swap_in_warp_("swap_in_warp", swap_in_warp, sizeof(Row));

// Every thread copies four floats to shared memory and reads them back. Bug: it waits for the copy after reading.
FSC_KERNEL(32, 1) wait_for_copy(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Row, shared);
  float* mine = &shared.values[4 * threadIdx.x];
  async_copy<16>(shared_address(mine), arguments.array<float>(0) + 4 * threadIdx.x, true);
  async_copy_commit();
  if (!arguments.bug) async_copy_wait<0>();
  const Vector<float, 4> values = load<4>(mine);  // BUG wait_for_copy
  if (arguments.bug) async_copy_wait<0>();
  store(arguments.array<float>(1) + 4 * threadIdx.x, values);
}
const Registration wait_for_copy_("wait_for_copy", wait_for_copy, sizeof(Row));

// Bug: the copies are never waited for.
FSC_KERNEL(32, 1) abandon_copy(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Row, shared);
  async_copy<16>(shared_address(&shared.values[4 * threadIdx.x]), arguments.array<float>(0), true);  // BUG abandon_copy
  async_copy_commit();
  if (!arguments.bug) async_copy_wait<0>();
}
const Registration abandon_copy_("abandon_copy", abandon_copy, sizeof(Row));

// Bug: the second half of the block waits at a barrier of its own.
FSC_KERNEL(kThreads, 1) diverge_at_barrier(FSC_CONST_PARAM const Arguments arguments) {
  if (arguments.bug && threadIdx.x >= 64) {
    __syncthreads();  // BUG diverge_at_barrier
  } else {
    __syncthreads();
  }
}
const Registration diverge_at_barrier_("diverge_at_barrier", diverge_at_barrier);

// Warps 0 and 1 wait for each other, then all threads do. Bug: the first barrier expects a warp that never comes.
FSC_KERNEL(kThreads, 1) wait_for_ever(FSC_CONST_PARAM const Arguments arguments) {
  if (threadIdx.x < 64) barrier_sync(1, arguments.bug ? 96 : 64);  // BUG wait_for_ever
  __syncthreads();                                                 // ALSO wait_for_ever
}
const Registration wait_for_ever_("wait_for_ever", wait_for_ever);

// Half of the warp leaves early; the others sum over themselves. Bug: over the whole warp.
FSC_KERNEL(32, 1) shuffle_in_branch(FSC_CONST_PARAM const Arguments arguments) {
  if (threadIdx.x >= 16) return;
  const unsigned mask = arguments.bug ? kFullWarp : 0x0000ffffu;
  const int sum = __reduce_add_sync(mask, static_cast<int>(threadIdx.x));  // BUG shuffle_in_branch
  arguments.array<int>(0)[threadIdx.x] = sum;
}
const Registration shuffle_in_branch_("shuffle_in_branch", shuffle_in_branch);

// Bug: lanes of one warp reach two different shuffles.
FSC_KERNEL(32, 1) diverge_in_warp(FSC_CONST_PARAM const Arguments arguments) {
  int value = static_cast<int>(threadIdx.x);
  if (arguments.bug && threadIdx.x % 2)
    value = __shfl_xor_sync(kFullWarp, value, 2);  // BUG diverge_in_warp
  else
    value = __shfl_xor_sync(kFullWarp, value, 2);  // BUG diverge_in_warp
  arguments.array<int>(0)[threadIdx.x] = value;
}
const Registration diverge_in_warp_("diverge_in_warp", diverge_in_warp);

// Bug: the last thread's value was never written to shared memory.
FSC_KERNEL(kThreads, 1) read_garbage(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Row, shared);
  if (!arguments.bug || threadIdx.x != kThreads - 1) shared.values[threadIdx.x] = 1.0f;
  __syncthreads();
  arguments.array<float>(0)[threadIdx.x] = shared.values[kThreads - 1 - threadIdx.x];  // BUG read_garbage
}
const Registration read_garbage_("read_garbage", read_garbage, sizeof(Row));

// Bug: the output is read before anything was written to it.
FSC_KERNEL(kThreads, 1) add_to_garbage(FSC_CONST_PARAM const Arguments arguments) {
  float* out = arguments.array<float>(0) + threadIdx.x;
  if (!arguments.bug) *out = 0.0f;
  *out += 1.0f;  // BUG add_to_garbage
}
const Registration add_to_garbage_("add_to_garbage", add_to_garbage);

// Copies numbers[0] floats and fills up with zeros. Bug: the boundary is not looked at.
FSC_KERNEL(kThreads, 1) read_past_end(FSC_CONST_PARAM const Arguments arguments) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  float value = 0.0f;
  if (arguments.bug || i < arguments.numbers[0]) value = arguments.array<float>(0)[i];  // BUG read_past_end
  arguments.array<float>(1)[i] = value;
}
const Registration read_past_end_("read_past_end", read_past_end);

FSC_KERNEL(kThreads, 1) write_past_end(FSC_CONST_PARAM const Arguments arguments) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (arguments.bug || i < arguments.numbers[0]) arguments.array<float>(0)[i] = 1.0f;  // BUG write_past_end
}
const Registration write_past_end_("write_past_end", write_past_end);

// Bug: one element past the end of shared memory.
FSC_KERNEL(kThreads, 1) write_past_shared(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Row, shared);
  float* values = shared.values;
  values[threadIdx.x + (arguments.bug ? 1 : 0)] = 1.0f;  // BUG write_past_shared
}
const Registration write_past_shared_("write_past_shared", write_past_shared, sizeof(Row));

// Bug: the vector starts at an odd element.
FSC_KERNEL(32, 1) misaligned_vector(FSC_CONST_PARAM const Arguments arguments) {
  const float* source = arguments.array<float>(0) + 4 * threadIdx.x + (arguments.bug ? 1 : 0);
  const Vector<float, 4> values = load_read_only<4>(source);  // BUG misaligned_vector
  store(arguments.array<float>(1) + 4 * threadIdx.x, values);
}
const Registration misaligned_vector_("misaligned_vector", misaligned_vector);

// As above, by a plain access to a reinterpreted pointer: only the checked build sees it.
FSC_KERNEL(32, 1) misaligned_cast(FSC_CONST_PARAM const Arguments arguments) {
  const uint16_t* source = arguments.array<uint16_t>(0) + 2 * threadIdx.x + (arguments.bug ? 1 : 0);
  const float value = *reinterpret_cast<const float*>(source);  // BUG misaligned_cast
  arguments.array<float>(1)[threadIdx.x] = value;
}
const Registration misaligned_cast_("misaligned_cast", misaligned_cast);

// Every block sums its part into its own element. Bug: all into the first, one after the other.
FSC_KERNEL(32, 1) sum_of_blocks(FSC_CONST_PARAM const Arguments arguments) {
  const float sum = warp_sum(arguments.array<float>(0)[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) arguments.array<float>(1)[arguments.bug ? 0 : blockIdx.x] += sum;  // BUG sum_of_blocks
}
const Registration sum_of_blocks_("sum_of_blocks", sum_of_blocks);

// Thread 0 writes to global memory what thread 1 of the block reads. Bug: no barrier.
FSC_KERNEL(kThreads, 1) hand_over(FSC_CONST_PARAM const Arguments arguments) {
  float* array = arguments.array<float>(0);
  if (threadIdx.x == 0) array[0] = 2.0f;
  if (!arguments.bug) __syncthreads();
  if (threadIdx.x == 1) array[1] = array[0];  // BUG hand_over
}
const Registration hand_over_("hand_over", hand_over);

// All threads of all blocks count together. Bug: without atomics.
FSC_KERNEL(kThreads, 1) count_threads(FSC_CONST_PARAM const Arguments arguments) {
  int* count = arguments.array<int>(0);
  if (arguments.bug)
    ++*count;  // BUG count_threads
  else
    atomicAdd(count, 1);
}
const Registration count_threads_("count_threads", count_threads);

// Bug: the kernel writes to what is declared an input.
FSC_KERNEL(kThreads, 1) write_to_input(FSC_CONST_PARAM const Arguments arguments) {
  if (arguments.bug) arguments.array<float>(0)[threadIdx.x] = 0.0f;  // BUG write_to_input
}
const Registration write_to_input_("write_to_input", write_to_input);

// Bug: the launch gives less shared memory than the struct needs.
FSC_KERNEL(kThreads, 1) too_little_shared(FSC_CONST_PARAM const Arguments arguments) {
  if (!arguments.bug) return;
  FSC_SHARED(Row, shared);  // BUG too_little_shared
  shared.values[threadIdx.x] = 0.0f;
}
const Registration too_little_shared_("too_little_shared", too_little_shared, sizeof(Row) - 16);

// Bug: recursion without end.
__attribute__((noinline)) int deep(volatile int* values, int depth) {  // BUG overflow_stack
  volatile int frame[1024];
  frame[depth % 1024] = depth;                                                     // BUG overflow_stack
  return depth > 1000 ? values[0] : deep(frame, depth + 1) + frame[depth % 1024];  // BUG overflow_stack
}
FSC_KERNEL(32, 1) overflow_stack(FSC_CONST_PARAM const Arguments arguments) {
  volatile int start = 0;
  arguments.array<int>(0)[threadIdx.x] = arguments.bug ? deep(&start, 0) : 0;
}
const Registration overflow_stack_("overflow_stack", overflow_stack);

// Bug: a loop goes one past an array of the thread's own.
FSC_KERNEL(32, 1) index_past_array(FSC_CONST_PARAM const Arguments arguments) {
  float values[2][4];
  for (int i = 0; i < 8; ++i) values[i / 4][i % 4] = static_cast<float>(i);
  float sum = 0;
  for (int i = 0; i < (arguments.bug ? 5 : 4); ++i) sum += values[1][i];  // BUG index_past_array
  arguments.array<float>(0)[threadIdx.x] = sum;
}
const Registration index_past_array_("index_past_array", index_past_array);

// Loads four times an 8x8 matrix whose rows are numbers[0] bytes apart.
struct Matrix {
  alignas(16) uint16_t values[8 * 64];
};
FSC_KERNEL(32, 1) load_with_pitch(FSC_CONST_PARAM const Arguments arguments) {
  FSC_SHARED(Matrix, shared);
  for (int i = threadIdx.x; i < 8 * 64; i += 32) shared.values[i] = static_cast<uint16_t>(i);
  __syncwarp();
  const uint32_t row = shared_address(shared.values) + threadIdx.x % 8 * arguments.numbers[0];
  uint32_t fragments[4];
  ldmatrix_x4(fragments, row);  // BUG load_with_pitch
  arguments.array<uint32_t>(0)[threadIdx.x] = fragments[0];
}
const Registration load_with_pitch_("load_with_pitch", load_with_pitch, sizeof(Matrix));

}  // namespace
}  // namespace fused_sepconv
