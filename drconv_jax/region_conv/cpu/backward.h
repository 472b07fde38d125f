// The gradients of the region convolution. With dy the cotangent of y:
//
//   scores[p, j] = <dy[p], (W_j * x)[p]>   the forward product again, folded onto dy in registers;
//   for
//                                          the chosen region it is <dy[p], y[p]>. The guide's
//                                          gradient (Eq. 7-8) is made of them elsewhere.
//   dx           = the chosen filter's transpose applied to dy, scattered tap by tap.
//   dW_j         = sum over region j's rows of x[window of p] dy[p]^T.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "drconv_jax/native/inline.h"
#include "drconv_jax/native/memory.h"
#include "drconv_jax/native/products.h"
#include "drconv_jax/native/vectors.h"
#include "drconv_jax/native/workers.h"
#include "drconv_jax/region_conv/cpu/arrays.h"
#include "drconv_jax/region_conv/cpu/regions.h"
#include "drconv_jax/region_conv/cpu/shape.h"

namespace drconv {

// scores[p, j] = <dy[p], (W_j * x)[p]>, for one slice of one sample's rows.
template <typename T>
struct ScoresTask {
  using Value = T;
  const Arrays<T>& arrays;
  int64_t parts;
  const T* y;
  const T* dy;
  T* scores;

  template <typename Isa>
  INLINE void Run(int64_t number) const {
    using Register = typename Isa::template Panel<T>::Register;
    constexpr int64_t kMost = kPanelWidth<T, Isa::kPanels>;
    const Shape& shape = arrays.shape;
    const Slice slice(number, parts, shape.positions);
    const Regions& regions = arrays.regions[slice.sample];
    const int32_t* const order = regions.order.data();
    const int64_t at = slice.sample * shape.positions;
    const T* const y = this->y + at * shape.features;
    const T* const dy = this->dy + at * shape.features;
    T* const scores = this->scores + at * shape.regions;
    std::unique_ptr<T[]> buffer(
        new T[shape.taps * shape.in_per_group * kPanelWidth<T, Isa::kPanels>]);
    const int64_t rows_here = slice.end - slice.begin;
    std::unique_ptr<Register[]> sums_of(new Register[rows_here]);
    // The cotangents of the panels that are not whole, zeros behind: every region reads them.
    const int64_t tail = shape.features_per_group % kMost;
    std::unique_ptr<T[]> tails(new T[tail ? shape.groups * rows_here * kMost : 0]);
    for (int64_t g = 0; tail && g < shape.groups; ++g)
      for (int64_t row = 0; row < rows_here; ++row)
        Pack<kMost>(dy + order[slice.begin + row] * shape.features +
                        (g + 1) * shape.features_per_group - tail,
                    1, 0, tail, &tails[(g * rows_here + row) * kMost]);
    for (int64_t j = 0; j < shape.regions; ++j) {
      const int64_t own_begin = std::clamp<int64_t>(regions.first[j], slice.begin, slice.end);
      const int64_t own_end = std::clamp<int64_t>(regions.first[j + 1], slice.begin, slice.end);
      const int64_t others = rows_here - (own_end - own_begin);
      const T* const filter = arrays.Filter(slice.sample, j);
      Ahead ahead = arrays.template FilterAfter<Isa>(slice.sample, j, others);
      for (int64_t g = 0; g < shape.groups; ++g) {
        const Windows<T> windows = arrays.WindowsOf(slice.sample, g);
        Panels<Isa::kPanels, T>(shape.features_per_group,
                                [&](auto panels, int64_t first, int64_t width) INLINE_LAMBDA {
          using Panel = typename Isa::template Panel<T, decltype(panels)::value>;
          constexpr int64_t kWidth = kPanelWidth<T, decltype(panels)::value>;
          const int64_t column = g * shape.features_per_group + first;
          // Panel by panel, products with dy gather in a register for each row; its lanes are
          // added up with the last.
          const auto gather = [&](int64_t row, const Panel& values) INLINE_LAMBDA {
            const T* const cotangents = width == kMost
                                            ? dy + order[row] * shape.features + column
                                            : &tails[(g * rows_here + row - slice.begin) * kMost];
            Register products = values.Products(Panel::Load(cotangents));
            if (column > 0) products += sums_of[row - slice.begin];
            if (column + width < shape.features) {
              sums_of[row - slice.begin] = products;
            } else {
              scores[order[row] * shape.regions + j] = Panel::Sum(products);
            }
          };
          for (int64_t row = own_begin; row < own_end; ++row) {
            const T* const own = y + order[row] * shape.features + column;
            T padded[kWidth];
            if (width < kWidth) Pack<kWidth>(own, 1, 0, width, padded);
            gather(row, Panel::Load(width < kWidth ? padded : own));
          }
          if (others == 0) return;
          const Weights<T> weights =
              FilterPanel<kWidth>(shape, filter, column, width, buffer.get());
          int64_t row = slice.begin;
          const auto fold = [&](auto size, const int32_t* rows, int64_t count,
                                const int32_t* coming) INLINE_LAMBDA {
            constexpr int R = decltype(size)::value;
            Panel sums[R];
            Multiply(windows, rows, coming, weights, ahead, sums);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)  // R is known: the sums need not leave their registers
              if (r < count) gather(row + r, sums[r]);
            row += count;
          };
          Blocks<Isa>(order + slice.begin, own_begin - slice.begin, fold);
          row = own_end;
          Blocks<Isa>(order + own_end, slice.end - own_end, fold);
        });
      }
    }
  }
};

