// scheduler.h - who runs: threads as fibers, waiting and being woken. Internal.
#pragma once

#include "site.h"

namespace emulator {

struct Thread;
struct Worker;

// Runs the worker's blocks, which are set up, until all their threads have exited or one has failed.
void run_block(Worker& worker);

// The running thread waits until wake() is called for it; `what` and `site` are for the deadlock report.
void wait_here(const char* what, Site site);
void wake(Thread& thread);

// Under a random schedule, lets another thread go first.
void give_way();

}  // namespace emulator
