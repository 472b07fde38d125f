// The region convolution: y[p] = W[M[p]] applied to the window of x at p (Eq. 3-5), with M[p] the
// region of position p.
//
// Positions are listed region by region. The rows of one region, each the window of a position,
// then meet that region's filter in a register-blocked product: nothing is computed for a region
// that a position did not choose. Every sum is taken in an order that depends on the shapes alone,
// never on the threads; so it is in all of this library.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "drconv_jax/native/inline.h"
#include "drconv_jax/native/memory.h"
#include "drconv_jax/native/products.h"
#include "drconv_jax/native/vectors.h"
#include "drconv_jax/native/workers.h"
#include "drconv_jax/region_conv/cpu/arrays.h"
#include "drconv_jax/region_conv/cpu/regions.h"
#include "drconv_jax/region_conv/cpu/shape.h"

namespace drconv {

// y, for one slice of one sample's rows.
template <typename T>
struct ForwardTask {
  using Value = T;
  static constexpr int64_t kFew = 12;
  const Arrays<T>& arrays;
  int64_t parts;
  T* y;

  template <typename Isa>
  INLINE void Run(int64_t number) const {
    const Shape& shape = arrays.shape;
    const Slice slice(number, parts, shape.positions);
    const Regions& regions = arrays.regions[slice.sample];
    const int32_t* const order = regions.order.data();
    constexpr int64_t kMost = kPanelWidth<T, Isa::kPanels>;
    std::unique_ptr<T[]> buffer(new T[shape.taps * shape.in_per_group * kMost]);
    std::unique_ptr<T[]> waiting(
        new T[(kFew + Isa::kRows) * (shape.features_per_group + 2 * kMost)]);
    T* const y = this->y + slice.sample * shape.positions * shape.features;
    for (int64_t j = 0; j < shape.regions; ++j) {
      const int64_t begin = std::max<int64_t>(slice.begin, regions.first[j]);
      const int64_t end = std::min<int64_t>(slice.end, regions.first[j + 1]);
      if (begin >= end) continue;
      const T* const filter = arrays.Filter(slice.sample, j);
      Ahead ahead = arrays.template FilterAfter<Isa>(slice.sample, j, end - begin);
      for (int64_t g = 0; g < shape.groups; ++g) {
        const Windows<T> windows = arrays.WindowsOf(slice.sample, g);
        if (end - begin <= kFew && shape.features_per_group >= kPanelWidth<T, 2>) {
          const int64_t column = g * shape.features_per_group;
          Stream<Isa>(windows, order + begin, end - begin, filter + column, waiting.get(),
                      y + column);
          continue;
        }
        Panels<Isa::kPanels, T>(shape.features_per_group,
                                [&](auto panels, int64_t first, int64_t width) INLINE_LAMBDA {
          constexpr int P = decltype(panels)::value;
          const int64_t column = g * shape.features_per_group + first;
          const Weights<T> weights =
              FilterPanel<kPanelWidth<T, P>>(shape, filter, column, width, buffer.get());
          Blocks<Isa>(order + begin, end - begin,
                      [&](auto size, const int32_t* rows, int64_t count, const int32_t* coming)
                          INLINE_LAMBDA {
            constexpr int R = decltype(size)::value;
            typename Isa::template Panel<T, P> sums[R];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) FetchToWrite<P>(y + rows[r] * shape.features + column);
            Multiply(windows, rows, coming, weights, ahead, sums);
            for (int64_t r = 0; r < count; ++r)
              Store(sums[r], width, y + rows[r] * shape.features + column);
          });
        });
      }
    }
  }

 private:
  // y of so few rows that their filter takes longer to come from memory than to be used. It is read
  // in the order in which it lies, some of its rows against all its columns, while those that
  // follow are fetched; sums wait in a buffer meanwhile.
  template <typename Isa>
  INLINE void Stream(const Windows<T>& windows, const int32_t* rows, int64_t count, const T* filter,
                     T* waiting, T* y) const {
    constexpr int64_t kChunk = 48, kPage = 4096;
    const int64_t features = arrays.shape.features;
    const int64_t bytes = kChunk * features * sizeof(T);
    for (int64_t tap = 0; tap < windows.taps; ++tap) {
      for (int64_t c = 0; c < windows.channels; c += kChunk) {
        const int64_t channels = std::min(kChunk, windows.channels - c);
        const bool start = tap == 0 && c == 0;
        const bool finish = tap + 1 == windows.taps && c + channels == windows.channels;
        const char* const chunk = reinterpret_cast<const char*>(filter);
        Ahead ahead{chunk + bytes, 0};
        // The pages behind that, whose addresses take time to be found.
        for (int64_t i = 0; i < bytes; i += kPage) __builtin_prefetch(chunk + 2 * bytes + i, 0, 2);
        T* sums_at = waiting;
        Blocks<Isa>(rows, count,
                    [&](auto size, const int32_t* rows, int64_t count, const int32_t* coming)
                        INLINE_LAMBDA {
          constexpr int R = decltype(size)::value;
          // Half the rows leave registers for twice the panels.
          constexpr int kPanels = 2 * R <= Isa::kRows ? 2 * Isa::kPanels : Isa::kPanels;
          Panels<kPanels, T>(arrays.shape.features_per_group,
                             [&](auto panels, int64_t first, int64_t width) INLINE_LAMBDA {
            using Panel = typename Isa::template Panel<T, decltype(panels)::value>;
            constexpr int64_t kWidth = kPanelWidth<T, decltype(panels)::value>;
            // The last panels end with the last column: they have some in common
            // with those before.
            const int64_t column = first + width - kWidth;
            Panel sums[R];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
              sums[r] = start ? Panel::Zero() : Panel::Load(sums_at + r * kWidth);
            ahead.step = sizeof(Panel);
            AddProducts(windows, tap, c, channels, rows, coming,
                        Weights<T>{filter + column, features}, ahead, sums);
            if (finish) {
              for (int64_t r = 0; r < count; ++r) sums[r].Spill(y + rows[r] * features + column);
            } else {
#pragma GCC unroll 12
              for (int r = 0; r < R; ++r) sums[r].Spill(sums_at + r * kWidth);
            }
            sums_at += R * kWidth;
          });
        });
        filter += channels * features;
      }
    }
  }
};

template <typename S, typename T>
void Forward(const Shape& shape, Workers& workers, const void* x, const void* filters,
             GuideFeatures guide, void* y) {
  const Widened<S, T> all(workers, filters, shape.batch, shape.regions * shape.filter_size());
  const Prepared<S, T> call(shape, workers, x, all.data(), guide);
  Narrowed<S, T> output(y, shape.batch, shape.positions * shape.features);
  const int64_t slices = SlicesOf(shape, workers);
  workers.For(shape.batch * slices, ForwardTask<T>{call.arrays, slices, output.data()});
  output.Finish(workers);
}

}  // namespace drconv
