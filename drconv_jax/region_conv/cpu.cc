// The region convolution and the mixing of its filters on a CPU, forward and backward, as XLA FFI
// handlers.
//
// For every sample, positions are listed region by region. The rows of one region (each row is a
// window of x) then meet that region's filter in a register-blocked product: a few rows by one to
// four panels of 64 bytes of output channels. No position is computed for a region it did not choose,
// and no window is copied: rows are read where they lie, tap by tap.
//
// Backward, with dy the output's cotangent:
//   scores[p, j] = <dy[p], (W_j * x)[p]>   the forward product again, folded onto dy in registers;
//                                          for the chosen region it is <dy[p], y[p]>.
//   dx           = the chosen filter's transpose applied to dy, scattered tap by tap.
//   dW_j         = sum over region j's rows of x[window of p] dy[p]^T.
//
// Where nothing is differentiated, filters need not exist as arrays: a few of them at a time are mixed
// from their bank, into a buffer that stays in a cache, and used at once.
//
// Every result is a sum in an order that depends on the shapes alone, never on the threads.

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

// ---------------------------------------------------------------------------------------------
// Values: storage types, and the types they are computed in.

struct BFloat16 {
  uint16_t bits;
};

INLINE float Widen(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
INLINE float Widen(float value) { return value; }
INLINE double Widen(double value) { return value; }

INLINE void Narrow(float value, BFloat16* result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    result->bits = static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN stays NaN
  } else {
    result->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to even
  }
}
INLINE void Narrow(float value, float* result) { *result = value; }
INLINE void Narrow(double value, double* result) { *result = value; }

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

// A panel is 64 bytes of columns, held in as many registers as the instruction set needs for them;
// with kRows rows of kPanels panels, sums, one row of weights and a broadcast value fit the register
// file. Two panels at once halve the broadcasts.
template <int kRegisterBytes, int kRowsAtOnce, int kPanelsAtOnce>
struct InstructionSet {
  static constexpr int kRows = kRowsAtOnce, kPanels = kPanelsAtOnce;
  template <typename T, int kCount = 1>  // kCount panels side by side
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

// Code is compiled for the baseline of its architecture and, on x86-64, again for AVX2 and for
// AVX-512; Workers picks by the processor it runs on. All code below a task is inlined into it.
#if defined(__x86_64__)
using Baseline = InstructionSet<16, 2, 1>;
using Avx2 = InstructionSet<32, 6, 1>;
using Avx512 = InstructionSet<64, 12, 2>;
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
using Baseline = InstructionSet<16, 5, 1>;
#endif

// ---------------------------------------------------------------------------------------------
// Shapes.

struct Shape {
  int64_t batch, in, features, regions, groups;
  std::array<int64_t, 3> spatial, out, kernel, strides, low, dilation;
  int64_t positions, in_positions, taps, in_per_group, features_per_group;

  int64_t filter_size() const { return taps * in_per_group * features; }
};

// offsets[tap * positions + p]: the input position under that tap, or -1 where padding lies.
std::vector<int32_t> WindowOffsets(const Shape& s) {
  std::vector<int32_t> offsets(s.taps * s.positions);
  int32_t* next = offsets.data();
  for (int64_t a = 0; a < s.kernel[0]; ++a)
    for (int64_t b = 0; b < s.kernel[1]; ++b)
      for (int64_t c = 0; c < s.kernel[2]; ++c)
        for (int64_t i = 0; i < s.out[0]; ++i)
          for (int64_t j = 0; j < s.out[1]; ++j)
            for (int64_t k = 0; k < s.out[2]; ++k) {
              int64_t at[3] = {i * s.strides[0] - s.low[0] + a * s.dilation[0],
                               j * s.strides[1] - s.low[1] + b * s.dilation[1],
                               k * s.strides[2] - s.low[2] + c * s.dilation[2]};
              bool inside = true;
              for (int d = 0; d < 3; ++d) inside &= at[d] >= 0 && at[d] < s.spatial[d];
              *next++ = inside ? static_cast<int32_t>(
                                     (at[0] * s.spatial[1] + at[1]) * s.spatial[2] + at[2])
                               : -1;
            }
  return offsets;
}

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
// the last, kBehind more are there to be read, so that whoever looks ahead need not look where.
struct Regions {
  static constexpr int64_t kBehind = 16;
  std::vector<int32_t> order, first;

  template <typename G>
  INLINE void Sort(const G* guide, int64_t positions, int64_t regions) {
    std::vector<int32_t> region(positions);
    order.assign(positions + kBehind, 0);
    first.assign(regions + 1, 0);
    FindRegions(guide, positions, regions, region.data());
    for (int64_t p = 0; p < positions; ++p) ++first[region[p] + 1];
    for (int64_t j = 0; j < regions; ++j) first[j + 1] += first[j];
    std::vector<int32_t> next(first.begin(), first.end() - 1);
    for (int64_t p = 0; p < positions; ++p) order[next[region[p]]++] = static_cast<int32_t>(p);
  }
};

// ---------------------------------------------------------------------------------------------
// Threads: XLA's own, with the caller working too, so that a busy pool can delay but never block.

template <typename Task>
void RunBaseline(const Task& task, int64_t number) {
  task.template Run<Baseline>(number);
}
#if defined(__x86_64__)
template <typename Task>
TARGET_AVX2 void RunAvx2(const Task& task, int64_t number) {
  task.template Run<Avx2>(number);
}
template <typename Task>
TARGET_AVX512 void RunAvx512(const Task& task, int64_t number) {
  task.template Run<Avx512>(number);
}
#endif

template <typename Task>
auto BestFor(const Task&) -> void (*)(const Task&, int64_t) {
#if defined(__x86_64__)
  if (std::is_same_v<typename Task::Value, double>) return RunBaseline<Task>;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return RunAvx512<Task>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return RunAvx2<Task>;
#endif
  return RunBaseline<Task>;
}

class Workers {
 public:
  using Job = std::function<void()>;

