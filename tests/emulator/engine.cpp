#include "engine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "fault.h"
#include "fiber.h"
#include "race_check.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace arimg::emulator {

bool track_shared = false;

namespace {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Copy {
  unsigned char* to;
  const void* from;
  size_t bytes;
  bool valid;
  int group;
  Where where;
};

struct Worker {  // a fiber; it runs one thread after another until one of them has to wait
  Fiber fiber;
  unsigned char* stack_top;
};

struct Thread {
  Worker* worker;  // nullptr: not started
  uint3 index;
  // What the thread waits for, while it waits: a block barrier (complete == nullptr) or a warp collective.
  void* argument;
  Complete complete;
  uint32_t mask;
  Where where;
  std::vector<Copy> copies;
  int groups_committed;
};

struct Warp {
  uint32_t live;     // lanes that have not exited
  uint32_t ready;    // lanes that can run
  uint32_t waiting;  // lanes inside a warp collective
  uint32_t epoch;    // counts __syncwarp
};

struct Allocation {
  size_t begin, bytes, unit;
};

uint64_t environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}

struct Engine {
  // The launch.
  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::vector<unsigned char> shared_storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  // The block.
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Allocation> allocations;
  std::vector<int> order;  // of warps
  size_t order_at = 0;
  int exited = 0;
  Thread* first_at_barrier = nullptr;
  int at_barrier = 0, votes = 0, last_votes = 0;
  uint32_t epoch = 0;  // counts barriers and blocks, never goes back
  // The machinery.
  Fiber host;
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<Worker*> idle;
  Thread* current = nullptr;
  std::string failure;
  uint64_t seed = environment("ARIMG_EMULATOR_SEED", 1);
  uint64_t random_state = 0;
  bool races = environment("ARIMG_EMULATOR_RACES", 1) != 0;
  RaceCheck race_check;
  std::mutex mutex;

  uint64_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
  }
  int number(const Thread& t) const { return int(&t - threads.data()); }
  Warp& warp_of(const Thread& t) { return warps[size_t(number(t)) / 32]; }
  uint32_t bit_of(const Thread& t) const { return 1u << (number(t) % 32); }
};

Engine engine;

std::string text(uint3 v) {
  char text[40];
  std::snprintf(text, sizeof text, "(%u,%u,%u)", v.x, v.y, v.z);
  return text;
}

