// Vectors: the registers of an instruction set, panels of 64 bytes made of them, and the moves
// between panels and the rows of a matrix.
//
// Code is written once, with an instruction set as a template argument, and compiled for each of
// them; workers.h picks one by the processor that it runs on.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "drconv_jax/native/inline.h"

namespace drconv {

// GCC has __builtin_shufflevector from version 12 on.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

// The sum of a register's lanes: its halves are added until one lane is left.
#ifdef SHUFFLES
template <typename T, typename Register, size_t... kLane>
INLINE T SumLanes(const Register& lanes, std::index_sequence<kLane...>) {
  constexpr size_t kHalf = sizeof...(kLane);
  if constexpr (kHalf == 1) {
    return lanes[0] + lanes[1];
  } else {
    return SumLanes<T>(__builtin_shufflevector(lanes, lanes, kLane...) +
                           __builtin_shufflevector(lanes, lanes, (kLane + kHalf)...),
                       std::make_index_sequence<kHalf / 2>());
  }
}
#else
template <typename T, typename Register, size_t... kLane>
INLINE T SumLanes(const Register& lanes, std::index_sequence<kLane...>) {
  T values[2 * sizeof...(kLane)];
  std::memcpy(values, &lanes, sizeof lanes);
  for (int half = sizeof...(kLane); half > 0; half /= 2)
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
}
#endif

// A panel is 64 bytes of columns, held in as many registers as the instruction set needs for them.
// The sums of kRows rows by kPanels panels, one row of weights and a broadcast value fit the
// register file. Two panels at once halve the broadcasts.
template <int kRegisterBytes, int kRowsAtOnce, int kPanelsAtOnce>
struct InstructionSet {
  static constexpr int kRows = kRowsAtOnce, kPanels = kPanelsAtOnce;

  // kCount panels side by side.
  template <typename T, int kCount = 1>
  struct Panel {
    typedef T Register __attribute__((vector_size(kRegisterBytes)));
    static constexpr int kRegisters = kCount * 64 / kRegisterBytes;
    static constexpr int kLanes = kRegisterBytes / sizeof(T);
    Register part[kRegisters];