// dx, for one strip of the channels of one sample. Different strips touch different values, and
// within one tap no input position is met twice.
template <typename T>
struct InputGradientTask {
  using Value = T;
  static constexpr int64_t kStrip = 2 * kPanelWidth<T>;
  const Arrays<T>& arrays;
  int64_t strips_per_group;
  const T* dy;
  T* dx;

  template <typename Isa>
  INLINE void Run(int64_t number) const {
    const Shape& shape = arrays.shape;
    const int64_t strips = strips_per_group * shape.groups;
    const int64_t sample = number / strips, g = number % strips / strips_per_group;
    const int64_t start = number % strips_per_group * kStrip;
    const Regions& regions = arrays.regions[sample];
    const Windows<T> cotangents = {
        dy + sample * shape.positions * shape.features + g * shape.features_per_group,
        shape.features,
        shape.features_per_group,
        1,
        nullptr,
        shape.positions,
        nullptr};
    std::unique_ptr<T[]> panel(new T[shape.features_per_group * kPanelWidth<T, Isa::kPanels>]);
    Panels<Isa::kPanels, T>(std::min(kStrip, shape.in_per_group - start),
                            [&](auto panels, int64_t first, int64_t width) INLINE_LAMBDA {
      constexpr int64_t kWidth = kPanelWidth<T, decltype(panels)::value>;
      const int64_t channel = start + first;
      T* const dx =
          this->dx + sample * shape.in_positions * shape.in + g * shape.in_per_group + channel;
      if (arrays.offsets) {
        for (int64_t q = 0; q < shape.in_positions; ++q)
          for (int64_t i = 0; i < width; ++i) dx[q * shape.in + i] = 0;
      }
      for (int64_t j = 0; j < shape.regions; ++j) {
        const int64_t count = regions.first[j + 1] - regions.first[j];
        if (count == 0) continue;
        for (int64_t tap = 0; tap < shape.taps; ++tap) {
          const T* filter = arrays.Filter(sample, j) +
                            (tap * shape.in_per_group + channel) * shape.features +
                            g * shape.features_per_group;
          PackTransposed<Isa, kWidth>(filter, shape.features_per_group, shape.features, width,
                                      panel.get());
          const Weights<T> weights = {panel.get(), kWidth};
          const int64_t blocks = (count + Isa::kRows - 1) / Isa::kRows;
          Ahead ahead = arrays.FilterAfter(sample, j, filter - arrays.Filter(sample, j),
                                           width * shape.features * sizeof(T),
                                           blocks * shape.features_per_group);
          Blocks<Isa>(regions.order.data() + regions.first[j], count,
                      [&](auto size, const int32_t* rows, int64_t count, const int32_t* coming)
                          INLINE_LAMBDA {
            constexpr int R = decltype(size)::value;
            typename Isa::template Panel<T, decltype(panels)::value> sums[R];
            Multiply(cotangents, rows, coming, weights, ahead, sums);
            for (int64_t r = 0; r < count; ++r) {
              if (!arrays.offsets) {
                Store(sums[r], width, dx + rows[r] * shape.in);
                continue;
              }
              const int64_t q = arrays.offsets[tap * shape.positions + rows[r]];
              if (q < 0) continue;
              T values[kWidth];
              sums[r].Spill(values);
              for (int64_t i = 0; i < width; ++i) dx[q * shape.in + i] += values[i];
            }
          });
        }
      }
    });
  }
};

// dW, for one region of one sample.
template <typename T>
struct FilterGradientTask {
  using Value = T;
  const Arrays<T>& arrays;
  const T* dy;
  T* dfilters;

