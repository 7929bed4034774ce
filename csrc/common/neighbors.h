// The search for neighbours in tiles of similarities: who may be whose, and the best found so far.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <utility>
#include <vector>

#include "common/optional_tensor.h"
#include "common/segments.h"
#include "common/topk.h"

namespace ltood {

// Neighbours as the tiles see them: who is whose instance, and domains numbered from 0. Ids are contiguous int64.
class CandidateRows {
 public:
  CandidateRows() = default;
  // Rows that are their own columns.
  CandidateRows(const at::Tensor& instance, const OptionalTensor& domain)
      : CandidateRows(instance, instance, domain, std::nullopt) {}
  // Rows and columns; a rule holds where both have ids, columns without a domain are the rows.
  CandidateRows(const OptionalTensor& x_instance, const OptionalTensor& y_instance, const OptionalTensor& x_domain,
                const OptionalTensor& y_domain)
      : x_instance_(x_instance), y_instance_(y_instance), shared_domain_(!y_domain) {
    if (x_domain) number({&x_domain_, *x_domain}, y_domain ? Numbered{&y_domain_, *y_domain} : Numbered{nullptr, {}});
  }

  Candidates of_rows(int64_t start) const { return slice(x_instance_, x_domain_, start); }
  Candidates of_columns(int64_t start) const {
    return slice(y_instance_, shared_domain_ ? x_domain_ : y_domain_, start);
  }

 private:
  static Candidates slice(const OptionalTensor& instance, const std::vector<int32_t>& domain, int64_t start) {
    return {instance ? instance->const_data_ptr<int64_t>() + start : nullptr,
            domain.empty() ? nullptr : domain.data() + start};
  }

  // The domains of one or two sets of rows as 0, 1, ..., equal where the domains are equal.
  using Numbered = std::pair<std::vector<int32_t>*, at::Tensor>;
  static void number(const Numbered& first, const Numbered& second) {
    std::vector<int64_t> all;
    for (const auto& [numbers, domains] : {first, second}) {
      if (!numbers) continue;
      const int64_t* data = domains.const_data_ptr<int64_t>();
      all.insert(all.end(), data, data + domains.numel());
    }
    const RowSegments segments = segment_rows(all.data(), static_cast<int64_t>(all.size()));
    const int64_t n = first.second.numel();
    first.first->resize(n);
    if (second.first) second.first->resize(all.size() - n);
    for (int64_t g = 0; g < segments.count(); ++g) {
      for (int64_t entry = segments.offsets[g]; entry < segments.offsets[g + 1]; ++entry) {
        const int64_t row = segments.order[entry];
        (row < n ? (*first.first)[row] : (*second.first)[row - n]) = static_cast<int32_t>(g);
      }
    }
  }

  OptionalTensor x_instance_, y_instance_;
  bool shared_domain_ = true;
  std::vector<int32_t> x_domain_, y_domain_;
};

template <typename T>
struct Neighbors {
  at::Tensor cosines, indices;  // [N, k]
  std::vector<T> worst;         // [N]

  Neighbors(int64_t n, int64_t k, const at::TensorOptions& options)
      : cosines(at::empty({n, k}, options)), indices(at::empty({n, k}, options.dtype(at::kLong))) {
    cosines.fill_(-std::numeric_limits<double>::infinity());
    indices.fill_(-1);
    worst.assign(n, -std::numeric_limits<T>::infinity());
  }

  BestK<T> best(int64_t start) {
    const int64_t k = cosines.size(1);
    return {cosines.mutable_data_ptr<T>() + start * k, indices.mutable_data_ptr<int64_t>() + start * k,
            worst.data() + start, k};
  }
};

}  // namespace ltood