std::string text(Where where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string describe(const Thread& t, const std::string& place, const std::string& what) {
  return "emulated kernel " + std::string(engine.kernel) + ", block " + text(blockIdx) + ", thread " +
         text(t.index) + ", " + place + ": " + what;
}

[[noreturn]] void fail_thread(const Thread& t, const std::string& what, Where where) {
  throw Failure(describe(t, text(where), what));
}

// Where a thread that touched forbidden memory goes on: its fiber is abandoned, as after any failure.
void abandon_thread() {
  engine.failure = describe(*engine.current, "global memory", fault_text());
  Fiber here;
  here.go_to(engine.host);
}

bool same(Where a, Where b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void settle_noted() {
  const Thread& t = *engine.current;
  RaceCheck::Hazard h;
  if (engine.race_check.settle(engine.shared,
                               {engine.epoch, engine.warp_of(t).epoch, uint16_t(engine.number(t))}, h))
    return;
  fail_thread(t,
              "race: " + std::string(h.did) + " shared memory that thread " +
                  text(engine.threads[h.other].index) + " " + h.other_did + " at " + text(h.other_where) +
                  " with no barrier between the two",
              h.where);
}

void settle_accesses() {
  if (track_shared && !engine.race_check.idle()) settle_noted();
}

// --- who runs next ---

[[noreturn]] void fail_stuck_warp(size_t number) {
  Warp& warp = engine.warps[number];
  for (int lane = 0; lane < 32; ++lane) {
    if (!(warp.waiting >> lane & 1)) continue;
    const Thread& t = engine.threads[number * 32 + size_t(lane)];
    for (int other = 0; other < 32; ++other) {
      if (!(t.mask >> other & 1) || (warp.waiting >> other & 1)) continue;
      std::string what = "waits in a warp collective for lane " + std::to_string(other) + ", which ";
      if (!(warp.live >> other & 1)) fail_thread(t, what + "has exited", t.where);
      const Thread& absent = engine.threads[number * 32 + size_t(other)];
      fail_thread(t, what + "waits at the barrier " + text(absent.where), t.where);
    }
  }
  fail_thread(*engine.current, "lanes of one warp wait in collectives with different masks",
              engine.current->where);
}

void release_barrier() {
  if (engine.exited > 0)
    fail_thread(*engine.first_at_barrier,
                "divergent barrier: " + std::to_string(engine.exited) +
                    " threads of the block have exited, " + std::to_string(engine.at_barrier) + " wait here",
                engine.first_at_barrier->where);
  engine.last_votes = engine.votes;
  engine.at_barrier = engine.votes = 0;
  engine.first_at_barrier = nullptr;
  ++engine.epoch;
  for (Warp& warp : engine.warps) warp.ready = warp.live;
}

void shuffle_warps() {
  engine.order_at = 0;
  if (engine.seed == 0) return;
  for (size_t i = engine.order.size(); i > 1; --i)
    std::swap(engine.order[i - 1], engine.order[engine.random() % i]);
}

int choose_lane(uint32_t ready) {
  if (engine.seed == 0) return __builtin_ctz(ready);
  uint64_t r = engine.random();
  int turn = int(r >> 32 & 31);
  uint32_t turned = turn == 0 ? ready : (ready >> turn | ready << (32 - turn));
  int at = (r >> 40 & 1) ? __builtin_ctz(turned) : 31 - __builtin_clz(turned);
  return (at + turn) & 31;
}

// The next thread to run, nullptr when the block is done.
Thread* pick() {
  for (;;) {
    while (engine.order_at < engine.order.size()) {
      size_t number = size_t(engine.order[engine.order_at]);
      Warp& warp = engine.warps[number];
      if (warp.ready) {
        int lane = choose_lane(warp.ready);
        warp.ready &= ~(1u << lane);
        return &engine.threads[number * 32 + size_t(lane)];
      }
      if (warp.waiting) fail_stuck_warp(number);
      ++engine.order_at;
    }
    if (engine.at_barrier == 0) return nullptr;
    release_barrier();
    shuffle_warps();
  }
}

// --- fibers ---

void make_current(Thread* t) {
  engine.current = t;
  threadIdx = t->index;
}

void work();

Worker* idle_worker() {
  if (engine.idle.empty()) {
    auto& worker = engine.workers.emplace_back(std::make_unique<Worker>());
    worker->stack_top = new_stack(int(engine.workers.size()));
    worker->fiber.prepare(worker->stack_top, work);
    return worker.get();
  }
  Worker* worker = engine.idle.back();
  engine.idle.pop_back();
  return worker;
}

void go(Fiber& from, Thread* next) {
  if (!next) {
    from.go_to(engine.host);
    return;
  }
  if (!next->worker) next->worker = idle_worker();
  make_current(next);
  from.go_to(next->worker->fiber);
}

// Lets others run until this thread is ready again.
void suspend() {
  Thread* self = engine.current;
  Thread* next = pick();
  if (next == self) return;
  go(self->worker->fiber, next);
}

void exit_thread() {
  settle_accesses();
  Thread& t = *engine.current;
  engine.warp_of(t).live &= ~engine.bit_of(t);
  ++engine.exited;
}

// What each fiber runs. A thread that has not started yet continues on the fiber of one that has ended, so a
// kernel without barriers needs a single fiber and no switch at all.
void work() {
  for (;;) {
    Worker* self = engine.current->worker;
    Thread* next = nullptr;
    try {
      engine.body(engine.context);
      exit_thread();
      next = pick();
    } catch (const std::exception& e) {
      engine.failure = e.what();
    }
    if (next && !next->worker) {
      next->worker = self;
      make_current(next);
      continue;
    }
    engine.idle.push_back(self);
    go(self->fiber, next);
  }
}

// --- launches ---

void prepare_block(dim3 block) {
  size_t count = size_t(block.x) * block.y * block.z;
  engine.threads.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Thread& t = engine.threads[i];
    t.worker = nullptr;
    t.index = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
    t.copies.clear();
    t.groups_committed = 0;
  }
  engine.warps.resize((count + 31) / 32);
  for (size_t w = 0; w < engine.warps.size(); ++w) {
    uint32_t lanes = count - w * 32 >= 32 ? ~0u : (1u << (count - w * 32)) - 1;
    engine.warps[w] = {lanes, lanes, 0, 0};
  }
  engine.order.resize(engine.warps.size());
  std::iota(engine.order.begin(), engine.order.end(), 0);
  shuffle_warps();
  engine.allocations.clear();
  engine.exited = engine.at_barrier = engine.votes = 0;
  engine.first_at_barrier = nullptr;
  ++engine.epoch;
  std::memset(engine.shared, 0xff, engine.shared_bytes);
}

void run_block(dim3 block) {
  prepare_block(block);
  engine.failure.clear();
  go(engine.host, pick());
  if (engine.failure.empty()) return;
  engine.idle.clear();  // fibers were left in the middle of their threads
  for (auto& worker : engine.workers) {
    worker->fiber.prepare(worker->stack_top, work);
    engine.idle.push_back(worker.get());
  }
  engine.race_check.forget();
}

std::string bad_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return "a block has 1 to 1024 threads";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "the grid is too large";
  if (shared_bytes > max_shared_bytes) return "more than 99 KiB of shared memory, which not every GPU has";
  return "";
}

}  // namespace

