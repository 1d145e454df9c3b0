// barrier.h - vector clocks and what barriers do to them. Internal.
#pragma once

#include <vector>

#include "state.h"

namespace emulator {

// A thread that passes on what it knows starts a new step, so that what it does next is not taken for known.
void join_clock(VectorClock& clock, const VectorClock& other);
void begin_step(Thread& thread);

// Counts an exiting thread out of the barriers that wait for all threads.
void leave_barriers(Thread& thread);

}  // namespace emulator
