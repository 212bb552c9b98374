// Finds two threads that use one element of shared memory, at least one of them writing, with no barrier
// between. Independent of the order in which the threads happened to run.
//
// Kernels get plain references, so an access is noted with the bytes it found, and is a write if the bytes
// differ when the thread next stops. (A write of the value that was there already passes for a read.)
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "engine.h"

namespace arimg::emulator {

class RaceCheck {
 public:
  enum Kind : uint8_t { plain, atomic, write };

  // Elements are told apart down to 16 bits; neighbouring bytes count as one.
  static constexpr size_t granule = 2;

  struct Agent {  // a thread at a time: barriers passed by its block, __syncwarps by its warp
    uint32_t epoch, warp_epoch;
    uint16_t thread;
    int warp() const { return thread / 32; }
  };

  struct Hazard {
    const char *did, *other_did;
    Where where, other_where;
    size_t other;
  };

  // Reads up to 15 bytes beyond the access: the arena is padded.
  void note(const unsigned char* shared, const unsigned char* at, size_t bytes, size_t unit, Kind kind,
            Where where) {
    if (kind != plain) drop_reference(uint32_t(at - shared));
    for (size_t done = 0; done < bytes; done += sizeof(Access::before)) {
      Access& a = log_.emplace_back();
      a.offset = uint32_t(at - shared + long(done));
      a.bytes = uint16_t(bytes - done < sizeof(a.before) ? bytes - done : sizeof(a.before));
      a.unit = uint8_t(unit);
      a.kind = kind;
      a.where = where;
      std::memcpy(a.before, at + done, sizeof a.before);
    }
  }
  void note_write(const unsigned char* shared, const unsigned char* at, size_t bytes, Where where) {
    note(shared, at, bytes, granule, write, where);
  }

  // The last noted accesses may be unfinished (a reference in use), so they stay.
  bool crowded() const { return log_.size() > 4096; }

  bool idle() const { return log_.empty(); }

  // Files the noted accesses under `me`. False: `hazard` says what was found.
  bool settle(const unsigned char* shared, Agent me, Hazard& hazard) {
    const size_t count = crowded() ? log_.size() - 16 : log_.size();
    for (size_t i = 0; i < count; ++i) {
      const Access& a = log_[i];
      const bool writes = a.kind != plain || changed(shared + a.offset, a);
      for (size_t at = a.offset; at < a.offset + a.bytes; at += a.unit < granule ? granule : a.unit)
        if (!file(element(at), a, writes, me, hazard)) return false;
    }
    log_.erase(log_.begin(), log_.begin() + long(count));
    return true;
  }

  void forget() {
    log_.clear();
    elements_.clear();
  }

 private:
  struct Access {
    uint32_t offset;
    uint16_t bytes;
    uint8_t unit;
    Kind kind;
    Where where;
    unsigned char before[16];
  };
  struct Mark {
    Agent by;
    uint32_t lanes;  // of one warp that did the same since its last __syncwarp
    bool atomic;
    Where where;
  };
  struct Element {
    Mark written, read[2];  // the latest reader and the latest one of another warp
  };

  // The address of an atomic or a copy was taken through a reference, which was noted as an access of its
  // own.
  void drop_reference(uint32_t offset) {
    for (size_t i = log_.size(), tries = 4; i-- > 0 && tries-- > 0;)
      if (log_[i].offset == offset && log_[i].kind == plain) return void(log_.erase(log_.begin() + long(i)));
  }

  static bool changed(const unsigned char* now, const Access& a) {
    if (a.bytes != 4) return std::memcmp(now, a.before, a.bytes) != 0;
    uint32_t x, y;
    std::memcpy(&x, now, 4);
    std::memcpy(&y, a.before, 4);
    return x != y;
  }

  Element& element(size_t offset) {
    const size_t i = offset / granule;
    if (i >= elements_.size()) elements_.resize(i + 1024);
    return elements_[i];
  }

  static bool ordered(const Mark& before, Agent me) {
    if (before.lanes == 0 || before.by.epoch != me.epoch) return true;
    if (before.by.warp() != me.warp()) return false;
    return before.by.warp_epoch != me.warp_epoch || (before.lanes & ~(1u << me.thread % 32)) == 0;
  }

  static bool found(const Access& a, const char* did, const Mark& other, const char* other_did, Agent me,
                    Hazard& hazard) {
    uint32_t others = other.by.warp() == me.warp() ? other.lanes & ~(1u << me.thread % 32) : other.lanes;
    size_t thread = size_t(other.by.warp()) * 32 + size_t(__builtin_ctz(others));
    hazard = {did, other_did, a.where, other.where, thread};
    return false;
  }

  static bool file(Element& e, const Access& a, bool writes, Agent me, Hazard& hazard) {
    const char* did = a.kind == atomic ? "updates" : writes ? "writes" : "reads";
    if (!ordered(e.written, me) && !(a.kind == atomic && e.written.atomic))
      return found(a, did, e.written, e.written.atomic ? "updated" : "wrote", me, hazard);
    const uint32_t bit = 1u << me.thread % 32;
    if (!writes) {
      Mark& latest = e.read[0];
      if (latest.by.warp() != me.warp()) e.read[1] = latest;
      const bool joins = latest.by.warp() == me.warp() && latest.by.epoch == me.epoch &&
                         latest.by.warp_epoch == me.warp_epoch;
      latest = {me, joins ? latest.lanes | bit : bit, false, a.where};
      return true;
    }
    for (const Mark& reader : e.read)
      if (!ordered(reader, me)) return found(a, did, reader, "read", me, hazard);
    e.written = {me, bit, a.kind == atomic, a.where};
    return true;
  }

  std::vector<Access> log_;
  std::vector<Element> elements_;
};

}  // namespace arimg::emulator
