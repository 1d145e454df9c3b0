// warp.cpp - warp collectives: lanes meet, the last one to come acts for all.
#include <cstring>

#include "barrier.h"
#include "device.h"
#include "failure.h"
#include "scheduler.h"
#include "state.h"

namespace emulator {
namespace {

Thread& thread_of_lane(const Thread& self, int lane) { return self.block->threads[self.warp() * kWarpSize + lane]; }

// The lanes that a warp has: fewer than 32 in the last one of a block of odd size.
uint32_t existing_lanes(const Thread& self) {
  const int count = current_worker->launch->threads - self.warp() * kWarpSize;
  return count >= kWarpSize ? 0xffffffffu : (1u << count) - 1;
}

void check_can_meet(const Thread& self, const char* name, uint32_t mask, Site site) {
  if (!(mask >> self.lane() & 1)) fail(self, site, "%s: the calling lane is not in its own mask %08x", name, mask);
  for (int lane = 0; lane < kWarpSize; ++lane)
    if ((mask >> lane & 1) && thread_of_lane(self, lane).status == Status::exited)
      fail(self, site, "%s: lane %d of mask %08x has exited", name, lane, mask);
}

// The collective with this mask that other lanes already wait in, null if the caller is the first.
PendingCollective* find_pending(const Thread& self, const char* name, uint32_t mask, Site site) {
  for (PendingCollective& pending : self.block->collectives[self.warp()]) {
    const uint32_t common = pending.arguments.mask & mask;
    if (!common) continue;
    if (pending.arguments.mask != mask)
      fail(self, site, "warp divergence: %s with mask %08x while other lanes wait in %s with mask %08x at %s", name,
           mask, pending.name, pending.arguments.mask, Origin(pending.site).describe().c_str());
    if (pending.site.line != site.line || std::strcmp(pending.name, name) != 0)
      fail(self, site, "warp divergence: %s while other lanes wait in %s at %s", name, pending.name,
           Origin(pending.site).describe().c_str());
    return &pending;
  }
  return nullptr;
}

void make_writes_visible(const WarpArguments& arguments) {
  if (!checked_build) return;
  const Thread& self = current_thread();
  VectorClock joined;
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (arguments.mask >> lane & 1) join_clock(joined, thread_of_lane(self, lane).clock);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(arguments.mask >> lane & 1)) continue;
    thread_of_lane(self, lane).clock = joined;
    begin_step(thread_of_lane(self, lane));
  }
}

}  // namespace

void warp_collective(const char* name, uint32_t mask, void* argument, CollectiveBody body, Site site) {
  Thread& self = current_thread();
  mask &= existing_lanes(self);
  check_can_meet(self, name, mask, site);
  auto& pending_in_warp = self.block->collectives[self.warp()];
  PendingCollective* pending = find_pending(self, name, mask, site);
  if (!pending) {
    pending_in_warp.push_back({name, site, body, 0, {mask, {}}});
    pending = &pending_in_warp.back();
  }
  pending->arrived |= 1u << self.lane();
  pending->arguments.of_lane[self.lane()] = argument;
  if (pending->arrived != mask) {
    wait_here(name, site);
    return;
  }
  const PendingCollective complete = *pending;
  *pending = pending_in_warp.back();
  pending_in_warp.pop_back();
  complete.body(complete.arguments);
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (lane != self.lane() && (mask >> lane & 1)) wake(thread_of_lane(self, lane));
  give_way();
}

void sync_warp(uint32_t mask, Site site) { warp_collective("__syncwarp", mask, nullptr, make_writes_visible, site); }

}  // namespace emulator
