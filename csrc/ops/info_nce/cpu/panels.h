// Queries and keys in panels, and the order in which the tiles of all pairs of panels are computed.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include "common/row_panels.h"
#include "common/tile_schedule.h"

namespace ltood {

// Rows as tiles read them: of the type T, which is no narrower than theirs, normalised on request, each panel filled up
// with zero rows.
template <typename T>
class Panels {
 public:
  // broken: Inf becomes NaN, so that it reaches every sum that it is in. stream: a panel is made when a thread meets
  // it, so that a long queue is not copied; else all at once.
  struct Layout {
    int64_t panel;
    bool transposed;  // products read the panels as columns too
    bool broken;
    bool stream = false;
  };

  // norms: of the rows [n], which are then normalised; null: rows as given. Kept by reference.
  Panels(const at::Tensor& x, const std::vector<double>* norms, Layout layout)
      : x_(x.detach()),
        norms_(norms),
        n_(x.size(0)),
        d_(x.size(1)),
        panel_(layout.panel),
        count_(count_panels(n_, panel_)),
        stream_(layout.stream),
        broken_(layout.broken) {
    const auto options = x_.options().dtype(c10::CppTypeToScalarType<T>::value);
    const int64_t places = stream_ ? at::get_num_threads() : count_;
    if (stream_) held_.assign(places, -1);
    const bool as_given =
        !stream_ && !norms && !broken_ && n_ % panel_ == 0 && x_.is_contiguous() && x_.dtype() == options.dtype();
    rows_ = as_given ? x_ : at::empty({places * panel_, d_}, options);
    if (layout.transposed) transposed_ = at::empty({places, d_, panel_}, options);
    if (stream_) return;
    run_parallel(count_, [&](int64_t b) {
      if (!as_given) fill(b, b);
      if (layout.transposed) transpose(b);
    });
  }

  int64_t count() const { return count_; }
  int64_t panel() const { return panel_; }
  int64_t start(int64_t b) const { return b * panel_; }
  int64_t size(int64_t b) const { return std::min(panel_, n_ - b * panel_); }  // without padding

  // Valid until the calling thread asks for another panel.
  Matrix<const T> rows(int64_t b) const { return {rows_.const_data_ptr<T>() + place(b) * panel_ * d_, d_}; }
  Matrix<const T> transposed(int64_t b) const {
    return {transposed_.const_data_ptr<T>() + place(b) * d_ * panel_, panel_};
  }
  const T* all_rows() const { return rows_.const_data_ptr<T>(); }  // [n, D]; not with `stream`

 private:
  int64_t place(int64_t b) const {
    if (!stream_) return b;
    const int64_t thread = at::get_thread_num();
    if (held_[thread] != b) {
      fill(b, thread);
      if (transposed_.defined()) transpose(thread);
      held_[thread] = b;
    }
    return thread;
  }

  void fill(int64_t b, int64_t to) const {
    const int64_t count = size(b);
    const at::Tensor all = rows_.narrow(0, to * panel_, panel_), filled = all.narrow(0, 0, count);
    if (count < panel_) all.narrow(0, count, panel_ - count).zero_();
    filled.copy_(x_.narrow(0, start(b), count));
    if (broken_) filled.masked_fill_(filled.isinf(), std::numeric_limits<double>::quiet_NaN());
    if (norms_) normalize_rows(filled.mutable_data_ptr<T>(), count, d_, norms_->data() + start(b));
  }

  void transpose(int64_t at) const { transposed_.select(0, at).copy_(rows_.narrow(0, at * panel_, panel_).t()); }

  at::Tensor x_;
  const std::vector<double>* norms_;
  int64_t n_, d_, panel_, count_;
  bool stream_, broken_;
  at::Tensor rows_;                    // [places * panel, D]
  at::Tensor transposed_;              // [places, D, panel]
  mutable std::vector<int64_t> held_;  // the panel that each thread holds
};

// Which tile runs when. Tiles that run at one time share neither an accumulator of rows nor one of columns, and every
// accumulator meets its tiles in an order that the number of threads does not change: in round r panel a of the side
// with fewer panels meets panel a + r of the other. A tile waits for the last one of its row and of its column alone,
// not for the end of a round. Where that leaves threads without work, the longer side is cut into splits, each with
// accumulators of its own for the shorter side: no more memory than the longer side takes.
class PairSchedule {
 public:
  // `by_column`: a task takes all row panels against one column panel, which is then made once.
  PairSchedule(int64_t rows, int64_t cols, bool by_column)
      : rows_(rows), by_column_(by_column), short_is_rows_(by_column || rows <= cols) {
    constexpr int64_t kTasks = 16;  // at one time
    short_ = by_column ? 1 : std::min(rows, cols);
    long_ = short_is_rows_ ? cols : rows;
    if (short_ == 0 || long_ == 0) return;
    const int64_t most = by_column ? long_ / (2 * rows) : long_ / short_;
    splits_ = std::clamp<int64_t>(count_panels(kTasks, short_), 1, std::max<int64_t>(most, 1));
    length_ = count_panels(long_, splits_);
  }

  int64_t row_slots() const { return short_is_rows_ ? splits_ : 1; }
  int64_t col_slots() const { return short_is_rows_ ? 1 : splits_; }

  // body(i, j, slot of rows, slot of columns) once for every pair of panels.
  template <typename Body>
  void run(const Body& body) const {
    const int64_t lanes = short_ * splits_;
    std::vector<std::atomic<int64_t>> done(lanes);  // rounds of each lane, a panel of the shorter side in a split
    // Tiles start in the order of the rounds: those that one waits for have started, which rules out a deadlock.
    run_parallel(length_ * lanes, [&](int64_t tile) {
      const int64_t round = tile / lanes, lane = tile % lanes, a = lane % short_, split = lane / short_;
      const auto wait_for = [&](int64_t other, int64_t rounds) {
        while (done[other].load(std::memory_order_acquire) < rounds) std::this_thread::yield();
      };
      const Finished finished{done[lane], round + 1};
      wait_for(lane, round);
      if (a + 1 < short_) {
        wait_for(lane + 1, round);  // its column was that panel's in the round before
      } else {
        wait_for(lane - a, round - (length_ - short_));  // it was the first panel's, before the others had it
      }
      const int64_t b = split * length_ + (a + round) % length_;
      if (b < long_) run_tile(body, a, b, split);
    });
  }

 private:
  // Also when a tile throws: others wait for it.
  struct Finished {
    std::atomic<int64_t>& done;
    int64_t rounds;
    ~Finished() { done.store(rounds, std::memory_order_release); }
  };

  template <typename Body>
  void run_tile(const Body& body, int64_t a, int64_t b, int64_t split) const {
    if (by_column_) {
      for (int64_t i = 0; i < rows_; ++i) body(i, b, split, 0);
    } else if (short_is_rows_) {
      body(a, b, split, 0);
    } else {
      body(b, a, 0, split);
    }
  }

  int64_t rows_, short_, long_, length_ = 0, splits_ = 1;
  bool by_column_, short_is_rows_;
};

}  // namespace ltood