Status run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
           void* context) {
  std::lock_guard<std::mutex> lock(engine.mutex);
  if (auto problem = bad_launch(grid, block, shared_bytes); !problem.empty()) {
    error_text() = "emulated launch of " + std::string(kernel) + ": " + problem;
    return Status::cuda_error;
  }
  engine.kernel = kernel;
  engine.body = body;
  engine.context = context;
  engine.random_state = (engine.seed * 0x9E3779B97F4A7C15u + 0x1234567) | 1;
  engine.shared_storage.resize(max_shared_bytes + 256);
  engine.shared = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(engine.shared_storage.data()) + 127) & ~uintptr_t(127));
  engine.shared_bytes = shared_bytes;
  track_shared = engine.races && shared_bytes > 0;
  blockDim = block;
  gridDim = grid;
  // Blocks in an order i -> (i * step + start) mod n, a permutation because step and n share no factor.
  uint64_t n = uint64_t(grid.x) * grid.y * grid.z, step = 1, start = 0;
  if (engine.seed != 0 && n > 1) {
    start = engine.random() % n;
    for (step = engine.random() % (n < (1u << 31) ? n : (1u << 31)) | 1; std::gcd(step, n) != 1;) ++step;
  }
  FaultGuard guard(abandon_thread);
  for (uint64_t i = 0; i < n; ++i) {
    uint64_t b = (i * step + start) % n;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block(block);
    if (engine.failure.empty()) continue;
    error_text() = engine.failure;
    return Status::cuda_error;
  }
  return Status::ok;
}

void fail(const std::string& what, Where where) {
  fail_thread(*engine.current, what, where);
}

void fail_index(long long index, size_t count, Where where) {
  fail("out of bounds: shared element " + std::to_string(index) + " of " + std::to_string(count), where);
}

// --- barriers and collectives ---

int block_barrier(int predicate, Where where) {
  settle_accesses();
  Thread& t = *engine.current;
  t.where = where;
  t.complete = nullptr;
  if (!engine.first_at_barrier) engine.first_at_barrier = &t;
  const Thread& first = *engine.first_at_barrier;
  if (!same(first.where, where))
    fail("divergent barrier: waits here while thread " + text(first.index) + " waits at " + text(first.where),
         where);
  ++engine.at_barrier;
  engine.votes += predicate != 0;
  suspend();
  return engine.last_votes;
}

static std::string describe_mask(uint32_t mask) {
  char text[48];
  std::snprintf(text, sizeof text, "warp collective with mask 0x%08x", mask);
  return text;
}

void warp_collective(uint32_t mask, void* argument, Complete complete, Where where) {
  settle_accesses();
  Thread& t = *engine.current;
  Warp& warp = engine.warp_of(t);
  const uint32_t bit = engine.bit_of(t);
  if (!(mask & bit)) fail(describe_mask(mask) + ", which leaves out the calling lane", where);
  if (mask & ~warp.live)
    fail(describe_mask(mask) + ", which names a lane that has exited or never was", where);
  t.argument = argument;
  t.complete = complete;
  t.mask = mask;
  t.where = where;
  warp.waiting |= bit;
  if ((warp.waiting & mask) != mask) {
    suspend();
    return;
  }
  void* lanes[32] = {};
  Thread* first = &t - engine.number(t) % 32;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& other = first[lane];
    if (other.mask != mask)
      fail(describe_mask(mask) + ", while lane " + std::to_string(lane) + " came with another mask", where);
    if (other.complete != complete || !same(other.where, where))
      fail("warp collective here, while lane " + std::to_string(lane) + " waits at " + text(other.where),
           where);
    lanes[lane] = other.argument;
  }
  complete(lanes, mask);
  warp.waiting &= ~mask;
  warp.ready |= mask & ~bit;
}

