// The order in which the tiles of a symmetric N×N problem are worked on.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace ltood {

// task(0) ... task(count - 1) in parallel: whoever is free takes the next one, so a task must not care who runs it.
// Never fewer than two indices for parallel_for: with one, it runs outside a parallel region, the matrix library inside
// it starts threads of its own, and the bits may depend on how many.
template <typename Task>
void run_parallel(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::max(at::get_num_threads(), 2), 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // the workers call ATen on buffers that autograd never sees
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// body(i, j) once for all 0 <= i <= j < n_panels. Calls that run at one time share no panel, so that tile (i, j) may
// add into what belongs to the rows of i and of j; and every panel meets its tiles in an order that the number of
// threads does not change. First the diagonal, then the rounds of a round-robin tournament (the circle method: the last
// player stays, the others move on by one), n_panels / 2 tiles a round.
template <typename Body>
void for_each_tile(int64_t n_panels, const Body& body) {
  run_parallel(n_panels, [&](int64_t i) { body(i, i); });
  const int64_t players = n_panels + n_panels % 2;  // an odd one sits out when it meets the player that is not there
  const int64_t ring = players - 1;
  for (int64_t round = 0; round < ring; ++round) {
    run_parallel(players / 2, [&](int64_t table) {
      const int64_t a = table == 0 ? ring : (round + table) % ring;
      const int64_t b = table == 0 ? round : (round - table + ring) % ring;
      if (std::max(a, b) < n_panels) body(std::min(a, b), std::max(a, b));
    });
  }
}

}  // namespace ltood
