// The engine of the emulator: runs one thread block at a time on one host thread, each CUDA thread as a
// fiber that is left only at barriers, at warp collectives and at its end. See docs/emulator.md.
//
// Every misuse that it sees throws `Failure` on the fiber; `run` turns it into Status::cuda_error and a text
// in arimg::error_text() that names kernel, block, thread and source line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "core/error.h"
#include "core/status.h"
#include "vector_types.h"

// Set by the engine for the thread that runs; kernels read them under CUDA's names.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

namespace arimg::emulator {

using Where = std::source_location;

// What the emulated device reports and enforces: the shared memory that the smallest supported GPU
// (compute capability 8.6) gives one block, and few enough multiprocessors that work is split unevenly.
inline constexpr size_t max_shared_bytes = 99 * 1024;
inline constexpr int multiprocessors = 3;

// Calls body(context) for every thread of every block. `kernel` is the text that messages show.
Status run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
           void* context);

[[noreturn]] void fail(const std::string& what, Where where);

// Block barriers. The vote barriers return, for all threads, how many threads passed true.
int block_barrier(int predicate, Where where);

// A warp collective of the lanes in `mask`. Each lane hands over a pointer to its own argument and result;
// the last lane to arrive calls complete(arguments of all 32 lanes, mask). Lanes outside the mask: nullptr.
using Complete = void (*)(void* const* lane, uint32_t mask);
void warp_collective(uint32_t mask, void* argument, Complete complete, Where where);
void order_warp_memory();  // called in `complete` of __syncwarp: earlier shared accesses happen before later

uint32_t live_lanes();
int lane();

// --- shared memory ---
unsigned char* shared_memory();
// Reserves the next allocation of this thread's arena; every thread of a block must ask for the same ones.
size_t shared_take(int index, size_t begin, size_t bytes, size_t unit, Where where);
[[noreturn]] void fail_index(long long index, size_t count, Where where);

extern bool track_shared;  // the race check is on
void note_shared(const void* address, size_t bytes, size_t unit, Where where);
// For addresses that reached an instruction as plain pointers. False: not shared memory.
bool check_shared_pointer(const void* address, size_t bytes, size_t alignment, bool atomic, Where where);

// --- cp.async of the running thread ---
void async_copy(void* to, const void* from, size_t bytes, bool valid, Where where);
void async_commit();
void async_wait(int groups_left);

}  // namespace arimg::emulator
