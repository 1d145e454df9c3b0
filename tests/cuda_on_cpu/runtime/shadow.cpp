#include "shadow.h"

#include <algorithm>

#include "failure.h"
#include "state.h"

namespace emulator {
namespace {

bool is_over(const AccessRecord& record, const Thread& thread) {
  if (record.clock == 0) return true;
  return record.block == thread.block->index && record.clock <= thread.clock[record.thread];
}

bool is_own(const AccessRecord& record, const Thread& thread) {
  return record.block == thread.block->index && record.thread == thread.index;
}

AccessRecord record_of(const Thread& thread, Access access, Origin origin) {
  AccessRecord record;
  record.clock = thread.clock[thread.index];
  record.block = static_cast<uint32_t>(thread.block->index);
  record.origin = origin;
  record.thread = static_cast<uint16_t>(thread.index);
  record.atomic = access == Access::atomic;
  return record;
}

std::string name_of(const AccessRecord& record, const Thread& thread) {
  std::string name = "thread " + std::to_string(record.thread);
  if (record.block != thread.block->index) name += " of block " + std::to_string(record.block);
  return name;
}

struct Place {
  const char* space;
  size_t offset;
};

[[noreturn]] void fail_race(const Thread& thread, Origin origin, Place place, const char* now, const char* before,
                            const AccessRecord& other) {
  fail(thread, origin, "race in %s: %s at byte %zu, %s by %s with no barrier between (at %s)", place.space, now,
       place.offset, before, name_of(other, thread).c_str(), other.origin.describe().c_str());
}

void check_contents(Contents contents, Access access, const Thread& thread, Origin origin, Place place) {
  if (contents == Contents::in_flight && access != Access::async_arrival)
    fail(thread, origin, "%s of %s at byte %zu, where a cp.async has not been waited for",
         is_read(access) ? "read" : "write", place.space, place.offset);
  if (contents == Contents::garbage && (access == Access::read || access == Access::atomic))
    fail(thread, origin, "read of uninitialised %s at byte %zu", place.space, place.offset);
}

template <int Readers>
void check_races(const ShadowCell<Readers>& cell, Access access, const Thread& thread, Origin origin, Place place) {
  const char* now = is_read(access) ? "read" : "write";
  const bool both_atomic = access == Access::atomic && cell.write.atomic;
  if (!both_atomic && !is_over(cell.write, thread)) fail_race(thread, origin, place, now, "written", cell.write);
  if (is_read(access)) return;
  for (const AccessRecord& read : cell.reads)
    if (!is_over(read, thread)) fail_race(thread, origin, place, now, "read", read);
}

// The record that a new reader replaces: its own; else one that is over, as a write after the new read is also after
// that one; else, among blocks, its own block's, so that readers of two blocks stay known and no writer passes.
template <int Readers>
AccessRecord& record_to_replace(ShadowCell<Readers>& cell, const Thread& thread) {
  for (AccessRecord& read : cell.reads)
    if (is_own(read, thread)) return read;
  for (AccessRecord& read : cell.reads)
    if (is_over(read, thread)) return read;
  const auto is_foreign = [&](const AccessRecord& read) { return read.block != thread.block->index; };
  if (std::any_of(cell.reads, cell.reads + Readers, is_foreign))
    for (AccessRecord& read : cell.reads)
      if (!is_foreign(read)) return read;
  return cell.reads[thread.index % Readers];
}

// Whether the thread's last check still holds: a write since then would have cleared the record. Most reads repeat one.
template <int Readers>
bool was_read_in_this_step(const ShadowCell<Readers>& cell, const Thread& thread) {
  for (const AccessRecord& read : cell.reads)
    if (is_own(read, thread) && read.clock == thread.clock[thread.index]) return true;
  return false;
}

}  // namespace

template <int Readers>
void Shadow<Readers>::reset(size_t bytes, Contents contents) {
  const size_t granules = (bytes + kGranule - 1) / kGranule;
  cells_.assign(granules, {});
  contents_.assign(granules, contents);
}

template <int Readers>
void Shadow<Readers>::forget_accesses() {
  cells_.assign(cells_.size(), {});
}

template <int Readers>
void Shadow<Readers>::set_contents(size_t offset, size_t bytes, Contents contents) {
  if (bytes == 0) return;
  std::fill(&contents_[offset / kGranule], &contents_[(offset + bytes - 1) / kGranule] + 1, contents);
}

template <int Readers>
void Shadow<Readers>::access(size_t offset, size_t bytes, Access access, const Thread& thread, Origin origin,
                             const char* space) {
  for (size_t granule = offset / kGranule; granule <= (offset + bytes - 1) / kGranule; ++granule) {
    const Place place{space, granule * kGranule};
    ShadowCell<Readers>& cell = cells_[granule];
    if (is_read(access) && was_read_in_this_step(cell, thread)) continue;
    const AccessRecord record = record_of(thread, access, origin);
    check_contents(contents_[granule], access, thread, origin, place);
    check_races(cell, access, thread, origin, place);
    if (is_read(access)) {
      record_to_replace(cell, thread) = record;
      continue;
    }
    cell.write = record;
    for (AccessRecord& read : cell.reads) read = {};
    contents_[granule] = access == Access::async_issue ? Contents::in_flight : Contents::value;
  }
}

template class Shadow<kSharedReaders>;
template class Shadow<kGlobalReaders>;

}  // namespace emulator