  explicit Workers(ffi::ThreadPool pool)
      : Workers(pool.num_threads(), [pool](Job job) mutable { pool.Schedule(std::move(job)); }) {}
  Workers(int64_t threads, std::function<void(Job)> schedule)
      : threads_(std::max<int64_t>(1, threads)), schedule_(std::move(schedule)) {}

  int64_t threads() const { return threads_; }

  // Runs task.Run(0), ..., task.Run(count - 1).
  template <typename Task>
  void For(int64_t count, const Task& task) {
    if (count <= 0) return;
    struct State {
      std::atomic<int64_t> next{0};
      int64_t done = 0;
      std::mutex mutex;
      std::condition_variable all_done;
    };
    auto state = std::make_shared<State>();
    // `task` outlives its use: this call returns only when all is done, and a helper that starts
    // later finds nothing left to do.
    auto work = [state, count, task = &task, run = BestFor(task)] {
      int64_t finished = 0;
      for (int64_t number; (number = state->next.fetch_add(1)) < count; ++finished)
        run(*task, number);
      if (finished == 0) return;
      std::lock_guard<std::mutex> lock(state->mutex);
      state->done += finished;
      if (state->done == count) state->all_done.notify_all();
    };
    for (int64_t helper = 1; helper < std::min(count, threads_); ++helper) schedule_(work);
    work();
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_done.wait(lock, [&] { return state->done == count; });
  }

 private:
  int64_t threads_;
  std::function<void(Job)> schedule_;
};

// ---------------------------------------------------------------------------------------------
// The products.

// Copies `width` columns of a matrix into a panel of `kWidth`, zeros behind.
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
// A square of registers, transposed: each of log2(lanes) rounds interleaves one half with the other.
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

// The same for the transpose: `width` rows of a matrix become the panel's columns.
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

// Where the windows of some rows lie in one sample of x, for one group of its channels.
template <typename T>
struct Windows {
  const T* x;
  int64_t stride;  // values from one position to the next
  int64_t channels, taps;
  const int32_t* offsets;  // WindowOffsets, or null where row p is position p
  int64_t positions;
  const T* zeros;  // as many as there are channels: what lies in the padding

