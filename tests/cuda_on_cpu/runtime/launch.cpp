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

// ---- one cluster on one worker

void set_up_thread(Thread& thread, Block& block, int index, int slot, int slots) {
  thread.block = &block;
  thread.index = index;
  thread.slot = slot;
  thread.copies.clear();
  thread.copy_groups.clear();
  thread.uncommitted_copies = 0;
  if (!checked_build) return;
  thread.clock.assign(slots, 0);
  thread.clock[slot] = 1;
}

void set_up_block(Worker& worker, int64_t cluster, int rank) {
  const Launch& launch = *worker.launch;
  Block& block = worker.blocks[rank];
  block.index = cluster * launch.cluster + rank;
  block.rank = rank;
  block.cluster = static_cast<uint32_t>(cluster);
  block.live = launch.threads;
  block.shared = worker.shared_arena + rank * kSharedStride;
  block.threads = &worker.threads[rank * launch.threads];
  for (Barrier& barrier : block.barriers) barrier = {};
  block.collectives.resize((launch.threads + kWarpSize - 1) / kWarpSize);
  for (auto& pending : block.collectives) pending.clear();
  std::memset(block.shared, 0xff, launch.shared_bytes);  // NaN in every floating-point type
  if (checked_build) block.shadow.reset(launch.shared_bytes, Contents::garbage);
  for (int i = 0; i < launch.threads; ++i)
    set_up_thread(block.threads[i], block, i, rank * launch.threads + i, launch.cluster * launch.threads);
}

void set_up_cluster(Worker& worker, int64_t cluster) {
  const Launch& launch = *worker.launch;
  const int slots = launch.cluster * launch.threads;
  worker.blocks.resize(launch.cluster);
  worker.threads.resize(slots);
  worker.stacks.reserve(slots);
  worker.live = slots;
  worker.cluster_barrier = {};
  worker.failure = {};
  worker.ready.reset(slots, launch.schedule.order, launch.schedule.seed + cluster);
  for (int rank = 0; rank < launch.cluster; ++rank) set_up_block(worker, cluster, rank);
}

// ---- all clusters on all workers

// In which order clusters start: a permutation of 0 to count - 1.
class ClusterOrder {
 public:
  ClusterOrder(const Schedule& schedule, int64_t count) : order_(schedule.order), count_(count) {
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

// Clusters still to run, and the first error; shared by the workers of a launch.
struct Progress {
  Progress(const Schedule& schedule, int64_t count) : order(schedule, count), clusters(count) {}

  ClusterOrder order;
  int64_t clusters;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
};

void run_clusters(const Launch& launch, Progress& progress) {
  std::unique_ptr<Worker> worker = take_worker();
  worker->launch = &launch;
  if (launch.memory) worker->traffic.assign(launch.memory->buffer_count(), {});
  current_worker = worker.get();
  {
    FaultsBecomeErrors faults(*worker);
    for (int64_t position; !progress.failed && (position = progress.next++) < progress.clusters;) {
      set_up_cluster(*worker, progress.order.at(position));
      run_cluster(*worker);
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
  if (launch.cluster < 1 || launch.cluster > kMaxCluster || launch.blocks % launch.cluster != 0)
    refuse("clusters of " + std::to_string(launch.cluster) + " blocks in a grid of " + std::to_string(launch.blocks));
}

int os_threads_for(const Launch& launch) {
  const int wanted =
      launch.schedule.os_threads ? launch.schedule.os_threads : static_cast<int>(std::thread::hardware_concurrency());
  return static_cast<int>(std::min<int64_t>(std::max(wanted, 1), launch.blocks / launch.cluster));
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
  void* mapping = mmap(nullptr, kMaxCluster * kSharedStride, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  shared_arena = static_cast<unsigned char*>(mapping);
}

Worker::~Worker() { munmap(shared_arena, kMaxCluster * kSharedStride); }

void launch(const char* instance, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body,
            int cluster) {
  count_launch(instance, shared_bytes);
  if (!launches_run) return;
  Launch launch{instance, blocks, threads, shared_bytes, cluster, &body, {}, nullptr, {}};
  check_launch(launch);
  {
    std::lock_guard<std::mutex> lock(state_mutex);
    launch.schedule = chosen_schedule;
  }
  launch.memory = checked_memory();
  if (launch.memory) launch.host_stack = own_stack();
  const int64_t clusters = blocks / cluster;
  Progress progress(launch.schedule, clusters);
  std::vector<std::thread> helpers;
  for (int i = 1; i < os_threads_for(launch); ++i) helpers.emplace_back([&] { run_clusters(launch, progress); });
  run_clusters(launch, progress);
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
