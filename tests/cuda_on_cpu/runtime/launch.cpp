// launch.cpp - from a launch to blocks on OS threads, and the counts of what ran.
#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <thread>

#include "control.h"
#include "failure.h"
#include "fault_handler.h"
#include "scheduler.h"
#include "state.h"

namespace emulator {

thread_local Worker* current_worker = nullptr;

namespace {

// ---- state of the process, under one lock

std::mutex state_mutex;
Schedule chosen_schedule;
std::map<std::string, int64_t> launches_by_instance;
std::map<std::string, int> shared_bytes_by_instance;
std::map<std::string, BufferTraffic> traffic_by_buffer;
std::map<std::string, int64_t> conflicts_by_line;
std::vector<std::unique_ptr<Worker>> idle_workers;

std::unique_ptr<Worker> take_worker() {
  std::lock_guard<std::mutex> lock(state_mutex);
  if (idle_workers.empty()) return std::make_unique<Worker>();
  std::unique_ptr<Worker> worker = std::move(idle_workers.back());
  idle_workers.pop_back();
  return worker;
}

void return_worker(std::unique_ptr<Worker> worker) {
  std::lock_guard<std::mutex> lock(state_mutex);
  for (size_t i = 0; i < worker->traffic.size(); ++i) {
    BufferTraffic& total = traffic_by_buffer[worker->launch->memory->buffer_name(i)];
    total.read += worker->traffic[i].read;
    total.written += worker->traffic[i].written;
  }
  for (const auto& [site, conflicts] : worker->bank_conflicts)
    conflicts_by_line[Origin(Site{site.first, site.second}).describe()] += conflicts;
  worker->traffic.clear();
  worker->bank_conflicts.clear();
  idle_workers.push_back(std::move(worker));
}

// ---- one block on one worker

void set_up_thread(Thread& thread, Block& block, int index) {
  thread.block = &block;
  thread.index = index;
  thread.copies.clear();
  thread.copy_groups.clear();
  thread.uncommitted_copies = 0;
  if (!checked_build) return;
  thread.clock.assign(block.threads.size(), 0);
  thread.clock[index] = 1;
}

void set_up_block(Worker& worker, int64_t index) {
  const Launch& launch = *worker.launch;
  worker.stacks.reserve(launch.threads);
  worker.failure = {};
  worker.ready.reset(launch.threads, launch.schedule.order, launch.schedule.seed + index);
  std::memset(worker.shared, 0xff, launch.shared_bytes);  // NaN in every floating-point type
  Block& block = worker.block;
  block.index = index;
  block.live = launch.threads;
  for (Barrier& barrier : block.barriers) barrier = {};
  block.collectives.resize((launch.threads + kWarpSize - 1) / kWarpSize);
  for (auto& pending : block.collectives) pending.clear();
  if (checked_build) block.shadow.reset(launch.shared_bytes, Contents::garbage);
  block.threads.resize(launch.threads);
  for (int i = 0; i < launch.threads; ++i) set_up_thread(block.threads[i], block, i);
}

// ---- all blocks on all workers

// In which order blocks start: a permutation of 0 to count - 1.
class BlockOrder {
 public:
  BlockOrder(const Schedule& schedule, int64_t count) : order_(schedule.order), count_(count) {
    Random random;
    random.seed(schedule.seed);
    start_ = random.next() % count;
    do step_ = random.next() % count + 1;
    while (std::gcd(step_, count) != 1);
  }
  int64_t at(int64_t position) const {
    if (order_ == Order::forward) return position;
    if (order_ == Order::reverse) return count_ - 1 - position;
    return static_cast<int64_t>((start_ + static_cast<__int128>(step_) * position) % count_);
  }

 private:
  Order order_;
  int64_t count_, start_, step_;
};

// Blocks still to run, and the first error; shared by the workers of a launch.
struct Progress {
  Progress(const Schedule& schedule, int64_t count) : order(schedule, count), blocks(count) {}

