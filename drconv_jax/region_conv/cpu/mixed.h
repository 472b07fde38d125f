// The region convolution with filters that are mixed on the way, and its gradients.
//
// The filters of a batch may be larger than anything else in a network's late layers: to write them
// takes longer than to use them. So a few at a time are mixed into memory that stays in a cache,
// and used at once.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "drconv_jax/native/inline.h"
#include "drconv_jax/native/memory.h"
#include "drconv_jax/native/products.h"
#include "drconv_jax/native/vectors.h"
#include "drconv_jax/native/workers.h"
#include "drconv_jax/region_conv/cpu/arrays.h"
#include "drconv_jax/region_conv/cpu/backward.h"
#include "drconv_jax/region_conv/cpu/forward.h"
#include "drconv_jax/region_conv/cpu/mixing.h"
#include "drconv_jax/region_conv/cpu/regions.h"
#include "drconv_jax/region_conv/cpu/shape.h"

namespace drconv {

// y, for some of the samples and one strip of a group's columns. Of the filters that positions of
// these samples chose, and of no other, panels of those columns are mixed.
template <typename T>
struct MixedForwardTask {
  using Value = T;
  static constexpr int64_t kStrip = 2 * kPanelWidth<T>;
  const Arrays<T>& arrays;  // without filters
  const MixShape& mixture;
  int64_t parts, strips_per_group;
  const T* weights;
  const T* bank;
  const T* bias;
  T* y;

  template <typename Isa>
  INLINE void Run(int64_t number) const {
    const Shape& shape = arrays.shape;
    const int64_t strips = strips_per_group * shape.groups;
    const Slice samples(number / strips, parts, shape.batch);
    const int64_t g = number % strips / strips_per_group;
    const int64_t start = number % strips_per_group * kStrip;
    constexpr int64_t kMost = kPanelWidth<T, Isa::kPanels>;
    constexpr int64_t kCached = 1 << 20;  // bytes of filters at once
    // A filter is as many rows of the mixture as these have taps, each of them this many rows of a
    // matrix with `features` columns.
    const int64_t taps = mixture.taps, height = mixture.size / shape.features;
    const int64_t at_once = std::clamp<int64_t>(kCached / (taps * height * kMost * sizeof(T)), 1,
                                                std::max<int64_t>(1, Isa::kRows / taps));
    std::unique_ptr<T[]> banks(new T[height * (1 + mixture.n) * kMost]);
    std::unique_ptr<T[]> scalars(new T[mixture.n * Isa::kRows]);
    std::unique_ptr<T[]> filters(new T[(at_once * taps + Isa::kRows) * height * kMost]);
    std::vector<Filter> chosen;
    std::vector<int32_t> rows;
    for (int64_t b = 0; b < mixture.banks; ++b) {
      chosen.clear();
      for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
        const std::vector<int32_t>& first = arrays.regions[sample].first;
        for (int64_t i = 0; i < mixture.regions_of_bank(); ++i) {
          const int64_t region = b * mixture.regions_of_bank() + i;
          if (first[region] < first[region + 1]) chosen.push_back({sample, region});
        }
      }
      Panels<Isa::kPanels, T>(std::min(kStrip, shape.features_per_group - start),
                              [&](auto panels, int64_t first, int64_t width) INLINE_LAMBDA {
        using Panel = typename Isa::template Panel<T, decltype(panels)::value>;
        constexpr int64_t kWidth = kPanelWidth<T, decltype(panels)::value>;
        const int64_t column = g * shape.features_per_group + start + first;
        T* packed = banks.get();
        for (int64_t i = 0; i < height; ++i)
          for (int64_t n = -1; n < mixture.n; ++n, packed += kWidth) {
            const T* const source =
                n < 0 ? bias + b * mixture.size : bank + (b * mixture.n + n) * mixture.size;
            Pack<kWidth>(source + i * shape.features + column, 1, 0, width, packed);
          }
        for (size_t begin = 0; begin < chosen.size(); begin += at_once) {
          const size_t end = std::min<size_t>(begin + at_once, chosen.size());
          rows.clear();
          for (size_t c = begin; c < end; ++c)
            for (int64_t tap = 0; tap < taps; ++tap)
              rows.push_back(static_cast<int32_t>(
                  (chosen[c].sample * shape.regions + chosen[c].region) * taps + tap));
          MixPanels<Isa, Panel>(rows, height, banks.get(), scalars.get(), filters.get());
          const T* filter = filters.get();
          for (size_t c = begin; c < end; ++c, filter += taps * height * kWidth)
            Convolve<Isa, Panel>(chosen[c], g, filter, width, column);
        }
      });
    }
  }