void order_warp_memory() {
  ++engine.warp_of(*engine.current).epoch;
}

uint32_t live_lanes() {
  return engine.warp_of(*engine.current).live;
}

int lane() {
  return engine.number(*engine.current) % 32;
}

// --- shared memory ---

unsigned char* shared_memory() {
  return engine.shared;
}

size_t shared_take(int index, size_t begin, size_t bytes, size_t unit, Where where) {
  size_t i = size_t(index);
  if (i == engine.allocations.size()) {
    if (begin + bytes > engine.shared_bytes)
      fail("the kernel takes " + std::to_string(begin + bytes) +
               " bytes of shared memory, the launch gives " + std::to_string(engine.shared_bytes),
           where);
    engine.allocations.push_back({begin, bytes, unit});
  }
  const Allocation& a = engine.allocations[i];
  if (a.begin != begin || a.bytes != bytes || a.unit != unit)
    fail("threads of one block take different shared memory", where);
  return (begin + bytes + 15) / 16 * 16;
}

void note_shared(const void* address, size_t bytes, size_t unit, Where where) {
  engine.race_check.note(engine.shared, static_cast<const unsigned char*>(address), bytes, unit,
                         RaceCheck::plain, where);
  if (engine.race_check.crowded()) settle_noted();
}

bool check_shared_pointer(const void* address, size_t bytes, size_t alignment, bool atomic, Where where) {
  const auto* at = static_cast<const unsigned char*>(address);
  if (at < engine.shared || at >= engine.shared + engine.shared_bytes) return false;
  if (reinterpret_cast<uintptr_t>(at) % alignment != 0) fail("misaligned shared address", where);
  size_t begin = size_t(at - engine.shared);
  for (const Allocation& a : engine.allocations) {
    if (begin < a.begin || begin >= a.begin + a.bytes) continue;
    if (begin + bytes > a.begin + a.bytes)
      fail_index((long long)((begin + bytes - 1 - a.begin) / a.unit), a.bytes / a.unit, where);
    if (track_shared)
      engine.race_check.note(engine.shared, at, bytes, a.unit, atomic ? RaceCheck::atomic : RaceCheck::plain,
                             where);
    return true;
  }
  fail("a shared address outside every allocation", where);
}

// --- cp.async ---

void async_copy(void* to, const void* from, size_t bytes, bool valid, Where where) {
  if (!check_shared_pointer(to, bytes, bytes, false, where))
    fail("cp.async to an address that is not shared memory", where);
  if (valid && reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("cp.async from a misaligned address", where);
  std::memset(to, 0xff, bytes);  // nothing may be read here before the copy was waited for
  if (track_shared)
    engine.race_check.note_write(engine.shared, static_cast<unsigned char*>(to), bytes, where);
  engine.current->copies.push_back(
      {static_cast<unsigned char*>(to), from, bytes, valid, engine.current->groups_committed, where});
}

void async_commit() {
  ++engine.current->groups_committed;
}

void async_wait(int groups_left) {
  Thread& t = *engine.current;
  auto arrived = [&](const Copy& c) { return c.group < t.groups_committed - groups_left; };
  for (const Copy& c : t.copies) {
    if (!arrived(c)) continue;
    if (track_shared) engine.race_check.note_write(engine.shared, c.to, c.bytes, c.where);
    if (c.valid)
      std::memcpy(c.to, c.from, c.bytes);
    else
      std::memset(c.to, 0, c.bytes);
  }
  t.copies.erase(std::remove_if(t.copies.begin(), t.copies.end(), arrived), t.copies.end());
}

}  // namespace arimg::emulator

// --- control from outside ---

#define ARIMG_EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

// 0: everything in order. Other seeds: blocks, warps and lanes in an order that the seed decides.
ARIMG_EMULATOR_EXPORT void arimg_emulator_set_seed(uint64_t seed) {
  arimg::emulator::engine.seed = seed;
}
ARIMG_EMULATOR_EXPORT void arimg_emulator_set_race_check(int on) {
  arimg::emulator::engine.races = on != 0;
}
ARIMG_EMULATOR_EXPORT const char* arimg_emulator_last_error() {
  return arimg::error_text().c_str();
}