    static INLINE Panel Zero() {
      Panel zero;
#pragma GCC unroll 8
      for (int i = 0; i < kRegisters; ++i) zero.part[i] = Register{};
      return zero;
    }
    static INLINE Panel Load(const T* source) {
      Panel panel;
#pragma GCC unroll 8
      for (int i = 0; i < kRegisters; ++i)
        std::memcpy(&panel.part[i], source + i * kLanes, kRegisterBytes);
      return panel;
    }
    INLINE void AddProduct(T scalar, const Panel& other) {
#pragma GCC unroll 8
      for (int i = 0; i < kRegisters; ++i) part[i] += scalar * other.part[i];
    }
    // The products with another panel, folded onto one register; Sum adds up its lanes.
    INLINE Register Products(const Panel& other) const {
      Register products = part[0] * other.part[0];
#pragma GCC unroll 8
      for (int i = 1; i < kRegisters; ++i) products += part[i] * other.part[i];
      return products;
    }
    static INLINE T Sum(const Register& lanes) {
      return SumLanes<T>(lanes, std::make_index_sequence<kLanes / 2>());
    }
    INLINE void Spill(T* target) const {
#pragma GCC unroll 8
      for (int i = 0; i < kRegisters; ++i)
        std::memcpy(target + i * kLanes, &part[i], kRegisterBytes);
    }
  };
};

// Columns of kCount panels.
template <typename T, int kCount = 1>
constexpr int64_t kPanelWidth = kCount * 64 / sizeof(T);

// Copies `width` values, fewer than 2 kHalf, in a few moves of known size.
template <int64_t kHalf, typename T>
INLINE void CopyFew(const T* source, int64_t width, T* target) {
#pragma GCC unroll 5
  for (int64_t size = kHalf; size > 0; size /= 2) {
    if (width & size) {
      std::memcpy(target, source, size * sizeof(T));
      source += size;
      target += size;
    }
  }
}

// Stores a panel's first `width` columns.
template <typename T, typename Panel>
INLINE void Store(const Panel& panel, int64_t width, T* target) {
  constexpr int64_t kWidth = sizeof(Panel) / sizeof(T);
  if (width == kWidth) {
    panel.Spill(target);
    return;
  }
  T values[kWidth];
  panel.Spill(values);
  CopyFew<kWidth / 2>(values, width, target);
}

// The baseline of the architecture and, on x86-64, two more.
#if defined(__x86_64__)
using Baseline = InstructionSet<16, 2, 1>;
using Avx2 = InstructionSet<32, 6, 1>;
using Avx512 = InstructionSet<64, 12, 2>;
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
using Baseline = InstructionSet<16, 5, 1>;
#endif

// Copies `width` columns of a matrix into rows of kWidth, zeros behind.
template <int64_t kWidth, typename T>
INLINE void Pack(const T* source, int64_t rows, int64_t stride, int64_t width, T* panel) {
  for (int64_t r = 0; r < rows; ++r, source += stride, panel += kWidth) {
    if (width == kWidth) {
      std::memcpy(panel, source, kWidth * sizeof(T));
    } else {
      std::memset(panel, 0, kWidth * sizeof(T));
      CopyFew<kWidth / 2>(source, width, panel);
    }
  }
}

#ifdef SHUFFLES
// A square of registers, transposed: each of log2(lanes) rounds interleaves one half with the
// other.
template <typename Register, size_t... kLane>
INLINE void Transpose(Register* square, std::index_sequence<kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  Register next[kLanes];
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const Register& low = square[i];
      const Register& high = square[i + kLanes / 2];
      next[2 * i] = __builtin_shufflevector(low, high, (kLane / 2 + kLane % 2 * kLanes)...);
      next[2 * i + 1] =
          __builtin_shufflevector(low, high, ((kLane + kLanes) / 2 + kLane % 2 * kLanes)...);
    }
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
}
#endif

// The same of the transpose: `width` rows of a matrix become columns.
template <typename Isa, int64_t kWidth, typename T>
INLINE void PackTransposed(const T* source, int64_t columns, int64_t stride, int64_t width,
                           T* panel) {
  int64_t c = 0;
#ifdef SHUFFLES
  using Register = typename Isa::template Panel<T>::Register;
  constexpr int kLanes = Isa::template Panel<T>::kLanes;
  for (; width == kWidth && c + kLanes <= columns; c += kLanes)
    for (int64_t first = 0; first < width; first += kLanes) {
      Register square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        std::memcpy(&square[i], source + (first + i) * stride + c, sizeof(Register));
      Transpose(square, std::make_index_sequence<kLanes>());
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        std::memcpy(panel + (c + i) * kWidth + first, &square[i], sizeof(Register));
    }
#endif
  for (; c < columns; ++c) {
    T* const row = panel + c * kWidth;
    for (int64_t i = 0; i < width; ++i) row[i] = source[i * stride + c];
    for (int64_t i = width; i < kWidth; ++i) row[i] = 0;
  }
}

// Calls body(P, first, width) for the panels that `columns` columns take, P of them at once, a
// compile-time number: kPanels, and two or one for what is left.
template <int kPanels, typename T, typename Body>
INLINE void Panels(int64_t columns, const Body& body) {
  int64_t first = 0;
  while (first < columns) {
    const int64_t left = columns - first;
    const auto next = [&](auto panels) INLINE_LAMBDA {
      constexpr int64_t kWidth = kPanelWidth<T, decltype(panels)::value>;
      body(panels, first, std::min(left, kWidth));
      first += kWidth;
    };
    if (kPanels > 2 && left >= kPanelWidth<T, kPanels>) {
      next(std::integral_constant<int, kPanels>{});
    } else if (kPanels > 1 && left > kPanelWidth<T>) {
      next(std::integral_constant<int, std::min(kPanels, 2)>{});
    } else {
      next(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace drconv
