// What is inlined whatever its size: all code below a task is, so that it is compiled for the
// instruction set of the function that runs the task (workers.h).

#pragma once

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