 private:
  struct Filter {
    int64_t sample, region;
  };

  // Panels of these rows of the mixture, one behind the other. Those of the last block may be
  // followed by copies of its last one.
  template <typename Isa, typename Panel>
  INLINE void MixPanels(const std::vector<int32_t>& rows, int64_t height, const T* banks,
                        T* scalars, T* panel) const {
    constexpr int64_t kWidth = sizeof(Panel) / sizeof(T);
    Blocks<Isa>(rows.data(), rows.size(),
                [&](auto size, const int32_t* row, int64_t count, const int32_t*) INLINE_LAMBDA {
      constexpr int R = decltype(size)::value;
      for (int64_t n = 0; n < mixture.n; ++n)
        for (int r = 0; r < R; ++r) scalars[n * R + r] = weights[row[r] * mixture.n + n];
      const T* values = banks;
      for (int64_t i = 0; i < height; ++i, panel += kWidth) {
        Panel sums[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) sums[r] = Panel::Load(values);
        values += kWidth;
        for (int64_t n = 0; n < mixture.n; ++n, values += kWidth) {
          const Panel value = Panel::Load(values);
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) sums[r].AddProduct(scalars[n * R + r], value);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) sums[r].Spill(panel + r * height * kWidth);
      }
      panel += (count - 1) * height * kWidth;
    });
  }

  // One panel of y's columns, at the positions that chose this filter.
  template <typename Isa, typename Panel>
  INLINE void Convolve(const Filter& chosen, int64_t g, const T* filter, int64_t width,
                       int64_t column) const {
    constexpr int64_t kWidth = sizeof(Panel) / sizeof(T);
    const Shape& shape = arrays.shape;
    const Regions& regions = arrays.regions[chosen.sample];
    const int32_t* const first = regions.first.data() + chosen.region;
    const Windows<T> windows = arrays.WindowsOf(chosen.sample, g);
    T* const y = this->y + chosen.sample * shape.positions * shape.features + column;
    Ahead ahead{reinterpret_cast<const char*>(filter), sizeof(Panel)};
    Blocks<Isa>(regions.order.data() + first[0], first[1] - first[0],
                [&](auto size, const int32_t* rows, int64_t count, const int32_t* coming)
                    INLINE_LAMBDA {
      constexpr int R = decltype(size)::value;
      Panel sums[R], done[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) FetchToWrite<sizeof(Panel) / 64>(y + rows[r] * shape.features);
      Multiply(windows, rows, coming, Weights<T>{filter, kWidth}, ahead, sums);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) done[r] = sums[r];  // lest sums be kept in memory all the time
      for (int64_t r = 0; r < count; ++r) Store(done[r], width, y + rows[r] * shape.features);
    });
  }
};

// What both directions read of a mixture.
template <typename S, typename T>
struct WidenedMixture {
  Widened<S, T> weights, bank, bias;

  WidenedMixture(const MixShape& shape, Workers& workers, const void* weights, const void* bank,
                 const void* bias)
      : weights(workers, weights, shape.batch, shape.rows_of_sample() * shape.n),
        bank(workers, bank, shape.banks * shape.n, shape.size),
        bias(workers, bias, shape.banks, shape.size) {}
};

