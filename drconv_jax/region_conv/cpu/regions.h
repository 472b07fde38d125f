// The regions of samples: which positions chose which filter.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <variant>
#include <vector>

#include "drconv_jax/native/inline.h"
#include "drconv_jax/native/products.h"
#include "drconv_jax/native/workers.h"
#include "drconv_jax/region_conv/cpu/shape.h"

namespace drconv {

// Of a batch: (batch, positions, regions).
using GuideFeatures = std::variant<const float*, const double*>;

// An integer for a guide feature, in the same order: the zeros are equal, NaN is the largest.
INLINE int32_t Rank(float value) {
  value += 0.0f;  // -0 becomes 0
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
}
INLINE int64_t Rank(double value) {
  value += 0.0;
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? INT64_MAX : bits ^ (bits >> 63 & INT64_MAX);
}

// The regions of positions: that of the largest guide feature, the first of equals; NaN counts as
// larger than any number. Whatever the bytes, it is a region that exists.
template <typename G>
INLINE void FindRegions(const G* guide, int64_t positions, int64_t regions, int32_t* result) {
  using Ranks = decltype(Rank(G()));
  constexpr int64_t kAtOnce = 64;
  std::unique_ptr<Ranks[]> ranks(new Ranks[kAtOnce * regions]);
  for (int64_t first = 0; first < positions; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, positions - first);
    for (int64_t i = 0; i < count * regions; ++i) ranks[i] = Rank(guide[first * regions + i]);
    const Ranks* rank = ranks.get();
    for (int64_t p = 0; p < count; ++p, rank += regions) {
      Ranks top = rank[0];
      int32_t region = 0;
      for (int64_t j = 1; j < regions; ++j) {
        region = rank[j] > top ? static_cast<int32_t>(j) : region;
        top = rank[j] > top ? rank[j] : top;
      }
      result[first + p] = region;
    }
  }
}

// One sample's positions, region by region; region j's are order[first[j] .. first[j + 1]). Behind
// the last, kRowsBehind more are there to be read.
struct Regions {
  std::vector<int32_t> order, first;

  template <typename G>
  INLINE void Sort(const G* guide, int64_t positions, int64_t regions) {
    std::vector<int32_t> region(positions);
    order.assign(positions + kRowsBehind, 0);
    first.assign(regions + 1, 0);
    FindRegions(guide, positions, regions, region.data());
    for (int64_t p = 0; p < positions; ++p) ++first[region[p] + 1];
    for (int64_t j = 0; j < regions; ++j) first[j + 1] += first[j];
    std::vector<int32_t> next(first.begin(), first.end() - 1);
    for (int64_t p = 0; p < positions; ++p) order[next[region[p]]++] = static_cast<int32_t>(p);
  }
};

template <typename G>
struct SortTask {
  using Value = int32_t;
  const Shape& shape;
  const G* guide;
  std::vector<Regions>& regions;

  template <typename Isa>
  INLINE void Run(int64_t sample) const {
    regions[sample].Sort(guide + sample * shape.positions * shape.regions, shape.positions,
                         shape.regions);
  }
};

// Every sample's regions.
inline std::vector<Regions> RegionsOf(const Shape& shape, GuideFeatures guide, Workers& workers) {
  std::vector<Regions> regions(shape.batch);
  const auto sort = [&](const auto* values) {
    using G = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    workers.For(shape.batch, SortTask<G>{shape, values, regions});
  };
  std::visit(sort, guide);
  return regions;
}

}  // namespace drconv
