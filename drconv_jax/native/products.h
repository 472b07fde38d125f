// Register-blocked products: rows, which are windows of an input, times panels of weights.
//
// Windows are not copied: their rows are read where they lie, tap by tap. A block of rows by one to
// four panels of columns is summed up in registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "drconv_jax/native/vectors.h"

namespace drconv {

// Where windows lie in one sample of x, for one group of its channels.
template <typename T>
struct Windows {
  const T* x;
  int64_t stride;  // values from one position to the next
  int64_t channels, taps;
  // offsets[tap * positions + p] is the position that row p has under that tap, or -1 where padding
  // lies; null where row p is position p.
  const int32_t* offsets;
  int64_t positions;
  const T* zeros;  // as many as there are channels: what lies in the padding

  INLINE const T* Row(int64_t tap, int64_t p) const {
    const int64_t at = offsets ? offsets[tap * positions + p] : p;
    return at < 0 ? zeros : x + at * stride;
  }
};

// Fetches memory to come, bit by bit while something else is computed: for matrices that are read
// once, in narrow columns, from arrays larger than any cache. No hardware would foresee it.
struct Ahead {
  const char* at;
  int64_t step;

  template <int kLines>
  INLINE void Step() {
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += step;
  }
};

// Fetches the memory of some panels that will be written: it may lie in another core's cache, or be
// no cache's.
template <int kPanels, typename T>
INLINE void FetchToWrite(T* target) {
  for (int i = 0; i <= kPanels; ++i)
    __builtin_prefetch(reinterpret_cast<const char*>(target) + 64 * i, 1);
}

// Rows of a panel, `stride` values apart.
template <typename T>
struct Weights {
  const T* panel;
  int64_t stride;
};

// sums[r] += sum over the channels from `channel` on, `count` of them, of window[rows[r]][tap][c] *
// panel[c], for R rows. Those of the R rows in `coming` are fetched: rows lie in no order that
// hardware would foresee.
template <int R, typename T, typename Panel>
INLINE void AddProducts(const Windows<T>& windows, int64_t tap, int64_t channel, int64_t count,
                        const int32_t* rows, const int32_t* coming, const Weights<T>& weights,
                        Ahead& ahead, Panel (&sums)[R]) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const T* panel = weights.panel;
  Ahead stepping = ahead;
  const T* row[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) row[r] = windows.Row(tap, rows[r]) + channel;
  for (int64_t c = 0; c < count; ++c) {
    if (c % kLine == 0)
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) __builtin_prefetch(windows.Row(tap, coming[r]) + channel + c);
    const Panel values = Panel::Load(panel);
    panel += weights.stride;
    stepping.template Step<sizeof(Panel) / 64>();
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r].AddProduct(row[r][c], values);
  }
  ahead = stepping;
}

// sums[r] = sum over taps and channels of window[rows[r]][tap][c] * panel[tap][c], for R rows.
template <int R, typename T, typename Panel>
INLINE void Multiply(const Windows<T>& windows, const int32_t* rows, const int32_t* coming,
                     Weights<T> weights, Ahead& ahead, Panel (&sums)[R]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sums[r] = Panel::Zero();
  for (int64_t tap = 0; tap < windows.taps; ++tap) {
    AddProducts(windows, tap, 0, windows.channels, rows, coming, weights, ahead, sums);
    weights.panel += windows.channels * weights.stride;
  }
}

constexpr int64_t kRowsBehind = 16;

// Calls body(R, rows, count, coming) over `count` rows, R a compile-time number: whole blocks of
// kRows, then one in the smallest of four sizes that holds the rest. `rows` always has R entries,
// the last repeated where there are fewer; a row's arithmetic is the same whatever block it is in.
// `coming` are the rows behind these: kRowsBehind of them must be there to be read behind the last.
template <typename Isa, typename Body>
INLINE void Blocks(const int32_t* rows, int64_t count, const Body& body) {
  constexpr int kRows = Isa::kRows;
  constexpr int kSmall = (kRows + 3) / 4, kHalf = (kRows + 1) / 2, kLarge = (3 * kRows + 3) / 4;
  static_assert(kRows <= kRowsBehind);
  for (; count >= kRows; rows += kRows, count -= kRows)
    body(std::integral_constant<int, kRows>{}, rows, kRows, rows + kRows);
  if (count == 0) return;
  int32_t padded[kRows];
  for (int r = 0; r < kRows; ++r) padded[r] = rows[std::min<int64_t>(r, count - 1)];
  const int32_t* const coming = rows + count;
  if (count <= kSmall) {
    body(std::integral_constant<int, kSmall>{}, padded, count, coming);
  } else if (count <= kHalf) {
    body(std::integral_constant<int, kHalf>{}, padded, count, coming);
  } else if (count <= kLarge) {
    body(std::integral_constant<int, kLarge>{}, padded, count, coming);
  } else {
    body(std::integral_constant<int, kRows>{}, padded, count, coming);
  }
}

}  // namespace drconv
