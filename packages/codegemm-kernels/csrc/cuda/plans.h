// The plans of the last few launches, since a model asks for the same ones again for every token.
#pragma once
#include <algorithm>

#include "product.h"

namespace codegemm::cuda {

// What a plan depends on, besides the kernel.
struct PlanKey {
  int device, words, num_codebooks, words_per_group, token_tiles;
  int64_t rows[kMaxSegments];
  PlanKey() = default;
  PlanKey(const Product& p, int on_device, int tiles = 1)
      : device(on_device),
        words(p.words),
        num_codebooks(p.num_codebooks),
        words_per_group(int(p.words_per_group.value)),
        token_tiles(tiles) {
    for (int i = 0; i < kMaxSegments; ++i) rows[i] = i < p.segments ? p.segment[i].out_features : 0;
  }
  bool operator==(const PlanKey& other) const {
    return device == other.device && words == other.words && num_codebooks == other.num_codebooks &&
           words_per_group == other.words_per_group && token_tiles == other.token_tiles &&
           std::equal(rows, rows + kMaxSegments, other.rows);
  }
};

template <typename Plan>
class PlanCache {
 public:
  // The plan for `key`, made by `make` if it is not known.
  template <typename Make>
  const Plan& find(const PlanKey& key, const Make& make) {
    for (int i = 0; i < count_; ++i)
      if (keys_[i] == key) return plans_[i];
    const int place = next_++ % kKept;
    if (count_ < kKept) ++count_;
    keys_[place] = key;
    return plans_[place] = make();
  }

 private:
  static constexpr int kKept = 16;
  PlanKey keys_[kKept];
  Plan plans_[kKept];
  int count_ = 0, next_ = 0;
};

}  // namespace codegemm::cuda
