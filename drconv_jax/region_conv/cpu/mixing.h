// Mixing: filter[i] = bias + sum over n of weights[i, n] * bank[n], for the filters of all samples,
// which are the rows of a matrix; and its gradients.
//
// The filters are far larger than the banks. So work goes by bank and by chunk of its columns: the
// chunk stays in a cache while that of every row passes once.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "drconv_jax/native/inline.h"
#include "drconv_jax/native/products.h"
#include "drconv_jax/native/vectors.h"
#include "drconv_jax/native/workers.h"

namespace drconv {

// weights (batch, regions, taps, n), bank (banks, n, size), bias (banks, size) and the filters
// (batch, regions, taps, size). There is a bank for every region, or one for all; weights of their
// own for every tap, whose filters then are a tap's, or one row of weights for the whole filter.
struct MixShape {
  int64_t batch, regions, taps, n, banks, size;
  static constexpr int64_t kPanels = 16;  // a chunk, in panels

  int64_t rows() const { return batch * regions * taps; }
  int64_t rows_of_sample() const { return regions * taps; }
  int64_t regions_of_bank() const { return regions / banks; }
  template <typename T>
  int64_t chunks() const {
    return (size + kPanels * kPanelWidth<T> - 1) / (kPanels * kPanelWidth<T>);
  }
  // Those of the rows that are mixed of one bank.
  std::vector<int32_t> RowsOf(int64_t bank) const {
    const int64_t count = regions_of_bank() * taps;
    std::vector<int32_t> rows(batch * count);
    for (int64_t i = 0; i < batch * count; ++i)
      rows[i] = static_cast<int32_t>((i / count * banks + bank) * count + i % count);
    return rows;
  }
};

// A chunk of one bank, behind it that of its bias (or zeros), zeros where the columns have ended.
template <typename T>
struct BankChunk {
  int64_t bank, first, panels;
  std::unique_ptr<T[]> values;

  BankChunk(const MixShape& shape, int64_t number, const T* banks, const T* biases)
      : bank(number / shape.chunks<T>()),
        first(number % shape.chunks<T>() * MixShape::kPanels * kPanelWidth<T>),
        panels(std::min(MixShape::kPanels,
                        (shape.size - first + kPanelWidth<T> - 1) / kPanelWidth<T>)),
        values(new T[(shape.n + 1) * MixShape::kPanels * kPanelWidth<T>]()) {
    for (int64_t n = 0; n < shape.n + (biases != nullptr); ++n) {
      const T* source =
          n < shape.n ? banks + (bank * shape.n + n) * shape.size : biases + bank * shape.size;
      std::memcpy(values.get() + n * MixShape::kPanels * kPanelWidth<T>, source + first,
                  std::min(panels * kPanelWidth<T>, shape.size - first) * sizeof(T));
    }
  }
  INLINE const T* At(int64_t n, int64_t panel) const {
    return values.get() + (n * MixShape::kPanels + panel) * kPanelWidth<T>;
  }
};

// One chunk of the filters that are mixed of one bank.
template <typename T>
struct MixTask {
  using Value = T;
  const MixShape& shape;
  const T* weights;
  const T* bank;
  const T* bias;
  T* filters;

  template <typename Isa>
  INLINE void Run(int64_t number) const {
    using Panel = typename Isa::template Panel<T>;
    const BankChunk<T> chunk(shape, number, bank, bias);
    const std::vector<int32_t> all = shape.RowsOf(chunk.bank);
    Blocks<Isa>(all.data(), all.size(),
                [&](auto block, const int32_t* rows, int64_t count, const int32_t*) INLINE_LAMBDA {
      constexpr int R = decltype(block)::value;
      const T* weight[R];
      T* filter[R];
      for (int r = 0; r < R; ++r) {
        weight[r] = weights + rows[r] * shape.n;
        filter[r] = filters + rows[r] * shape.size + chunk.first;
      }
      for (int64_t p = 0; p < chunk.panels; ++p) {
        Panel sums[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) sums[r] = Panel::Load(chunk.At(shape.n, p));
        for (int64_t n = 0; n < shape.n; ++n) {
          const Panel values = Panel::Load(chunk.At(n, p));
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) sums[r].AddProduct(weight[r][n], values);
        }
        const int64_t at = p * kPanelWidth<T>;
        const int64_t width = std::min(kPanelWidth<T>, shape.size - chunk.first - at);
        for (int64_t r = 0; r < count; ++r) Store(sums[r], width, filter[r] + at);
      }
    });
  }
};

template <typename T>
void Mix(const MixShape& shape, Workers& workers, const T* weights, const T* bank, const T* bias,
         T* filters) {
  workers.For(shape.banks * shape.chunks<T>(), MixTask<T>{shape, weights, bank, bias, filters});
}

// The gradients of a chunk of one bank and its bias, and the chunk's part in those of the weights:
// parts[chunk, row, n].
template <typename T>
struct MixGradientTask {
  using Value = T;
  const MixShape& shape;
  const T* weights;
  const T* bank;
  const T* dfilters;
  T* dbank;
  T* dbias;
  T* parts;
  bool add;  // to what dbank and dbias hold