  INLINE const T* Row(int64_t tap, int64_t p) const {
    const int64_t at = offsets ? offsets[tap * positions + p] : p;
    return at < 0 ? zeros : x + at * stride;
  }
};

// Fetches memory to come, bit by bit while something else is computed. Filters are read once, in
// narrow columns, from arrays larger than any cache: no hardware would foresee it.
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

// Calls body(R, rows, count, coming) over `count` rows, R a compile-time number: whole blocks of
// kRows, then one in the smallest of four sizes that holds the rest. `rows` always has R entries,
// the last repeated where there are fewer; a row's arithmetic is the same whatever block it is in.
// `coming` are the rows behind these.
template <typename Isa, typename Body>
INLINE void Blocks(const int32_t* rows, int64_t count, const Body& body) {
  constexpr int kRows = Isa::kRows;
  constexpr int kSmall = (kRows + 3) / 4, kHalf = (kRows + 1) / 2, kLarge = (3 * kRows + 3) / 4;
  static_assert(kRows <= Regions::kBehind);
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

// Calls body(P, first, width) for the panels that `columns` columns take, P of them at once, a
// compile-time number: kPanels, and two or one for what is left.
template <int kPanels, typename T, typename Body>
INLINE void Panels(int64_t columns, const Body& body) {
  for (int64_t first = 0; first < columns;) {
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

// ---------------------------------------------------------------------------------------------
// One call's arrays, as every task reads them.

template <typename T>
struct Arrays {
  const Shape& shape;
  const T* x;
  const T* filters;
  const int32_t* offsets;  // null where every window is its own position
  const Regions* regions;  // one for every sample
  const T* zeros;
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
  // The filter that is likely needed next, fetched in about `steps` steps: of the next region or,
  // behind the last, of the sample that this thread will take. Of it, `bytes` from `offset` on.
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

// A sample's rows in `parts` about equal parts, so that a small batch feeds many threads.
struct Slice {
  int64_t sample, begin, end;
  Slice(int64_t number, int64_t parts, int64_t positions)
      : sample(number / parts),
        begin(number % parts * positions / parts),
        end((number % parts + 1) * positions / parts) {}
};

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
    std::unique_ptr<T[]> waiting(new T[(kFew + Isa::kRows) * (shape.features_per_group + 2 * kMost)]);
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
        Panels<Isa::kPanels, T>(shape.features_per_group, [&](auto panels, int64_t first,
                                                              int64_t width) INLINE_LAMBDA {
          constexpr int P = decltype(panels)::value;
          const int64_t column = g * shape.features_per_group + first;
          const Weights<T> weights =
              FilterPanel<kPanelWidth<T, P>>(shape, filter, column, width, buffer.get());
          Blocks<Isa>(order + begin, end - begin, [&](auto size, const int32_t* rows, int64_t count,
                                                      const int32_t* coming) INLINE_LAMBDA {
            constexpr int R = decltype(size)::value;
            typename Isa::template Panel<T, P> sums[R];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
              FetchToWrite<P>(y + rows[r] * shape.features + column);
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
  // in the order in which it lies, some of its rows against all its columns, while those that follow
  // are fetched; sums wait in a buffer meanwhile.
  template <typename Isa>
  INLINE void Stream(const Windows<T>& windows, const int32_t* rows, int64_t count,
                     const T* filter, T* waiting, T* y) const {
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
        Blocks<Isa>(rows, count, [&](auto size, const int32_t* rows, int64_t count,
                                     const int32_t* coming) INLINE_LAMBDA {
          constexpr int R = decltype(size)::value;
          // Half the rows leave registers for twice the panels.
          constexpr int kPanels = 2 * R <= Isa::kRows ? 2 * Isa::kPanels : Isa::kPanels;
          Panels<kPanels, T>(arrays.shape.features_per_group, [&](auto panels, int64_t first,
                                                                  int64_t width) INLINE_LAMBDA {
            using Panel = typename Isa::template Panel<T, decltype(panels)::value>;
            constexpr int64_t kWidth = kPanelWidth<T, decltype(panels)::value>;
            // The last panels end with the last column: they have some in common with those before.
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
        Panels<Isa::kPanels, T>(shape.features_per_group, [&](auto panels, int64_t first,
                                                              int64_t width) INLINE_LAMBDA {
          using Panel = typename Isa::template Panel<T, decltype(panels)::value>;
          constexpr int64_t kWidth = kPanelWidth<T, decltype(panels)::value>;
          const int64_t column = g * shape.features_per_group + first;
          // Panel by panel, products with dy gather in a register for each row; its lanes are added
          // up with the last.
          const auto gather = [&](int64_t row, const Panel& values) INLINE_LAMBDA {
            const T* const cotangents =
                width == kMost ? dy + order[row] * shape.features + column
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
        shape.features, shape.features_per_group, 1, nullptr, shape.positions, nullptr};
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
          Pack<kPanelWidth<T>>(
              dy + rows[i] * shape.features + g * shape.features_per_group + first, 1, 0, width,
              panel);
      });
      for (int64_t tap = 0; tap < shape.taps; ++tap) {
        Blocks<Isa>(channels.data(), shape.in_per_group,
                    [&](auto size, const int32_t* channel, int64_t channel_count, const int32_t*)
                        INLINE_LAMBDA {
          constexpr int R = decltype(size)::value;
          for (int64_t i = 0; i < count; ++i) {
            const T* row = windows.Row(tap, rows[i]);
            __builtin_prefetch(windows.Row(tap, rows[i + Regions::kBehind / 2]) + channel[0]);
            if (channel_count == R) {  // they are neighbours
              std::memcpy(&values[i * R], row + channel[0], R * sizeof(T));
            } else {
              for (int r = 0; r < R; ++r) values[i * R + r] = row[channel[r]];
            }
          }
          Panels<1, T>(shape.features_per_group, [&](auto, int64_t first, int64_t width) INLINE_LAMBDA {
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

// The small jobs, for one sample: sorting, and copies between storage and computing types.
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

template <typename From, typename To>
struct ConvertTask {
  using Value = To;
  int64_t size;
  const From* from;
  To* to;

  template <typename Isa>
  INLINE void Run(int64_t sample) const {
    for (int64_t i = sample * size; i < (sample + 1) * size; ++i) Narrow(Widen(from[i]), to + i);
  }
};

// Fresh memory costs a fault for every page that is first written, which for the filters' gradient
// can take longer than its arithmetic: where the system lets a program choose, pages are large.
constexpr size_t kLargePage = 2 << 20;

void PreferLargePages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (start + bytes) / kLargePage * kLargePage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// A call's own memory, not initialized.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size = 0) {
    if (size == 0) return;
    // What is smaller than a large page shall not take one.
    const size_t align = size * sizeof(T) < kLargePage ? 64 : kLargePage;
    const size_t bytes = (size * sizeof(T) + align - 1) / align * align;
    data_.reset(static_cast<T*>(std::aligned_alloc(align, bytes)));
    if (!data_) throw std::bad_alloc();
    PreferLargePages(data_.get(), bytes);
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T[], Free> data_;
};

// An argument in its computing type: itself, or a copy.
template <typename S, typename T>
class Widened {
 public:
  Widened(Workers& workers, const void* source, int64_t batch, int64_t size) {
    if constexpr (std::is_same_v<S, T>) {
      data_ = static_cast<const T*>(source);
    } else {
      copy_ = Scratch<T>(batch * size);
      workers.For(batch, ConvertTask<S, T>{size, static_cast<const S*>(source), copy_.data()});
      data_ = copy_.data();
    }
  }
  const T* data() const { return data_; }

 private:
  Scratch<T> copy_;
  const T* data_;
};

// A result in its computing type: itself, or a copy that Finish rounds into it.
template <typename S, typename T>
class Narrowed {
 public:
  Narrowed(void* target, int64_t batch, int64_t size)
      : target_(static_cast<S*>(target)), batch_(batch), size_(size) {
    PreferLargePages(target, batch * size * sizeof(S));
    if constexpr (!std::is_same_v<S, T>) {
      copy_ = Scratch<T>(batch * size);
    }
  }
  T* data() const {
    if constexpr (std::is_same_v<S, T>) {
      return target_;
    } else {
      return copy_.data();
    }
  }
  void Finish(Workers& workers) const {
    if constexpr (!std::is_same_v<S, T>)
      workers.For(batch_, ConvertTask<T, S>{size_, copy_.data(), target_});
  }

 private:
  S* target_;
  int64_t batch_, size_;
  Scratch<T> copy_;
};

// ---------------------------------------------------------------------------------------------
// Mixing: filters[b, r, t] = bias[r] + sum over n of weights[b, t, r, n] * bank[r, n], rows of
// `size` values. The filters of all samples are far larger than the banks, so work goes by region
// and by chunk of a row: the bank's chunk stays in cache while every sample's chunk passes once.

struct MixShape {
  int64_t batch, taps, regions, n, size;
  static constexpr int64_t kPanels = 16;  // a chunk, in panels

  int64_t rows() const { return batch * taps; }
  template <typename T>
  int64_t chunks() const {
    return (size + kPanels * kPanelWidth<T> - 1) / (kPanels * kPanelWidth<T>);
  }
  // Rows that make one filter of the region convolution: its taps, or it is one row.
  int64_t pieces(const Shape& shape) const { return taps * regions / shape.regions; }
  int64_t WeightsAt(int64_t row, int64_t region) const { return (row * regions + region) * n; }
  int64_t FilterAt(int64_t row, int64_t region) const {
    return ((row / taps * regions + region) * taps + row % taps) * size;
  }
};

// One region's chunk of its bank, behind it that of its bias (or zeros), zeros where the row has
// ended.
template <typename T>
struct BankChunk {
  int64_t region, first, panels;
  std::unique_ptr<T[]> values;

  BankChunk(const MixShape& shape, int64_t number, const T* bank, const T* bias)
      : region(number / shape.chunks<T>()),
        first(number % shape.chunks<T>() * MixShape::kPanels * kPanelWidth<T>),
        panels(std::min(MixShape::kPanels,
                        (shape.size - first + kPanelWidth<T> - 1) / kPanelWidth<T>)),
        values(new T[(shape.n + 1) * MixShape::kPanels * kPanelWidth<T>]()) {
    for (int64_t n = 0; n < shape.n + (bias != nullptr); ++n) {
      const T* source =
          n < shape.n ? bank + (region * shape.n + n) * shape.size : bias + region * shape.size;
      std::memcpy(values.get() + n * MixShape::kPanels * kPanelWidth<T>, source + first,
                  std::min(panels * kPanelWidth<T>, shape.size - first) * sizeof(T));
    }
  }
  INLINE const T* At(int64_t n, int64_t panel) const {
    return values.get() + (n * MixShape::kPanels + panel) * kPanelWidth<T>;
  }
};

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
    std::vector<int32_t> all(shape.rows());
    std::iota(all.begin(), all.end(), 0);
    Blocks<Isa>(all.data(), shape.rows(), [&](auto block, const int32_t* rows, int64_t count, const int32_t* coming)
                                              INLINE_LAMBDA {
      constexpr int R = decltype(block)::value;
      const T* weight[R];
      T* filter[R];
      for (int r = 0; r < R; ++r) {
        weight[r] = weights + shape.WeightsAt(rows[r], chunk.region);
        filter[r] = filters + shape.FilterAt(rows[r], chunk.region) + chunk.first;
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

// The gradients of a chunk of one region's bank and bias, and the chunk's part in those of the
// weights: parts[chunk, row, region, n].
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
  bool more;  // dbank and dbias hold the sums over rows before these

  template <typename Isa>
  INLINE void Run(int64_t number) const {
    using Panel = typename Isa::template Panel<T>;
    constexpr int64_t kWidth = kPanelWidth<T>;
    const BankChunk<T> chunk(shape, number, bank, nullptr);
    const int64_t rows = shape.rows();
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
    T* const part = parts + number % shape.chunks<T>() * rows * shape.regions * shape.n;
    for (int64_t row = 0; row < rows; ++row) {
      const T* const cotangent = cotangents + shape.FilterAt(row, chunk.region);
      const char* const next = reinterpret_cast<const char*>(
          cotangents + shape.FilterAt(std::min(row + 2, rows - 1), chunk.region));
      for (int64_t p = 0; p < chunk.panels; ++p) __builtin_prefetch(next + 64 * p);
      Blocks<Isa>(all.data(), shape.n, [&](auto block, const int32_t* which, int64_t count,
                                           const int32_t*) INLINE_LAMBDA {
        constexpr int R = decltype(block)::value;
        typename Panel::Register sums[R] = {};
        for (int64_t p = 0; p < chunk.panels; ++p) {
          const Panel values = load(cotangent + p * kWidth, width_of(p));
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) sums[r] += values.Products(Panel::Load(chunk.At(which[r], p)));
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
          part[shape.WeightsAt(row, chunk.region) + which[r]] = Panel::Sum(sums[r]);
      });
    }

    // Every row's weights, a one behind them, the bias's weight, and room for a block to end in.
    const int64_t ones = shape.n, stride = shape.n + 1 + Isa::kRows;
    std::unique_ptr<T[]> weight(new T[rows * stride]());
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(weights + shape.WeightsAt(row, chunk.region), shape.n, &weight[row * stride]);
      weight[row * stride + ones] = 1;
    }
    for (int64_t p = 0; p < chunk.panels; ++p) {
      Blocks<Isa>(all.data(), shape.n + 1, [&](auto block, const int32_t* which, int64_t count,
                                               const int32_t*) INLINE_LAMBDA {
        constexpr int R = decltype(block)::value;
        const auto target = [&](int64_t n) INLINE_LAMBDA {
          T* const gradient = n == ones ? dbias + chunk.region * shape.size
                                        : dbank + (chunk.region * shape.n + n) * shape.size;
          return gradient + chunk.first + p * kWidth;
        };
        Panel sums[R], done[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
          sums[r] = more ? load(target(which[r]), width_of(p)) : Panel::Zero();
        const T* scalars = &weight[which[0]];
        for (int64_t row = 0; row < rows; ++row, scalars += stride) {
          const Panel values =
              load(cotangents + shape.FilterAt(row, chunk.region) + p * kWidth, width_of(p));
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) sums[r].AddProduct(scalars[r], values);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) done[r] = sums[r];
        for (int64_t r = 0; r < count; ++r) Store(done[r], width_of(p), target(which[r]));
      });
    }
  }
};

// dweights of one row: its parts, chunk by chunk.
template <typename T>
struct SumPartsTask {
  using Value = T;
  const MixShape& shape;
  const T* parts;
  T* dweights;

  template <typename Isa>
  INLINE void Run(int64_t row) const {
    const int64_t size = shape.regions * shape.n, all = shape.rows() * size;
    std::fill_n(dweights + row * size, size, T(0));
    for (int64_t chunk = 0; chunk < shape.chunks<T>(); ++chunk)
      for (int64_t i = row * size; i < (row + 1) * size; ++i)
        dweights[i] += parts[chunk * all + i];
  }
};

// y from filters that never exist as an array, for some of the samples and one strip of a group's
// columns. A few filters' panels are mixed into a buffer that stays in a cache, and used at once.
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
    const int64_t pieces = mixture.pieces(shape), height = mixture.size / shape.features;
    const int64_t sharing = shape.regions / mixture.regions;  // regions of one bank
    const int64_t at_once =
        std::clamp<int64_t>(kCached / (pieces * height * kMost * sizeof(T)), 1,
                            std::max<int64_t>(1, Isa::kRows / pieces));
    std::unique_ptr<T[]> banks(new T[height * (1 + mixture.n) * kMost]);
    std::unique_ptr<T[]> scalars(new T[mixture.n * Isa::kRows]);
    std::unique_ptr<T[]> filters(new T[(at_once * pieces + Isa::kRows) * height * kMost]);
    std::vector<Filter> chosen;
    std::vector<int32_t> rows;
    for (int64_t r = 0; r < mixture.regions; ++r) {
      chosen.clear();
      for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
        const std::vector<int32_t>& first = arrays.regions[sample].first;
        for (int64_t j = r * sharing; j < (r + 1) * sharing; ++j)
          if (first[j] < first[j + 1]) chosen.push_back({sample, j});
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
                n < 0 ? bias + r * mixture.size : bank + (r * mixture.n + n) * mixture.size;
            Pack<kWidth>(source + i * shape.features + column, 1, 0, width, packed);
          }
        for (size_t begin = 0; begin < chosen.size(); begin += at_once) {
          const size_t end = std::min<size_t>(begin + at_once, chosen.size());
          rows.clear();
          for (size_t c = begin; c < end; ++c)
            for (int64_t piece = 0; piece < pieces; ++piece)
              rows.push_back(chosen[c].sample * mixture.taps +
                             (chosen[c].region - r * sharing) * pieces + piece);
          MixPanels<Isa, Panel>(rows, r, height, banks.get(), scalars.get(), filters.get());
          const T* filter = filters.get();
          for (size_t c = begin; c < end; ++c, filter += pieces * height * kWidth)
            Convolve<Isa, Panel>(chosen[c], g, filter, width, column);
        }
      });
    }
  }

 private:
  struct Filter {
    int64_t sample, region;
  };

  // Panels of the mixtures in `rows`, one behind the other. Those of the last block may be followed
  // by copies of its last one.
  template <typename Isa, typename Panel>
  INLINE void MixPanels(const std::vector<int32_t>& rows, int64_t region, int64_t height,
                        const T* banks, T* scalars, T* panel) const {
    constexpr int64_t kWidth = sizeof(Panel) / sizeof(T);
    Blocks<Isa>(rows.data(), rows.size(), [&](auto size, const int32_t* row, int64_t count,
                                              const int32_t*) INLINE_LAMBDA {
      constexpr int R = decltype(size)::value;
      for (int64_t n = 0; n < mixture.n; ++n)
        for (int r = 0; r < R; ++r)
          scalars[n * R + r] = weights[mixture.WeightsAt(row[r], region) + n];
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

template <typename S, typename T>
void Mix(const MixShape& shape, Workers& workers, const void* weights, const void* bank,
         const void* bias, void* filters) {
  const Widened<S, T> w(workers, weights, shape.rows(), shape.regions * shape.n);
  const Widened<S, T> values(workers, bank, shape.regions * shape.n, shape.size);
  const Widened<S, T> start(workers, bias, shape.regions, shape.size);
  Narrowed<S, T> result(filters, shape.rows() * shape.regions, shape.size);
  workers.For(shape.regions * shape.chunks<T>(),
              MixTask<T>{shape, w.data(), values.data(), start.data(), result.data()});
  result.Finish(workers);
}

template <typename T>
void MixGradients(const MixShape& shape, Workers& workers, const T* weights, const T* bank,
                  const T* dfilters, T* dweights, T* dbank, T* dbias, bool more) {
  std::unique_ptr<T[]> parts(
      new T[shape.chunks<T>() * shape.rows() * shape.regions * shape.n]);
  workers.For(shape.regions * shape.chunks<T>(),
              MixGradientTask<T>{shape, weights, bank, dfilters, dbank, dbias, parts.get(), more});
  workers.For(shape.rows(), SumPartsTask<T>{shape, parts.get(), dweights});
}

template <typename S, typename T>
void MixBackward(const MixShape& shape, Workers& workers, const void* weights, const void* bank,
                 const void* dfilters, void* dweights, void* dbank, void* dbias) {
  const Widened<S, T> w(workers, weights, shape.rows(), shape.regions * shape.n);
  const Widened<S, T> values(workers, bank, shape.regions * shape.n, shape.size);
  const Widened<S, T> cotangent(workers, dfilters, shape.rows() * shape.regions, shape.size);
  Narrowed<S, T> weight_gradient(dweights, shape.rows(), shape.regions * shape.n);
  Narrowed<S, T> bank_gradient(dbank, shape.regions * shape.n, shape.size);
  Narrowed<S, T> bias_gradient(dbias, shape.regions, shape.size);
  MixGradients(shape, workers, w.data(), values.data(), cotangent.data(), weight_gradient.data(),
               bank_gradient.data(), bias_gradient.data(), false);
  weight_gradient.Finish(workers);
  bank_gradient.Finish(workers);
  bias_gradient.Finish(workers);
}

// ---------------------------------------------------------------------------------------------
// The handlers.

using Numbers = ffi::Span<const int64_t>;

// x (batch, *spatial, in) and guide (batch, *out, m), with one to three spatial dimensions; fewer than
// three are the last ones.
ffi::ErrorOr<Shape> ReadShape(ffi::AnyBuffer x, ffi::AnyBuffer guide, Numbers kernel,
                              int64_t features, Numbers strides, Numbers low, Numbers dilation,
                              int64_t groups) {
  const auto xs = x.dimensions(), gs = guide.dimensions();
  const size_t rank = strides.size();
  if (rank < 1 || rank > 3 || xs.size() != rank + 2 || kernel.size() != rank ||
      gs.size() != rank + 2 || low.size() != rank || dilation.size() != rank ||
      (guide.element_type() != ffi::DataType::F32 && guide.element_type() != ffi::DataType::F64))
    return ffi::Unexpected(ffi::Error::InvalidArgument("region_conv: malformed call"));
  Shape s;
  s.batch = xs[0];
  s.in = xs[rank + 1];
  s.regions = gs[rank + 1];
  s.features = features;
  s.groups = groups;
  s.in_per_group = s.in / groups;
  s.features_per_group = s.features / groups;
  s.spatial = s.kernel = s.out = s.strides = s.dilation = {1, 1, 1};
  s.low = {0, 0, 0};
  s.positions = s.in_positions = s.taps = 1;
  for (size_t i = 0, d = 3 - rank; i < rank; ++i, ++d) {
    s.spatial[d] = xs[1 + i];
    s.kernel[d] = kernel[i];
    s.out[d] = gs[1 + i];
    s.strides[d] = strides[i];
    s.low[d] = low[i];
    s.dilation[d] = dilation[i];
    s.positions *= s.out[d];
    s.in_positions *= s.spatial[d];
    s.taps *= s.kernel[d];
  }
  return s;
}

// filters (batch, m, *kernel, in / groups, features).
ffi::ErrorOr<Shape> ReadShape(ffi::AnyBuffer x, ffi::AnyBuffer filters, ffi::AnyBuffer guide,
                              Numbers strides, Numbers low, Numbers dilation, int64_t groups) {
  const auto ws = filters.dimensions();
  const size_t rank = strides.size();
  const auto xs = x.dimensions(), gs = guide.dimensions();
  if (ws.size() != rank + 4 || xs.size() != rank + 2 || gs.size() != rank + 2 || groups < 1 ||
      gs[rank + 1] != ws[1] || xs[rank + 1] != groups * ws[rank + 2])
    return ffi::Unexpected(ffi::Error::InvalidArgument("region_conv: malformed call"));
  return ReadShape(x, guide, Numbers(ws.begin() + 2, rank), ws[rank + 3], strides, low, dilation,
                   groups);
}

bool Pointwise(const Shape& s) {
  for (int d = 0; d < 3; ++d)
    if (s.kernel[d] != 1 || s.strides[d] != 1 || s.low[d] != 0 || s.out[d] != s.spatial[d])
      return false;
  return true;
}

// What both directions prepare: the windows' offsets, and every sample's regions.
template <typename S, typename T>
struct Prepared {
  Widened<S, T> x;
  std::vector<int32_t> offsets;
  std::vector<Regions> regions;
  std::vector<T> zeros;
  Arrays<T> arrays;

  Prepared(const Shape& shape, Workers& workers, const void* x_values, const T* filters,
           ffi::AnyBuffer guide)
      : x(workers, x_values, shape.batch, shape.in_positions * shape.in),
        offsets(Pointwise(shape) ? std::vector<int32_t>() : WindowOffsets(shape)),
        regions(shape.batch),
        zeros(shape.in_per_group),
        arrays{shape,
               x.data(),
               filters,
               Pointwise(shape) ? nullptr : offsets.data(),
               regions.data(),
               zeros.data(),
               workers.threads()} {
    if (guide.element_type() == ffi::DataType::F64) {
      workers.For(shape.batch, SortTask<double>{shape, guide.typed_data<double>(), regions});
    } else {
      workers.For(shape.batch, SortTask<float>{shape, guide.typed_data<float>(), regions});
    }
  }
};

// Slices of a sample: enough for every thread, none of a few rows only.
int64_t SlicesOf(const Shape& shape, const Workers& workers) {
  const int64_t wanted = 4 * workers.threads();
  if (shape.batch == 0 || shape.batch >= wanted) return 1;
  return std::clamp<int64_t>(wanted / shape.batch, 1, std::max<int64_t>(1, shape.positions / 64));
}

template <typename S, typename T>
void Forward(const Shape& shape, Workers& workers, const void* x, const void* filters,
             ffi::AnyBuffer guide, void* y) {
  const Widened<S, T> all(workers, filters, shape.batch, shape.regions * shape.filter_size());
  const Prepared<S, T> call(shape, workers, x, all.data(), guide);
  Narrowed<S, T> output(y, shape.batch, shape.positions * shape.features);
  const int64_t slices = SlicesOf(shape, workers);
  workers.For(shape.batch * slices, ForwardTask<T>{call.arrays, slices, output.data()});
  output.Finish(workers);
}

template <typename T>
void Gradients(const Arrays<T>& arrays, Workers& workers, const T* y, const T* dy, T* dx,
               T* dfilters, T* scores) {
  const Shape& shape = arrays.shape;
  // Every filter meets all rows of a slice, which should stay in a core's second cache.
  constexpr int64_t kCached = 512 << 10;
  const int64_t slice = shape.in_positions * shape.in + shape.positions * shape.features;
  const int64_t slices = std::max(SlicesOf(shape, workers),
                                  std::min<int64_t>(slice * sizeof(T) / kCached, shape.positions / 64));
  workers.For(shape.batch * slices, ScoresTask<T>{arrays, slices, y, dy, scores});
  workers.For(shape.batch * shape.regions, FilterGradientTask<T>{arrays, dy, dfilters});
  constexpr int64_t kStrip = InputGradientTask<T>::kStrip;
  const int64_t strips = (shape.in_per_group + kStrip - 1) / kStrip;
  workers.For(shape.batch * shape.groups * strips, InputGradientTask<T>{arrays, strips, dy, dx});
}

template <typename S, typename T>
void Backward(const Shape& shape, Workers& workers, const void* x, const void* filters,
              ffi::AnyBuffer guide, const void* y, const void* dy, void* dx, void* dfilters,
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

template <typename S, typename T>
void MixedForward(const Shape& shape, const MixShape& mixture, Workers& workers, const void* x,
                  const void* weights, const void* bank, const void* bias, ffi::AnyBuffer guide,
                  void* y) {
  const Prepared<S, T> call(shape, workers, x, nullptr, guide);
  const Widened<S, T> w(workers, weights, mixture.rows(), mixture.regions * mixture.n);
  const Widened<S, T> values(workers, bank, mixture.regions * mixture.n, mixture.size);
  const Widened<S, T> start(workers, bias, mixture.regions, mixture.size);
  Narrowed<S, T> output(y, shape.batch, shape.positions * shape.features);
  constexpr int64_t kStrip = MixedForwardTask<T>::kStrip;
  const int64_t strips = (shape.features_per_group + kStrip - 1) / kStrip;
  const int64_t all_strips = strips * shape.groups;
  const int64_t slices = SlicesOf(shape, workers);
  if (all_strips * shape.batch < std::min(2 * workers.threads(), slices * shape.batch)) {
    // Few samples with few channels feed many threads by slices of their positions only.
    const Scratch<T> filters(mixture.rows() * mixture.regions * mixture.size);
    workers.For(mixture.regions * mixture.chunks<T>(),
                MixTask<T>{mixture, w.data(), values.data(), start.data(), filters.data()});
    Arrays<T> arrays = call.arrays;
    arrays.filters = filters.data();
    workers.For(shape.batch * slices, ForwardTask<T>{arrays, slices, output.data()});
  } else {
    // A bank is read once for every part of the batch: as few parts as feed the threads.
    const int64_t wanted = (4 * workers.threads() + all_strips - 1) / all_strips;
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, shape.batch));
    workers.For(parts * all_strips,
                MixedForwardTask<T>{call.arrays, mixture, parts, strips, w.data(), values.data(),
                                    start.data(), output.data()});
  }
  output.Finish(workers);
}

// Some samples at a time, whose filters and their gradients are mixed anew, used and done with while
// they are in a cache: `scratch` holds both for `at_once` samples.
template <typename S, typename T>
void MixedBackward(const Shape& shape, const MixShape& mixture, Workers& workers, const void* x,
                   const void* weights, const void* bank, const void* bias, ffi::AnyBuffer guide,
                   const void* y, const void* dy, void* dx, void* dweights, void* dbank,
                   void* dbias, void* scores, int64_t at_once, T* scratch) {
  const Prepared<S, T> call(shape, workers, x, nullptr, guide);
  const Widened<S, T> w(workers, weights, mixture.rows(), mixture.regions * mixture.n);
  const Widened<S, T> values(workers, bank, mixture.regions * mixture.n, mixture.size);
  const Widened<S, T> start(workers, bias, mixture.regions, mixture.size);
  const int64_t in_size = shape.in_positions * shape.in;
  const int64_t out_size = shape.positions * shape.features;
  const Widened<S, T> output(workers, y, shape.batch, out_size);
  const Widened<S, T> cotangent(workers, dy, shape.batch, out_size);
  Narrowed<S, T> input_gradient(dx, shape.batch, in_size);
  Narrowed<S, T> weight_gradient(dweights, mixture.rows(), mixture.regions * mixture.n);
  Narrowed<S, T> bank_gradient(dbank, mixture.regions * mixture.n, mixture.size);
  Narrowed<S, T> bias_gradient(dbias, mixture.regions, mixture.size);
  const int64_t filters_size = at_once * shape.regions * shape.filter_size();
  T* const filters = scratch;
  T* const dfilters = scratch + filters_size;
  PreferLargePages(scratch, 2 * filters_size * sizeof(T));
  bool more = false;
  for (int64_t begin = 0; begin < shape.batch; begin += at_once, more = true) {
    Shape some = shape;
    MixShape mixed = mixture;
    some.batch = mixed.batch = std::min(at_once, shape.batch - begin);
    Arrays<T> arrays{some,
                     call.arrays.x + begin * in_size,
                     filters,
                     call.arrays.offsets,
                     call.arrays.regions + begin,
                     call.arrays.zeros,
                     workers.threads()};
    const int64_t weights_at = mixture.WeightsAt(begin * mixture.taps, 0);
    workers.For(mixed.regions * mixed.chunks<T>(),
                MixTask<T>{mixed, w.data() + weights_at, values.data(), start.data(), filters});
    Gradients(arrays, workers, output.data() + begin * out_size, cotangent.data() + begin * out_size,
              input_gradient.data() + begin * in_size, dfilters,
              static_cast<T*>(scores) + begin * shape.positions * shape.regions);
    MixGradients(mixed, workers, w.data() + weights_at, values.data(), dfilters,
                 weight_gradient.data() + weights_at, bank_gradient.data(), bias_gradient.data(),
                 more);
  }
  if (!more) {  // an empty batch
    std::fill_n(bank_gradient.data(), mixture.regions * mixture.n * mixture.size, T(0));
    std::fill_n(bias_gradient.data(), mixture.regions * mixture.size, T(0));
  }
  input_gradient.Finish(workers);
  weight_gradient.Finish(workers);
  bank_gradient.Finish(workers);
  bias_gradient.Finish(workers);
}

template <typename Body>
ffi::Error ByType(ffi::DataType type, const Body& body) {
  switch (type) {
    case ffi::DataType::F32:
      body(float(), float());
      return ffi::Error::Success();
    case ffi::DataType::F64:
      body(double(), double());
      return ffi::Error::Success();
    case ffi::DataType::BF16:
      body(BFloat16(), float());
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("region_conv: values must be float32, float64 or bfloat16");
  }
}

ffi::Error ForwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer filters,
                          ffi::AnyBuffer guide, ffi::Result<ffi::AnyBuffer> y, Numbers strides,
                          Numbers low, Numbers dilation, int64_t groups) {
  auto shape = ReadShape(x, filters, guide, strides, low, dilation, groups);
  if (!shape.has_value()) return shape.error();
  Workers workers(pool);
  return ByType(x.element_type(), [&](auto s, auto t) {
    Forward<decltype(s), decltype(t)>(*shape, workers, x.untyped_data(), filters.untyped_data(),
                                      guide, y->untyped_data());
  });
}

ffi::Error BackwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer filters,
                           ffi::AnyBuffer guide, ffi::AnyBuffer y, ffi::AnyBuffer dy,
                           ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dfilters,
                           ffi::Result<ffi::AnyBuffer> scores, Numbers strides, Numbers low,
                           Numbers dilation, int64_t groups) {
  auto shape = ReadShape(x, filters, guide, strides, low, dilation, groups);
  if (!shape.has_value()) return shape.error();
  Workers workers(pool);
  return ByType(x.element_type(), [&](auto s, auto t) {
    Backward<decltype(s), decltype(t)>(*shape, workers, x.untyped_data(), filters.untyped_data(),
                                       guide, y.untyped_data(), dy.untyped_data(), dx->untyped_data(),
                                       dfilters->untyped_data(), scores->untyped_data());
  });
}

// weights (batch, taps, regions, n) and bank (regions, n, size).
ffi::ErrorOr<MixShape> ReadMixShape(ffi::AnyBuffer weights, ffi::AnyBuffer bank) {
  const auto ws = weights.dimensions(), bs = bank.dimensions();
  if (ws.size() != 4 || bs.size() != 3)
    return ffi::Unexpected(ffi::Error::InvalidArgument("mix: malformed call"));
  return MixShape{ws[0], ws[1], ws[2], ws[3], bs[2]};
}

// The same, that mix the filters of a region convolution.
ffi::ErrorOr<MixShape> ReadMixShape(ffi::AnyBuffer weights, ffi::AnyBuffer bank,
                                    const Shape& shape) {
  auto mixture = ReadMixShape(weights, bank);
  if (mixture.has_value() &&
      (mixture->batch != shape.batch || shape.regions % mixture->regions != 0 ||
       mixture->size % shape.features != 0 ||
       mixture->pieces(shape) * mixture->size != shape.filter_size()))
    return ffi::Unexpected(ffi::Error::InvalidArgument("mixed_region_conv: malformed call"));
  return mixture;
}

ffi::Error MixHandler(ffi::ThreadPool pool, ffi::AnyBuffer weights, ffi::AnyBuffer bank,
                      ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> filters) {
  auto shape = ReadMixShape(weights, bank);
  if (!shape.has_value()) return shape.error();
  Workers workers(pool);
  return ByType(weights.element_type(), [&](auto s, auto t) {
    Mix<decltype(s), decltype(t)>(*shape, workers, weights.untyped_data(), bank.untyped_data(),
                                  bias.untyped_data(), filters->untyped_data());
  });
}

ffi::Error MixedForwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                               ffi::AnyBuffer bank, ffi::AnyBuffer bias, ffi::AnyBuffer guide,
                               ffi::Result<ffi::AnyBuffer> y, Numbers kernel, Numbers strides,
                               Numbers low, Numbers dilation, int64_t groups) {
  auto shape = ReadShape(x, guide, kernel, y->dimensions().back(), strides, low, dilation, groups);
  if (!shape.has_value()) return shape.error();
  auto mixture = ReadMixShape(weights, bank, *shape);
  if (!mixture.has_value()) return mixture.error();
  Workers workers(pool);
  return ByType(x.element_type(), [&](auto s, auto t) {
    MixedForward<decltype(s), decltype(t)>(*shape, *mixture, workers, x.untyped_data(),
                                           weights.untyped_data(), bank.untyped_data(),
                                           bias.untyped_data(), guide, y->untyped_data());
  });
}

ffi::Error MixedBackwardHandler(
    ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer bank,
    ffi::AnyBuffer bias, ffi::AnyBuffer guide, ffi::AnyBuffer y, ffi::AnyBuffer dy,
    ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dweights,
    ffi::Result<ffi::AnyBuffer> dbank, ffi::Result<ffi::AnyBuffer> dbias,
    ffi::Result<ffi::AnyBuffer> scores, ffi::Result<ffi::AnyBuffer> scratch, Numbers kernel,
    Numbers strides, Numbers low, Numbers dilation, int64_t groups) {
  auto shape = ReadShape(x, guide, kernel, y.dimensions().back(), strides, low, dilation, groups);
  if (!shape.has_value()) return shape.error();
  auto mixture = ReadMixShape(weights, bank, *shape);
  if (!mixture.has_value()) return mixture.error();
  const auto ss = scratch->dimensions();  // (2, samples at once, size of their filters)
  if (ss.size() != 3 || ss[0] != 2 || ss[2] != shape->regions * shape->filter_size() ||
      (ss[1] < 1 && shape->batch > 0))
    return ffi::Error::InvalidArgument("mixed_region_conv: malformed call");
  Workers workers(pool);
  return ByType(x.element_type(), [&](auto s, auto t) {
    MixedBackward<decltype(s), decltype(t)>(
        *shape, *mixture, workers, x.untyped_data(), weights.untyped_data(), bank.untyped_data(),
        bias.untyped_data(), guide, y.untyped_data(), dy.untyped_data(), dx->untyped_data(),
        dweights->untyped_data(), dbank->untyped_data(), dbias->untyped_data(),
        scores->untyped_data(), ss[1], static_cast<decltype(t)*>(scratch->untyped_data()));
  });
}

ffi::Error MixBackwardHandler(ffi::ThreadPool pool, ffi::AnyBuffer weights, ffi::AnyBuffer bank,
                              ffi::AnyBuffer dfilters, ffi::Result<ffi::AnyBuffer> dweights,
                              ffi::Result<ffi::AnyBuffer> dbank,
                              ffi::Result<ffi::AnyBuffer> dbias) {
  auto shape = ReadMixShape(weights, bank);
  if (!shape.has_value()) return shape.error();
  Workers workers(pool);
  return ByType(weights.element_type(), [&](auto s, auto t) {
    MixBackward<decltype(s), decltype(t)>(
        *shape, workers, weights.untyped_data(), bank.untyped_data(), dfilters.untyped_data(),
        dweights->untyped_data(), dbank->untyped_data(), dbias->untyped_data());
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_mix, MixHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_mix_backward, MixBackwardHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_mixed_region_conv_forward, MixedForwardHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<Numbers>("kernel")
                                  .Attr<Numbers>("strides")
                                  .Attr<Numbers>("low")
                                  .Attr<Numbers>("dilation")
                                  .Attr<int64_t>("groups"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_mixed_region_conv_backward, MixedBackwardHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<Numbers>("kernel")
                                  .Attr<Numbers>("strides")
                                  .Attr<Numbers>("low")
                                  .Attr<Numbers>("dilation")
                                  .Attr<int64_t>("groups"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_region_conv_forward, ForwardHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<Numbers>("strides")
                                  .Attr<Numbers>("low")
                                  .Attr<Numbers>("dilation")
                                  .Attr<int64_t>("groups"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_region_conv_backward, BackwardHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<Numbers>("strides")
                                  .Attr<Numbers>("low")
                                  .Attr<Numbers>("dilation")
                                  .Attr<int64_t>("groups"));