  BlockOrder order;
  int64_t blocks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
};

void run_blocks(const Launch& launch, Progress& progress) {
  std::unique_ptr<Worker> worker = take_worker();
  worker->launch = &launch;
  if (launch.memory) worker->traffic.assign(launch.memory->buffer_count(), {});
  current_worker = worker.get();
  {
    FaultsBecomeErrors faults(*worker);
    for (int64_t position; !progress.failed && (position = progress.next++) < progress.blocks;) {
      set_up_block(*worker, progress.order.at(position));
      run_block(*worker);
      if (!worker->failure.happened) continue;
      std::lock_guard<std::mutex> lock(progress.mutex);
      if (!progress.failed) progress.error = describe_failure(*worker);
      progress.failed = true;
    }
  }
  current_worker = nullptr;
  return_worker(std::move(worker));
}

void check_launch(const Launch& launch) {
  const auto refuse = [&](const std::string& what) { throw Error(std::string(launch.instance) + ": " + what); };
  if (current_worker) refuse("launched from inside a kernel");
  if (launch.blocks < 1 || launch.blocks > INT32_MAX) refuse(std::to_string(launch.blocks) + " blocks");
  if (launch.threads < 1 || launch.threads > kMaxThreads) refuse(std::to_string(launch.threads) + " threads a block");
  if (launch.shared_bytes < 0 || launch.shared_bytes > kMaxSharedBytes)
    refuse(std::to_string(launch.shared_bytes) + " bytes of shared memory a block");
}

int os_threads_for(const Launch& launch) {
  const int wanted =
      launch.schedule.os_threads ? launch.schedule.os_threads : static_cast<int>(std::thread::hardware_concurrency());
  return static_cast<int>(std::min<int64_t>(std::max(wanted, 1), launch.blocks));
}

void count_launch(const char* instance, int shared_bytes) {
  std::lock_guard<std::mutex> lock(state_mutex);
  ++launches_by_instance[instance];
  int& most = shared_bytes_by_instance[instance];
  most = std::max(most, shared_bytes);
}

GlobalMemory* checked_memory() {
  GlobalMemory* memory = current_global_memory();
  if (!checked_build || !memory || memory->empty()) return nullptr;
  memory->begin_launch();
  return memory;
}

}  // namespace

Worker::Worker() {
  void* mapping =
      mmap(nullptr, kMaxSharedBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  shared = static_cast<unsigned char*>(mapping);
}

Worker::~Worker() { munmap(shared, kMaxSharedBytes); }

void launch(const char* instance, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body) {
  count_launch(instance, shared_bytes);
  if (!launches_run) return;
  Launch launch{instance, blocks, threads, shared_bytes, &body, {}, nullptr, {}};
  check_launch(launch);
  {
    std::lock_guard<std::mutex> lock(state_mutex);
    launch.schedule = chosen_schedule;
  }
  launch.memory = checked_memory();
  if (launch.memory) launch.host_stack = own_stack();
  Progress progress(launch.schedule, blocks);
  std::vector<std::thread> helpers;
  for (int i = 1; i < os_threads_for(launch); ++i) helpers.emplace_back([&] { run_blocks(launch, progress); });
  run_blocks(launch, progress);
  for (std::thread& helper : helpers) helper.join();
  if (progress.failed) throw Error(progress.error);
}

// ---- what a running thread asks about itself

uint3 thread_index() { return {static_cast<unsigned>(current_thread().index), 0, 0}; }
uint3 block_index() { return {static_cast<unsigned>(current_block().index), 0, 0}; }
dim3 block_size() { return {static_cast<unsigned>(current_worker->launch->threads), 1, 1}; }
dim3 grid_size() { return {static_cast<unsigned>(current_worker->launch->blocks), 1, 1}; }
int lane_index() { return current_thread().lane(); }

// ---- what hosts ask about launches

void set_schedule(const Schedule& schedule) {
  std::lock_guard<std::mutex> lock(state_mutex);
  chosen_schedule = schedule;
}

std::map<std::string, int64_t> executed() {
  std::lock_guard<std::mutex> lock(state_mutex);
  return launches_by_instance;
}

Counters counters() {
  std::lock_guard<std::mutex> lock(state_mutex);
  Counters counters;
  for (const auto& [name, traffic] : traffic_by_buffer) {
    counters.bytes_read[name] = traffic.read;
    counters.bytes_written[name] = traffic.written;
  }
  counters.bank_conflicts = conflicts_by_line;
  counters.shared_bytes = shared_bytes_by_instance;
  return counters;
}

void reset_counters() {
  std::lock_guard<std::mutex> lock(state_mutex);
  launches_by_instance.clear();
  shared_bytes_by_instance.clear();
  traffic_by_buffer.clear();
  conflicts_by_line.clear();
}

}  // namespace emulator