template <typename S, typename T>
void MixedForward(const Shape& shape, const MixShape& mixture, Workers& workers, const void* x,
                  const void* weights, const void* bank, const void* bias, GuideFeatures guide,
                  void* y) {
  const Prepared<S, T> call(shape, workers, x, nullptr, guide);
  const WidenedMixture<S, T> mixed(mixture, workers, weights, bank, bias);
  Narrowed<S, T> output(y, shape.batch, shape.positions * shape.features);
  constexpr int64_t kStrip = MixedForwardTask<T>::kStrip;
  const int64_t strips = (shape.features_per_group + kStrip - 1) / kStrip;
  const int64_t all_strips = strips * shape.groups;
  const int64_t slices = SlicesOf(shape, workers);
  if (all_strips * shape.batch < std::min(2 * workers.threads(), slices * shape.batch)) {
    // Few samples with few channels feed many threads by slices of their positions only.
    const Scratch<T> filters(mixture.rows() * mixture.size);
    Mix(mixture, workers, mixed.weights.data(), mixed.bank.data(), mixed.bias.data(),
        filters.data());
    Arrays<T> arrays = call.arrays;
    arrays.filters = filters.data();
    workers.For(shape.batch * slices, ForwardTask<T>{arrays, slices, output.data()});
  } else {
    // A bank is read once for every part of the batch: as few parts as feed the threads.
    const int64_t wanted = (4 * workers.threads() + all_strips - 1) / all_strips;
    const int64_t parts = std::min(wanted, shape.batch);
    workers.For(parts * all_strips,
                MixedForwardTask<T>{call.arrays, mixture, parts, strips, mixed.weights.data(),
                                    mixed.bank.data(), mixed.bias.data(), output.data()});
  }
  output.Finish(workers);
}

// Some samples at a time, whose filters and their gradients are mixed, used and done with while
// they are in a cache: `scratch` holds both for `at_once` samples.
template <typename S, typename T>
void MixedBackward(const Shape& shape, const MixShape& mixture, Workers& workers, const void* x,
                   const void* weights, const void* bank, const void* bias, GuideFeatures guide,
                   const void* y, const void* dy, void* dx, void* dweights, void* dbank,
                   void* dbias, void* scores, int64_t at_once, void* scratch) {
  const Prepared<S, T> call(shape, workers, x, nullptr, guide);
  const WidenedMixture<S, T> mixed(mixture, workers, weights, bank, bias);
  const int64_t in_size = shape.in_positions * shape.in;
  const int64_t out_size = shape.positions * shape.features;
  const int64_t weights_size = mixture.rows_of_sample() * mixture.n;
  const Widened<S, T> output(workers, y, shape.batch, out_size);
  const Widened<S, T> cotangent(workers, dy, shape.batch, out_size);
  Narrowed<S, T> input_gradient(dx, shape.batch, in_size);
  Narrowed<S, T> weight_gradient(dweights, shape.batch, weights_size);
  Narrowed<S, T> bank_gradient(dbank, mixture.banks * mixture.n, mixture.size);
  Narrowed<S, T> bias_gradient(dbias, mixture.banks, mixture.size);
  const int64_t filters_size = at_once * shape.regions * shape.filter_size();
  T* const filters = static_cast<T*>(scratch);
  T* const dfilters = filters + filters_size;
  PreferLargePages(scratch, 2 * filters_size * sizeof(T));
  for (int64_t begin = 0; begin < shape.batch; begin += at_once) {
    Shape some = shape;
    MixShape some_mixed = mixture;
    some.batch = some_mixed.batch = std::min(at_once, shape.batch - begin);
    const Arrays<T> arrays{some,
                           call.arrays.x + begin * in_size,
                           filters,
                           call.arrays.offsets,
                           call.arrays.regions + begin,
                           call.arrays.zeros,
                           workers.threads()};
    const T* const their_weights = mixed.weights.data() + begin * weights_size;
    Mix(some_mixed, workers, their_weights, mixed.bank.data(), mixed.bias.data(), filters);
    Gradients(arrays, workers, output.data() + begin * out_size,
              cotangent.data() + begin * out_size, input_gradient.data() + begin * in_size,
              dfilters, static_cast<T*>(scores) + begin * shape.positions * shape.regions);
    MixGradients(some_mixed, workers, their_weights, mixed.bank.data(), dfilters,
                 weight_gradient.data() + begin * weights_size, bank_gradient.data(),
                 bias_gradient.data(), begin > 0);
  }
  input_gradient.Finish(workers);
  weight_gradient.Finish(workers);
  bank_gradient.Finish(workers);
  bias_gradient.Finish(workers);
}

}  // namespace drconv