  template <typename Isa>
  INLINE void Run(int64_t number) const {
    using Panel = typename Isa::template Panel<T>;
    constexpr int64_t kWidth = kPanelWidth<T>;
    const BankChunk<T> chunk(shape, number, bank, nullptr);
    const std::vector<int32_t> rows = shape.RowsOf(chunk.bank);
    const T* const cotangents = dfilters + chunk.first;
    const auto load = [&](const T* source, int64_t width) INLINE_LAMBDA {
      T padded[kWidth];
      if (width < kWidth) {
        Pack<kWidth>(source, 1, 0, width, padded);
        source = padded;
      }
      return Panel::Load(source);
    };
    const auto width_of = [&](int64_t p) INLINE_LAMBDA {
      return std::min(kWidth, shape.size - chunk.first - p * kWidth);
    };
    std::vector<int32_t> all(shape.n + 1);
    std::iota(all.begin(), all.end(), 0);

    // First what reads every row's chunk in the order in which it lies.
    T* const part = parts + number % shape.chunks<T>() * shape.rows() * shape.n;
    for (size_t i = 0; i < rows.size(); ++i) {
      const T* const cotangent = cotangents + rows[i] * shape.size;
      const char* const next = reinterpret_cast<const char*>(
          cotangents + rows[std::min(i + 2, rows.size() - 1)] * shape.size);
      for (int64_t p = 0; p < chunk.panels; ++p) __builtin_prefetch(next + 64 * p);
      Blocks<Isa>(all.data(), shape.n,
                  [&](auto block, const int32_t* which, int64_t, const int32_t*) INLINE_LAMBDA {
        constexpr int R = decltype(block)::value;
        typename Panel::Register sums[R] = {};
        for (int64_t p = 0; p < chunk.panels; ++p) {
          const Panel values = load(cotangent + p * kWidth, width_of(p));
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r)
            sums[r] += values.Products(Panel::Load(chunk.At(which[r], p)));
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) part[rows[i] * shape.n + which[r]] = Panel::Sum(sums[r]);
      });
    }

    // Every row's weights, a one behind them, the bias's weight, and room for a block to end in.
    const int64_t ones = shape.n, stride = shape.n + 1 + Isa::kRows;
    std::unique_ptr<T[]> weight(new T[rows.size() * stride]());
    for (size_t i = 0; i < rows.size(); ++i) {
      std::copy_n(weights + rows[i] * shape.n, shape.n, &weight[i * stride]);
      weight[i * stride + ones] = 1;
    }
    for (int64_t p = 0; p < chunk.panels; ++p) {
      Blocks<Isa>(all.data(), shape.n + 1,
                  [&](auto block, const int32_t* which, int64_t count, const int32_t*)
                      INLINE_LAMBDA {
        constexpr int R = decltype(block)::value;
        const auto target = [&](int64_t n) INLINE_LAMBDA {
          T* const gradient = n == ones ? dbias + chunk.bank * shape.size
                                        : dbank + (chunk.bank * shape.n + n) * shape.size;
          return gradient + chunk.first + p * kWidth;
        };
        Panel sums[R], done[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
          sums[r] = add ? load(target(which[r]), width_of(p)) : Panel::Zero();
        const T* scalars = &weight[which[0]];
        for (int32_t row : rows) {
          const Panel values = load(cotangents + row * shape.size + p * kWidth, width_of(p));
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) sums[r].AddProduct(scalars[r], values);
          scalars += stride;
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) done[r] = sums[r];
        for (int64_t r = 0; r < count; ++r) Store(done[r], width_of(p), target(which[r]));
      });
    }
  }
};

// The gradient of one sample's weights: its parts, chunk by chunk.
template <typename T>
struct SumPartsTask {
  using Value = T;
  const MixShape& shape;
  const T* parts;
  T* dweights;

  template <typename Isa>
  INLINE void Run(int64_t sample) const {
    const int64_t size = shape.rows_of_sample() * shape.n, all = shape.batch * size;
    std::fill_n(dweights + sample * size, size, T(0));
    for (int64_t chunk = 0; chunk < shape.chunks<T>(); ++chunk)
      for (int64_t i = sample * size; i < (sample + 1) * size; ++i)
        dweights[i] += parts[chunk * all + i];
  }
};

// The gradients of what filters are mixed of; those of the bank and the bias are added to what is
// there where `add` says so.
template <typename T>
void MixGradients(const MixShape& shape, Workers& workers, const T* weights, const T* bank,
                  const T* dfilters, T* dweights, T* dbank, T* dbias, bool add) {
  std::unique_ptr<T[]> parts(new T[shape.chunks<T>() * shape.rows() * shape.n]);
  workers.For(shape.banks * shape.chunks<T>(),
              MixGradientTask<T>{shape, weights, bank, dfilters, dbank, dbias, parts.get(), add});
  workers.For(shape.batch, SumPartsTask<T>{shape, parts.get(), dweights});
}

}  // namespace drconv
