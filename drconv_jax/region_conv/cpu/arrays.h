// The arrays of a call as every task of a region convolution reads them, and how a task's part of
// them is cut.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "drconv_jax/native/inline.h"
#include "drconv_jax/native/memory.h"
#include "drconv_jax/native/products.h"
#include "drconv_jax/native/vectors.h"
#include "drconv_jax/native/workers.h"
#include "drconv_jax/region_conv/cpu/regions.h"
#include "drconv_jax/region_conv/cpu/shape.h"

namespace drconv {

template <typename T>
struct Arrays {
  const Shape& shape;
  const T* x;
  const T* filters;        // null where they are not made yet
  const int32_t* offsets;  // of Windows
  const Regions* regions;  // one for every sample
  const T* zeros;          // of Windows
  int64_t threads;

  INLINE Windows<T> WindowsOf(int64_t sample, int64_t group) const {
    return {x + sample * shape.in_positions * shape.in + group * shape.in_per_group,
            shape.in,
            shape.in_per_group,
            shape.taps,
            offsets,
            shape.positions,
            zeros};
  }
  INLINE const T* Filter(int64_t sample, int64_t region) const {
    return filters + (sample * shape.regions + region) * shape.filter_size();
  }
  // Fetches what is likely needed next, in about `steps` steps: `bytes` from `offset` on of the
  // filter of the next region or, behind the last, of the sample that this thread will take.
  INLINE Ahead FilterAfter(int64_t sample, int64_t region, int64_t offset, int64_t bytes,
                           int64_t steps) const {
    const T* const next =
        region + 1 < shape.regions ? Filter(sample, region + 1) : Filter(sample + threads, 0);
    return {reinterpret_cast<const char*>(next + offset), bytes / std::max<int64_t>(1, steps) + 1};
  }
  template <typename Isa>
  INLINE Ahead FilterAfter(int64_t sample, int64_t region, int64_t rows) const {
    const int64_t blocks = (rows + Isa::kRows - 1) / Isa::kRows;
    return FilterAfter(sample, region, 0, shape.filter_size() * sizeof(T),
                       blocks * shape.filter_size() / kPanelWidth<T, Isa::kPanels>);
  }
};

// One panel of a filter seen as a matrix (taps x in_per_group, features).
template <int64_t kWidth, typename T>
INLINE Weights<T> FilterPanel(const Shape& shape, const T* filter, int64_t column, int64_t width,
                              T* buffer) {
  Pack<kWidth>(filter + column, shape.taps * shape.in_per_group, shape.features, width, buffer);
  return {buffer, kWidth};
}

// What both directions prepare: x in its computing type, the windows' offsets, every sample's
// regions.
template <typename S, typename T>
struct Prepared {
  Widened<S, T> x;
  std::vector<int32_t> offsets;
  std::vector<Regions> regions;
  std::vector<T> zeros;
  Arrays<T> arrays;

  Prepared(const Shape& shape, Workers& workers, const void* x_values, const T* filters,
           GuideFeatures guide)
      : x(workers, x_values, shape.batch, shape.in_positions * shape.in),
        offsets(WindowOffsets(shape)),
        regions(RegionsOf(shape, guide, workers)),
        zeros(shape.in_per_group),
        arrays{shape,
               x.data(),
               filters,
               offsets.empty() ? nullptr : offsets.data(),
               regions.data(),
               zeros.data(),
               workers.threads()} {}
};

// A sample's rows in `parts` about equal parts, so that a small batch feeds many threads.
struct Slice {
  int64_t sample, begin, end;
  Slice(int64_t number, int64_t parts, int64_t positions)
      : sample(number / parts),
        begin(number % parts * positions / parts),
        end((number % parts + 1) * positions / parts) {}
};

// Slices of a sample: enough for every thread, none of a few rows only.
inline int64_t SlicesOf(const Shape& shape, const Workers& workers) {
  const int64_t wanted = 4 * workers.threads();
  if (shape.batch >= wanted) return 1;
  return std::clamp<int64_t>(wanted / shape.batch, 1, std::max<int64_t>(1, shape.positions / 64));
}

}  // namespace drconv
