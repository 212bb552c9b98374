// What both CUDA backward kernels share. Three launches: `delta`, the sum of grad_out times out of each row;
// then grad_q, a block per tile of rows; and grad_k, grad_v, a block per tile of keys. Scores are computed
// twice, and no two blocks write to one place: the gradients are the same from run to run.
#pragma once

#include "attention/rows.h"

namespace arimg {
Status attention_backward_half_cuda(const AttentionBackward& b, void* stream);  // bf16 and f16, after delta
}

namespace arimg::cuda {

// The block's keys [first, ...) of a key head, and the rows that may see them.
struct KeyPlace {
  int64_t batch, kv_head;
  int first;
  int row_low, row_high;

  // scratch: 32 places. keys: of the block.
  __device__ __forceinline__ KeyPlace(const AttentionBackward& b, int keys, Shared<int> scratch) {
    const Attention& p = b.forward;
    const int64_t tiles = ceil_div(p.keys, keys), block = blockIdx.x;
    first = int(block % tiles) * keys;
    kv_head = block / tiles % p.kv_heads;
    batch = block / tiles / p.kv_heads;
    if (b.key_rows != nullptr) {  // planned on the host
      row_low = b.key_rows[first / kAttentionKeyRows * 2];
      row_high = b.key_rows[first / kAttentionKeyRows * 2 + 1];
      return;
    }
    int low = key_limit, high = 0;
    for (int64_t row = thread_in_block(); row < p.queries; row += blockDim.x) {
      const RowKeys seen(p, KeyView(p), batch, row, true);
      const bool some = (seen.start < first + keys && seen.end > first) || first < p.sinks ||
                        (seen.self >= first && seen.self < first + keys);
      if (!some) continue;
      low = Min{}(low, int(row));
      high = int(row) + 1;
    }
    row_low = block_reduce_min(low, key_limit, scratch);
    row_high = block_reduce_max(high, 0, scratch);
  }
};

// What a block knows about the rows of the tiles it works on: their intervals, lse (times log2 e) and delta.
// Tile `stage` has the places from stage * rows on.
template <int rows, int stages>
struct RowTiles {
  Shared<int> start, end;
  Shared<float> lse, delta;

  static constexpr size_t bytes() {
    return 2 * shared_bytes<int>(stages * rows) + 2 * shared_bytes<float>(stages * rows);
  }
  __device__ __forceinline__ explicit RowTiles(SharedArena& arena)
      : start(arena.take<int>(stages * rows)),
        end(arena.take<int>(stages * rows)),
        lse(arena.take<float>(stages * rows)),
        delta(arena.take<float>(stages * rows)) {}
  // By the first `rows` threads; a barrier must follow.
  __device__ __forceinline__ void load(const AttentionBackward& b, int64_t batch, int64_t head, int64_t first,
                                       int stage) const {
    if (thread_in_block() >= rows) return;
    const Attention& p = b.forward;
    const int i = stage * rows + thread_in_block();
    const int64_t row = first + thread_in_block(), at = (batch * p.heads + head) * p.queries + row;
    const bool exists = row < p.queries;
    const RowKeys keys(p, KeyView(p), batch, row, exists);
    start[i] = keys.start;
    end[i] = exists ? keys.end : -1;  // -1: not even sinks or its own key
    lse[i] = exists ? p.lse[at] * kLog2E : 0.f;
    delta[i] = exists ? b.delta[at] : 0.f;
  }
  __device__ __forceinline__ bool sees(int i, int key, int sinks, int self) const {
    const int last = end[i];
    return (key >= start[i] && key < last) || ((key < sinks || key == self) && last >= 0);
  }
  // Whether every row of a tile sees all of [first, first + keys). All lanes of a warp take part.
  __device__ __forceinline__ bool whole(int stage, int first, int keys) const {
    int low = 0, high = key_limit;
    for (int i = lane_in_warp(); i < rows; i += 32) {
      low = Max{}(low, start[stage * rows + i]);
      high = Min{}(high, end[stage * rows + i]);
    }
    return warp_reduce_max(low) <= first && warp_reduce_min(high) >= first + keys;
  }
};

// Whether load_rows may read grad_out by 16 bytes, and q, k, v.
template <typename T>
bool backward_aligned(const AttentionBackward& b) {
  Attention grads = b.forward;
  grads.q = b.grad_out;
  grads.q_stride = b.grad_out_stride;
  return rows_aligned<T>(b.forward, Cache{}) && rows_aligned<T>(grads, Cache{});
}

}  // namespace arimg::cuda
