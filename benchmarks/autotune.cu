// Times the sm_90a kernels of one table of tiles, csrc/cuda/tile_sizes_sm90.h or a candidate before it on the include
// path.
//   autotune kernel splits k_tiles rows [kernel splits k_tiles rows ...]
// Prints for every problem the median of its launches in ms and the sum of what they computed: another table's must be
// the same. Each launch finds the L2 cache overwritten.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "cuda/topk/sm90/launch.h"
#include "ops/contrastive/cuda/sm90/launch.h"
#include "ops/guided/cuda/sm90/launch.h"

namespace ltood {
namespace {

constexpr int kWarmUp = 3, kLaunches = 31, kNeighbors = 10;
constexpr size_t kCacheBytes = size_t(256) << 20;
constexpr float kInvTau = 5;

void must(int error, const char* what) {
  if (!error) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(error)));
  std::exit(1);
}

template <typename T>
T* fresh(size_t count) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  must(cudaMemset(memory, 0, count * sizeof(T)), "cudaMemset");
  return static_cast<T*>(memory);
}

template <typename T>
T* put(const std::vector<T>& values) {
  T* memory = fresh<T>(values.size());
  must(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

std::vector<float> get(const float* from, size_t count) {
  std::vector<float> values(count);
  must(cudaMemcpy(values.data(), from, count * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return values;
}

// Random unit rows: bfloat16, or two splits of float16.
Operand operand(int splits, int k_tiles, int rows, int seed = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(size_t(rows) * kKTile * k_tiles);
  for (float& value : x) value = normal(random);
  const Operand u{fresh<uint16_t>(splits * x.size()), fresh<float>(rows), rows, k_tiles, splits, splits == 2};
  PrepareParams p{put(x), kFloat32, rows, kKTile * k_tiles, 1, u};
  must(ltood_launch_prepare_rows(&p, nullptr), "prepare_rows");
  return u;
}

double median_ms(const std::function<int()>& launch) {
  static char* const cache = fresh<char>(kCacheBytes);
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "cudaEventCreate");
  must(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = 0; i < kWarmUp + kLaunches; ++i) {
    float ms = 0;
    must(cudaMemsetAsync(cache, i, kCacheBytes), "cudaMemsetAsync");
    must(cudaEventRecord(begin), "cudaEventRecord");
    must(launch(), "launch");
    must(cudaEventRecord(end), "cudaEventRecord");
    must(cudaEventSynchronize(end), "the kernel");
    must(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i >= kWarmUp) times.push_back(ms);
  }
  std::nth_element(times.begin(), times.begin() + kLaunches / 2, times.end());
  return times[kLaunches / 2];
}

// The launches of a problem, and what sums up their result.
struct Problem {
  std::function<int()> launch;
  std::function<double()> sum;
};

double sum_of(const float* values, size_t count, bool absolute = false) {
  double sum = 0;
  for (const float value : get(values, count)) sum += absolute ? std::fabs(value) : value;
  return sum;
}

Problem sums(const Operand& u, bool nearest, const cuda::DeviceLimits& limits) {
  ContrastiveForward p{u, {kInvTau, nullptr, 0}, {u.rows / 2, nullptr, nullptr}, nearest};
  must(contrastive::sm90::plan_tiles(p, limits) ? 0 : cudaErrorNotSupported, "plan_tiles");
  const size_t of_rows = size_t(p.plan.chunks) * u.rows, of_cols = size_t(p.plan.strips) * u.rows;
  p.row_sums = fresh<float>(of_rows), p.col_sums = fresh<float>(of_cols);
  p.row_nearest = fresh<Nearest>(of_rows), p.col_nearest = fresh<Nearest>(of_cols);
  return {[=] { return contrastive::sm90::launch_tiles(p, nullptr); },
          [=] { return sum_of(p.row_sums, of_rows) + sum_of(p.col_sums, of_cols); }};
}

Problem lse_bwd(const Operand& u, const cuda::DeviceLimits& limits) {
  std::vector<RowFactors> factors;
  for (const float scale : get(u.scale, u.rows)) factors.push_back({scale, 1.f, 0, 0});
  ContrastiveLseBwd p{u, u, {kInvTau, nullptr, 0}, 0};
  p.row_factors = p.col_factors = put(factors);
  must(contrastive::sm90::plan_lse_bwd(p, limits) ? 0 : cudaErrorNotSupported, "plan_lse_bwd");
  const size_t count = size_t(u.rows) * kKTile * u.k_tiles;
  p.out = fresh<float>(p.k_splits * count);
  return {[=] { return contrastive::sm90::launch_lse_bwd(p, nullptr); },
          [=] {
            const std::vector<float> out = get(p.out, p.k_splits * count);
            double sum = 0;
            for (size_t i = 0; i < count; ++i) {
              float total = 0;
              for (int k_split = 0; k_split < p.k_splits; ++k_split) total += out[k_split * count + i];
              sum += std::fabs(total);
            }
            return sum;
          }};
}

Problem topk(const Operand& u, const cuda::DeviceLimits& limits) {
  TopkParams p{u, u, kNeighbors, 1};
  const size_t count = size_t(u.rows) * kNeighbors;
  p.values = fresh<float>(count), p.indices = fresh<int64_t>(count);
  const tile_sizes::TileSize tile = knn::sm90::kTile;
  const int stages = knn::sm90::stages(u, limits);
  must(stages ? 0 : cudaErrorNotSupported, "topk");
  const int row_blocks = cuda::ceil_div(u.rows, tile.rows), tiles = cuda::ceil_div(u.rows, tile.columns);
  return {[=] { return knn::sm90::launch(p, p.indices, row_blocks, 1, tiles, stages, nullptr); },
          [=] { return sum_of(p.values, count); }};
}

// Distillation, student and guide with half of the k_tiles each: every tile is read.
Problem distillation(bool backward, int k_tiles, int rows, const cuda::DeviceLimits& limits) {
  GuidedParams p{};
  p.z = p.v = operand(1, k_tiles / 2, rows), p.e = operand(1, k_tiles / 2, rows, 2);
  p.n = p.columns = rows, p.padded = cuda::ceil_div(rows, kGuidedRows) * kGuidedRows;
  p.distill = 1, p.weighted = 1, p.k_splits = 1;
  p.backward = backward, p.gamma = 1, p.inv_tau = kInvTau;
  const int blocks = p.padded / kGuidedRows, words = cuda::ceil_div(p.padded / kGuidedColumns, 32);
  p.tiles = put(std::vector<uint32_t>(size_t(blocks) * words, ~0u));
  std::vector<float> fields(size_t(kGuidedFields) * p.padded, 1.f / rows);
  for (const int lse : {kStudentLse, kTeacherLse}) {
    std::fill_n(fields.begin() + size_t(lse) * p.padded, p.padded, std::log2(float(rows)));
  }
  const std::vector<float> z = get(p.z.scale, rows), e = get(p.e.scale, rows);
  std::copy(z.begin(), z.end(), fields.begin() + size_t(kScaleZ) * p.padded);
  std::copy(e.begin(), e.end(), fields.begin() + size_t(kScaleE) * p.padded);
  p.fields = put(fields);
  const size_t of_sums = size_t(kGuidedSums) * p.padded, of_gradient = size_t(rows) * kKTile * p.z.k_tiles;
  p.sums = fresh<float>(of_sums), p.gradient = fresh<float>(of_gradient);
  const int stages = guided::sm90::stages(p, limits, backward);
  must(stages ? 0 : cudaErrorNotSupported, "guided");
  if (backward) {
    return {[=] { return guided::sm90::launch_backward(p, stages, nullptr); },
            [=] { return sum_of(p.gradient, of_gradient, true); }};
  }
  // Of the sums, not of what guided contrast would leave.
  return {[=] { return guided::sm90::launch_forward(p, stages, nullptr); },
          [=] { return sum_of(p.sums + size_t(kStudentMax) * p.padded, of_sums - size_t(kStudentMax) * p.padded); }};
}

Problem problem(int kernel, const Operand& u, const cuda::DeviceLimits& limits) {
  switch (kernel) {
    case tile_sizes::kLseBwd:
      return lse_bwd(u, limits);
    case tile_sizes::kTopk:
      return topk(u, limits);
    default:
      return sums(u, kernel == tile_sizes::kNeighbors, limits);
  }
}

}  // namespace
}  // namespace ltood

int main(int count, char** arguments) {
  using namespace ltood;
  setenv("LTOOD_CUDA_PATH", "sm90", 1);
  cuda::DeviceLimits limits;
  must(cuda::device_limits(limits), "the device");
  for (int i = 1; i + 3 < count; i += 4) {
    const auto number = [&](int at) { return std::atoi(arguments[i + at]); };
    const int kernel = number(0), k_tiles = number(2), rows = number(3);
    const bool both = kernel == tile_sizes::kGuided || kernel == tile_sizes::kGuidedBwd;
    const Problem timed = both ? distillation(kernel == tile_sizes::kGuidedBwd, k_tiles, rows, limits)
                               : problem(kernel, operand(number(1), k_tiles, rows), limits);
    const double ms = median_ms(timed.launch);
    std::printf("%.5f %.9g\n", ms, timed.sum());
  }
  return 0;
}
