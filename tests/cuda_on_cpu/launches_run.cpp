// launches_run.cpp - all that the null build is compiled for: everything else it shares with the plain one.
#include "runtime/control.h"

#ifdef FSC_NULL
const bool emulator::launches_run = false;
#else
const bool emulator::launches_run = true;
#endif
