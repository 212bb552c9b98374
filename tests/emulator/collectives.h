// Barriers and warp collectives under CUDA's names. Each takes its call site as a hidden last argument.
#pragma once

#include <bit>
#include <type_traits>

#include "engine.h"

#define ARIMG_HERE arimg::emulator::Where where = arimg::emulator::Where::current()

inline void __syncthreads(ARIMG_HERE) {
  arimg::emulator::block_barrier(0, where);
}
inline int __syncthreads_count(int p, ARIMG_HERE) {
  return arimg::emulator::block_barrier(p, where);
}
inline int __syncthreads_or(int p, ARIMG_HERE) {
  return arimg::emulator::block_barrier(p, where) != 0;
}
inline int __syncthreads_and(int p, ARIMG_HERE) {
  return arimg::emulator::block_barrier(!p, where) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, ARIMG_HERE) {
  arimg::emulator::warp_collective(
      mask, nullptr, [](void* const*, uint32_t) { arimg::emulator::order_warp_memory(); }, where);
}

inline unsigned __activemask() {
  return arimg::emulator::live_lanes();
}

namespace arimg::emulator {

// Runs f(argument of lane i, i, mask, arguments of all lanes) for the lanes of the mask, once all have come.
template <typename Argument, typename F>
void each_lane(uint32_t mask, Argument& argument, F, Where where) {
  static_assert(std::is_empty_v<F>, "f may capture nothing: it runs on the last lane to come");
  warp_collective(
      mask, &argument,
      [](void* const* lanes, uint32_t mask) {
        auto all = reinterpret_cast<Argument* const*>(lanes);
        for (uint32_t rest = mask; rest; rest &= rest - 1) {
          int i = std::countr_zero(rest);
          F{}(*all[i], i, mask, all);
        }
      },
      where);
}

// `source(lane, argument, width)` is the lane to read.
template <typename T, typename Source>
T shuffle(uint32_t mask, T value, int argument, int width, Source, Where where) {
  struct Shuffle {
    T in, out;
    int argument, width;
    Where where;
  } mine{value, value, argument, width, where};
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail("shuffle width is not a power of two up to 32", where);
  each_lane(
      mask, mine,
      [](Shuffle& own, int lane, uint32_t mask, Shuffle* const* all) {
        int from = Source{}(lane, own.argument, own.width);
        if (!(mask >> from & 1))
          fail("shuffle reads lane " + std::to_string(from) + ", which the mask leaves out", own.where);
        own.out = all[from]->in;
      },
      where);
  return mine.out;
}

template <typename T, typename Combine>
T fold(uint32_t mask, T value, Combine, Where where) {
  struct Fold {
    T in, out;
  } mine{value, value};
  each_lane(
      mask, mine,
      [](Fold& own, int lane, uint32_t mask, Fold* const* all) {
        for (int i = 0; i < 32; ++i)
          if ((mask >> i & 1) && i != lane) own.out = Combine{}(own.out, all[i]->in);
      },
      where);
  return mine.out;
}

// What five xor shuffles (fewer for a smaller width) compute, in their order.
template <int width, typename T, typename Op>
T butterfly(T value, Op, ARIMG_HERE) {
  T mine = value;
  warp_collective(
      0xffffffffu, &mine,
      [](void* const* lanes, uint32_t) {
        T now[32], next[32];
        for (int i = 0; i < 32; ++i) now[i] = *static_cast<T*>(lanes[i]);
        for (int step = width / 2; step > 0; step /= 2) {
          for (int i = 0; i < 32; ++i) next[i] = Op{}(now[i], now[i ^ step]);
          for (int i = 0; i < 32; ++i) now[i] = next[i];
        }
        for (int i = 0; i < 32; ++i) *static_cast<T*>(lanes[i]) = now[i];
      },
      where);
  return mine;
}

}  // namespace arimg::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, ARIMG_HERE) {
  auto source = [](int lane, int from, int w) { return (lane & ~(w - 1)) | (from & (w - 1)); };
  return arimg::emulator::shuffle(mask, value, from, width, source, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, ARIMG_HERE) {
  auto source = [](int lane, int delta, int w) { return (lane & (w - 1)) < delta ? lane : lane - delta; };
  return arimg::emulator::shuffle(mask, value, int(delta), width, source, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, ARIMG_HERE) {
  auto source = [](int lane, int delta, int w) {
    return (lane & (w - 1)) + delta >= w ? lane : lane + delta;
  };
  return arimg::emulator::shuffle(mask, value, int(delta), width, source, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, ARIMG_HERE) {
  // A lane of an earlier group of `width` may be read, one of a later group may not (PTX, shfl.bfly).
  auto source = [](int lane, int bits, int w) {
    return (lane ^ bits) > (lane | (w - 1)) ? lane : lane ^ bits;
  };
  return arimg::emulator::shuffle(mask, value, bits, width, source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, ARIMG_HERE) {
  struct Vote {
    unsigned in, out;
  } mine{predicate != 0, 0};
  arimg::emulator::each_lane(
      mask, mine,
      [](Vote& own, int, uint32_t mask, Vote* const* all) {
        for (int i = 0; i < 32; ++i)
          if (mask >> i & 1) own.out |= all[i]->in << i;
      },
      where);
  return mine.out;
}
inline int __any_sync(unsigned mask, int predicate, ARIMG_HERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, ARIMG_HERE) {
  return __ballot_sync(mask, predicate, where) == mask;
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, ARIMG_HERE) {
  struct Match {
    T in;
    unsigned out;
  } mine{value, 0};
  arimg::emulator::each_lane(
      mask, mine,
      [](Match& own, int, uint32_t mask, Match* const* all) {
        for (int i = 0; i < 32; ++i)
          if ((mask >> i & 1) && all[i]->in == own.in) own.out |= 1u << i;
      },
      where);
  return mine.out;
}

#define ARIMG_REDUCE(name, T, expression)                                                       \
  inline T name(unsigned mask, T value, ARIMG_HERE) {                                           \
    return arimg::emulator::fold(mask, value, [](T a, T b) -> T { return expression; }, where); \
  }
ARIMG_REDUCE(__reduce_add_sync, int, a + b)
ARIMG_REDUCE(__reduce_add_sync, unsigned, a + b)
ARIMG_REDUCE(__reduce_max_sync, int, a < b ? b : a)
ARIMG_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
ARIMG_REDUCE(__reduce_min_sync, int, b < a ? b : a)
ARIMG_REDUCE(__reduce_min_sync, unsigned, b < a ? b : a)
ARIMG_REDUCE(__reduce_and_sync, unsigned, a& b)
ARIMG_REDUCE(__reduce_or_sync, unsigned, a | b)
ARIMG_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef ARIMG_REDUCE
#undef ARIMG_HERE
