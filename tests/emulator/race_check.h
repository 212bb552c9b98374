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

  struct Agent {  // a thread at a time: barriers passed by its block, __syncwarps by its warp
    uint32_t epoch, warp_epoch;
    uint16_t thread;
    int warp() const { return thread / 32; }
  };

  struct Hazard {
    std::string what, other_did;
    Where where, other_where;
    size_t other = 0;
  };

  void note(const unsigned char* shared, const unsigned char* at, size_t bytes, size_t unit, Kind kind,
            Where where) {
    if (kind != plain) drop_reference(uint32_t(at - shared));
    for (size_t done = 0; done < bytes; done += sizeof(Access::before)) {
      Access& a = log_.emplace_back();
      a.offset = uint32_t(at - shared + long(done));
      a.bytes = uint16_t(bytes - done < sizeof(a.before) ? bytes - done : sizeof(a.before));
      a.unit = uint16_t(unit);
      a.kind = kind;
      a.where = where;
      if (kind != write) std::memcpy(a.before, at + done, a.bytes);
    }
  }
  void note_write(const unsigned char* shared, const unsigned char* at, size_t bytes, Where where) {
    note(shared, at, bytes, 1, write, where);
  }

  // The last noted accesses may be unfinished (a reference in use), so they stay.
  bool crowded() const { return log_.size() > 4096; }

  // Files the noted accesses under `me`, and returns the first hazard, if any.
  Hazard settle(const unsigned char* shared, Agent me) {
    size_t keep = crowded() ? 16 : 0;
    for (size_t i = 0; i + keep < log_.size(); ++i) {
      const Access& a = log_[i];
      bool writes = a.kind != plain || std::memcmp(shared + a.offset, a.before, a.bytes) != 0;
      for (size_t at = a.offset; at < a.offset + a.bytes; at += a.unit)
        if (Hazard h = file(element(at), a, writes, me); !h.what.empty()) return h;
    }
    log_.erase(log_.begin(), log_.end() - long(keep));
    return {};
  }

  void forget() {
    log_.clear();
    elements_.clear();
  }

 private:
  struct Access {
    uint32_t offset;
    uint16_t bytes, unit;
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

  Element& element(size_t offset) {
    if (offset >= elements_.size()) elements_.resize(offset + 1024);
    return elements_[offset];
  }

  static bool ordered(const Mark& before, Agent me) {
    if (before.lanes == 0 || before.by.epoch != me.epoch) return true;
    if (before.by.warp() != me.warp()) return false;
    return before.by.warp_epoch != me.warp_epoch || (before.lanes & ~(1u << me.thread % 32)) == 0;
  }

  static Hazard hazard(const Access& a, const char* did, const Mark& other, const char* other_did, Agent me) {
    uint32_t others = other.by.warp() == me.warp() ? other.lanes & ~(1u << me.thread % 32) : other.lanes;
    size_t thread = size_t(other.by.warp()) * 32 + size_t(__builtin_ctz(others));
    return {"race: " + std::string(did) + " shared memory that", other_did, a.where, other.where, thread};
  }

  static Hazard file(Element& e, const Access& a, bool writes, Agent me) {
    const char* did = a.kind == atomic ? "updates" : writes ? "writes" : "reads";
    if (!(a.kind == atomic && e.written.atomic) && !ordered(e.written, me))
      return hazard(a, did, e.written, "wrote", me);
    uint32_t bit = 1u << me.thread % 32;
    if (!writes) {
      Mark& latest = e.read[0];
      if (latest.by.warp() != me.warp()) e.read[1] = latest;
      bool joins = latest.by.warp() == me.warp() && latest.by.epoch == me.epoch &&
                   latest.by.warp_epoch == me.warp_epoch;
      latest = {me, joins ? latest.lanes | bit : bit, false, a.where};
      return {};
    }
    for (const Mark& reader : e.read)
      if (!ordered(reader, me)) return hazard(a, did, reader, "read", me);
    e.written = {me, bit, a.kind == atomic, a.where};
    return {};
  }

  std::vector<Access> log_;
  std::vector<Element> elements_;
};

}  // namespace arimg::emulator