  template <typename Isa>
  INLINE void Run(int64_t number) const {
    using Panel = typename Isa::template Panel<T>;
    const Shape& shape = arrays.shape;
    const int64_t sample = number / shape.regions, j = number % shape.regions;
    const Regions& regions = arrays.regions[sample];
    const int64_t count = regions.first[j + 1] - regions.first[j];
    const int32_t* rows = regions.order.data() + regions.first[j];
    T* const gradient = dfilters + number * shape.filter_size();
    if (count == 0) {
      std::fill(gradient, gradient + shape.filter_size(), T(0));
      return;
    }
    const T* const dy = this->dy + sample * shape.positions * shape.features;
    const int64_t panel_count = (shape.features_per_group + kPanelWidth<T> - 1) / kPanelWidth<T>;
    std::unique_ptr<T[]> panels(new T[panel_count * count * kPanelWidth<T>]);
    std::unique_ptr<T[]> values(new T[count * Isa::kRows]);
    std::vector<int32_t> channels(shape.in_per_group);
    std::iota(channels.begin(), channels.end(), 0);
    for (int64_t g = 0; g < shape.groups; ++g) {
      const Windows<T> windows = arrays.WindowsOf(sample, g);
      Panels<1, T>(shape.features_per_group, [&](auto, int64_t first, int64_t width) INLINE_LAMBDA {
        T* panel = panels.get() + first * count;
        for (int64_t i = 0; i < count; ++i, panel += kPanelWidth<T>)
          Pack<kPanelWidth<T>>(dy + rows[i] * shape.features + g * shape.features_per_group + first,
                               1, 0, width, panel);
      });
      for (int64_t tap = 0; tap < shape.taps; ++tap) {
        Blocks<Isa>(channels.data(), shape.in_per_group,
                    [&](auto size, const int32_t* channel, int64_t channel_count, const int32_t*)
                        INLINE_LAMBDA {
          constexpr int R = decltype(size)::value;
          for (int64_t i = 0; i < count; ++i) {
            const T* row = windows.Row(tap, rows[i]);
            __builtin_prefetch(windows.Row(tap, rows[i + kRowsBehind / 2]) + channel[0]);
            if (channel_count == R) {  // they are neighbours
              std::memcpy(&values[i * R], row + channel[0], R * sizeof(T));
            } else {
              for (int r = 0; r < R; ++r) values[i * R + r] = row[channel[r]];
            }
          }
          Panels<1, T>(shape.features_per_group,
                       [&](auto, int64_t first, int64_t width) INLINE_LAMBDA {
            const T* panel = panels.get() + first * count;
            T* const target = gradient + g * shape.features_per_group + first;
            const auto at = [&](int r) INLINE_LAMBDA {
              return target + (tap * shape.in_per_group + channel[r]) * shape.features;
            };
            Panel sums[R];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
              sums[r] = Panel::Zero();
              FetchToWrite<1>(at(r));
            }
            for (int64_t i = 0; i < count; ++i, panel += kPanelWidth<T>) {
              const Panel weights = Panel::Load(panel);
#pragma GCC unroll 12
              for (int r = 0; r < R; ++r) sums[r].AddProduct(values[i * R + r], weights);
            }
            for (int64_t r = 0; r < channel_count; ++r) Store(sums[r], width, at(r));
          });
        });
      }
    }
  }
};

// All of them.
template <typename T>
void Gradients(const Arrays<T>& arrays, Workers& workers, const T* y, const T* dy, T* dx,
               T* dfilters, T* scores) {
  const Shape& shape = arrays.shape;
  // Every filter meets all rows of a slice, which should stay in a core's second cache.
  constexpr int64_t kCached = 512 << 10;
  const int64_t slice = shape.in_positions * shape.in + shape.positions * shape.features;
  const int64_t slices =
      std::max(SlicesOf(shape, workers),
               std::min<int64_t>(slice * sizeof(T) / kCached, shape.positions / 64));
  workers.For(shape.batch * slices, ScoresTask<T>{arrays, slices, y, dy, scores});
  workers.For(shape.batch * shape.regions, FilterGradientTask<T>{arrays, dy, dfilters});
  constexpr int64_t kStrip = InputGradientTask<T>::kStrip;
  const int64_t strips = (shape.in_per_group + kStrip - 1) / kStrip;
  workers.For(shape.batch * shape.groups * strips, InputGradientTask<T>{arrays, strips, dy, dx});
}

template <typename S, typename T>
void Backward(const Shape& shape, Workers& workers, const void* x, const void* filters,
              GuideFeatures guide, const void* y, const void* dy, void* dx, void* dfilters,
              void* scores) {
  const Widened<S, T> all(workers, filters, shape.batch, shape.regions * shape.filter_size());
  const Prepared<S, T> call(shape, workers, x, all.data(), guide);
  const int64_t out_size = shape.positions * shape.features;
  const Widened<S, T> output(workers, y, shape.batch, out_size);
  const Widened<S, T> cotangent(workers, dy, shape.batch, out_size);
  Narrowed<S, T> input_gradient(dx, shape.batch, shape.in_positions * shape.in);
  Narrowed<S, T> filter_gradient(dfilters, shape.batch, shape.regions * shape.filter_size());
  Gradients(call.arrays, workers, output.data(), cotangent.data(), input_gradient.data(),
            filter_gradient.data(), static_cast<T*>(scores));
  input_gradient.Finish(workers);
  filter_gradient.Finish(workers);
}

}  // namespace drconv
