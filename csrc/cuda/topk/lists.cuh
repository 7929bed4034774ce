// The lists of the top-k kernels: what a warp keeps of its 32 rows while tiles of similarities pass.
//
// A value that does not beat its row's k-th best is dropped in registers, after one vote for the whole tile. The others
// wait in shared memory, up to 16 a row, until a row has no room; then lane r puts the waiting ones of row r into the
// row's heap, 32 rows at once. The heap is the caller's index array itself, whose rows the warp owns: any k then works
// the same way, and only log k entries a candidate are touched, in L1. About k (1 + ln(Q / k)) candidates a row get
// that far.
//
// An entry is one 64-bit key, value above ~column: larger keys are better, equal values rank by column, and a NaN above
// all numbers, as in torch.sort. Keys are distinct, so that lists depend neither on timing nor on how columns are
// split. Columns come in ascending order: a later one never wins a tie against the k-th best, which the filter uses.
#pragma once

#include <limits>

#include "cuda/mainloop_sm80.cuh"
#include "cuda/topk/topk.h"

namespace ltood::knn {

using mainloop_sm80::Fragments;
using mainloop_sm80::kNI;
using mainloop_sm80::kSlots;

constexpr int kPending = 16;  // candidates of a row that wait

using Key = int64_t;

constexpr Key kNoKey = std::numeric_limits<Key>::min();

struct TopkKernelParams {
  TopkParams topk;
  int row_blocks, k_splits, k_split_tiles;
  Key* keys;  // [k_splits, N, k]: the caller's indices, or the workspace when columns are split
};

__device__ __forceinline__ Key make_key(float value, int column) {
  const int bits = value == value ? __float_as_int(value + 0.f) : 0x7fffffff;  // -0 ties with 0
  const int ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return static_cast<Key>(ordered) * (Key(1) << 32) + static_cast<uint32_t>(~column);
}

__device__ __forceinline__ float key_value(Key key) {
  const int ordered = static_cast<int>(key >> 32);
  return key == kNoKey ? -INFINITY : __int_as_float(ordered ^ ((ordered >> 31) & 0x7fffffff));
}

__device__ __forceinline__ int key_column(Key key) {
  return key == kNoKey ? -1 : ~static_cast<int>(static_cast<uint32_t>(key));
}

// Puts `key` in the place of the root of a heap in which no entry is better than those below it.
__device__ __forceinline__ void replace_root(Key* heap, unsigned size, Key key) {
  unsigned at = 0;
  for (unsigned child = 1; child < size; child = 2 * at + 1) {
    Key worse = heap[child];
    if (child + 1 < size) {
      const Key right = heap[child + 1];
      if (right < worse) {
        worse = right;
        ++child;
      }
    }
    if (key <= worse) break;
    heap[at] = worse;
    at = child;
  }
  heap[at] = key;
}

__device__ __forceinline__ bool admissible(const TopkParams& p, int row, int column) {
  if (column >= p.y.rows || (p.exclude_self && row + p.diagonal == column)) return false;
  if (p.views > 0 && row % p.views == column % p.views) return false;
  if (p.x_instance && p.x_instance[row] == p.y_instance[column]) return false;
  return !p.x_domain || p.x_domain[row] == p.y_domain[column];
}

// The 32 lists of a warp's rows. Lane l keeps list l; for the filter, a lane also knows the four lists of its
// fragments.
struct RowLists {
  const TopkParams& p;
  Key* pending;  // shared, [kPending, 32]: of list l every 32nd
  int row;       // of this lane's list
  Key* heap;
  Key root = kNoKey;
  float threshold[kSlots];
  int waiting[kSlots] = {};

  __device__ RowLists(const TopkParams& p, Key* pending, int row, Key* keys)
      : p(p), pending(pending), row(row), heap(keys + size_t(row) * p.k) {
    if (row < p.x.rows) {
      for (int at = 0; at < p.k; ++at) heap[at] = kNoKey;
    }
    share_thresholds();
  }

  // Rows beyond the last one take nothing; a NaN passes every filter and is compared as a key.
  __device__ void share_thresholds() {
    float own = key_value(root);
    if (own != own || row >= p.x.rows) own = INFINITY;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      threshold[s] = __shfl_sync(prim::kFullWarp, own, mainloop_sm80::slot_row(s));
    }
  }

