// Shared memory with bounds checks: the emulator's twins of the classes in csrc/core/cuda.h.
#pragma once

#include <concepts>

#include "engine.h"

namespace arimg::cuda {

// An index that remembers where it was written.
struct SharedIndex {
  long long value;
  emulator::Where where;
  template <std::integral I>
  SharedIndex(I i, emulator::Where where = emulator::Where::current())
      : value((long long)(i)), where(where) {}
};

template <typename T>
class Shared {
 public:
  Shared() = default;
  Shared(T* data, int count) : data_(data), count_(count) {}

  T& operator[](SharedIndex i) const { return vec<T>(i); }

  template <typename V>
  V& vec(SharedIndex i) const {
    static_assert(sizeof(V) % sizeof(T) == 0);
    constexpr long long width = sizeof(V) / sizeof(T);
    if (i.value < 0 || i.value + width > count_) [[unlikely]]
      emulator::fail_index(i.value + (i.value < 0 ? 0 : width - 1), size_t(count_), i.where);
    T* at = data_ + i.value;
    if (reinterpret_cast<uintptr_t>(at) % alignof(V) != 0) [[unlikely]]
      emulator::fail("misaligned vector access to shared element " + std::to_string(i.value), i.where);
    if (emulator::track_shared) [[unlikely]]
      emulator::note_shared(at, sizeof(V), sizeof(T), i.where);
    return *reinterpret_cast<V*>(at);
  }

  Shared part(SharedIndex begin, int count) const {
    if (begin.value < 0 || count < 0 || begin.value + count > count_)
      emulator::fail_index(begin.value + count - 1, size_t(count_), begin.where);
    return Shared(data_ + begin.value, count);
  }

  T* data() const { return data_; }
  int size() const { return count_; }

 private:
  T* data_ = nullptr;
  int count_ = 0;
};

class SharedArena {
 public:
  template <typename T>
  Shared<T> take(int count, emulator::Where where = emulator::Where::current()) {
    size_t begin = used_;
    used_ = emulator::shared_take(index_++, begin, size_t(count) * sizeof(T), sizeof(T), where);
    return Shared<T>(reinterpret_cast<T*>(emulator::shared_memory() + begin), count);
  }

 private:
  int index_ = 0;
  size_t used_ = 0;
};

}  // namespace arimg::cuda