  // The waiting candidates go into the heaps, or nowhere.
  __device__ void flush() {
    int count = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int of_slot = __shfl_sync(prim::kFullWarp, waiting[s], threadIdx.x % 8 * 4);
      if (threadIdx.x % 32 / 8 == s) count = of_slot;
      waiting[s] = 0;
    }
    __syncwarp();
    if (row < p.x.rows) {
      for (int at = 0; at < count; ++at) {
        const Key key = pending[at * 32 + threadIdx.x % 32];
        if (key <= root || !admissible(p, row, key_column(key))) continue;
        replace_root(heap, p.k, key);
        root = heap[0];
      }
    }
    __syncwarp();
    share_thresholds();
  }

  // Eight columns of the row of slot s: this lane's are c0 and c1. A value that waits becomes -inf, which none beats.
  // Returns whether some found no room.
  __device__ bool wait_for_list(int s, float& c0, float& c1, int column) {
    const bool beats0 = !(c0 <= threshold[s]), beats1 = !(c1 <= threshold[s]);
    const unsigned quad = threadIdx.x & 28, below = (1u << (threadIdx.x & 3)) - 1;
    const unsigned ballot0 = __ballot_sync(prim::kFullWarp, beats0), ballot1 = __ballot_sync(prim::kFullWarp, beats1);
    if ((ballot0 | ballot1) == 0) return false;
    if (waiting[s] > kPending - 8) return beats0 || beats1;
    const unsigned first = ballot0 >> quad & 15, second = ballot1 >> quad & 15;
    const int at0 = waiting[s] + __popc(first & below);
    const int at1 = waiting[s] + __popc(first) + __popc(second & below);
    const int list = mainloop_sm80::slot_row(s);
    if (beats0) pending[at0 * 32 + list] = make_key(c0, column);
    if (beats1) pending[at1 * 32 + list] = make_key(c1, column + 1);
    if (beats0) c0 = -INFINITY;
    if (beats1) c1 = -INFINITY;
    waiting[s] += __popc(first) + __popc(second);
    return false;
  }

  // Offers a tile of values whose first column is first_column; it is overwritten.
  __device__ void offer(Fragments& c, int first_column) {
    bool left = false;
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
#pragma unroll
      for (int j = 0; j < kNI; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) left |= !(mainloop_sm80::at(c, s, j, e) <= threshold[s]);
    while (__any_sync(prim::kFullWarp, left)) {
      left = false;
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
#pragma unroll
        for (int j = 0; j < kNI; ++j) {
          float (&values)[4] = c[s / 2][j];
          const int column = first_column + tiles::fragment_col(j, 0);
          left |= wait_for_list(s, values[s % 2 * 2], values[s % 2 * 2 + 1], column);
        }
      if (__any_sync(prim::kFullWarp, left)) flush();
    }
  }

  // Sorts the lists, best first: of a heap whose root is the worst, the root goes last.
  __device__ void epilogue() {
    flush();
    if (row < p.x.rows) {
      for (int size = p.k - 1; size > 0; --size) {
        const Key last = heap[size];
        heap[size] = heap[0];
        replace_root(heap, size, last);
      }
    }
    __syncwarp();
  }
};

__device__ __forceinline__ void write_entry(const TopkParams& p, size_t at, Key key) {
  p.values[at] = key_value(key);
  p.indices[at] = key_column(key);
}

// The warp's sorted lists of the rows from `first` to before `end` become values and indices.
__device__ __forceinline__ void write_lists(const TopkParams& p, const Key* keys, int first, int end) {
  const int64_t to = int64_t(min(end, p.x.rows)) * p.k;
  for (int64_t at = int64_t(first) * p.k + threadIdx.x % 32; at < to; at += 32) write_entry(p, at, keys[at]);
}

// Products of a tile become similarities. scale: of the lane's rows.
__device__ __forceinline__ void scale_products(Fragments& c, const float (&scale)[kSlots], const Operand& y,
                                               int first_column) {
#pragma unroll
  for (int j = 0; j < kNI; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = first_column + tiles::fragment_col(j, e);
      const float column_scale = column < y.rows ? y.scale[column] : 0;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        float& value = mainloop_sm80::at(c, s, j, e);
        value = value * scale[s] * column_scale;  // in this order: the scales' product may leave float
      }
    }
}

}  // namespace ltood::knn
