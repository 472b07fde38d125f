// Runs the native kernels over many drawn shapes, in arrays of the exact size, with guide features
// of random bytes, on one thread and on four. Built with a sanitizer (sanitize.sh) it fails at any
// access out of bounds and any race; by itself it fails where a result depends on the number of
// threads.
//
//   sanitize [rounds]
//   sanitize digests    prints digests of all results, to compare processors (arm64.sh)

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "drconv_jax/native/memory.h"
#include "drconv_jax/native/values.h"
#include "drconv_jax/native/workers.h"
#include "drconv_jax/region_conv/cpu/backward.h"
#include "drconv_jax/region_conv/cpu/forward.h"
#include "drconv_jax/region_conv/cpu/mixed.h"
#include "drconv_jax/region_conv/cpu/mixing.h"
#include "drconv_jax/region_conv/cpu/regions.h"
#include "drconv_jax/region_conv/cpu/shape.h"

namespace drconv {
namespace {

std::mt19937 random_bits(0);

int64_t Draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// As many values as asked for and not one more, so that the next byte is out of bounds.
template <typename T>
struct Values {
  int64_t size;
  std::unique_ptr<T[]> data;
  explicit Values(int64_t size) : size(size), data(new T[size]) {}

  // Between -2 and 2, the same numbers with any mathematical library.
  static Values Numbers(int64_t size) {
    Values values(size);
    for (int64_t i = 0; i < size; ++i) {
      const double drawn = static_cast<int32_t>(random_bits()) / 1073741824.0;
      if constexpr (std::is_same_v<T, double>) {
        values.data[i] = drawn;
      } else {
        Narrow(static_cast<float>(drawn), &values.data[i]);
      }
    }
    return values;
  }
  static Values Bytes(int64_t size) {
    Values values(size);
    auto* bytes = reinterpret_cast<unsigned char*>(values.data.get());
    for (size_t i = 0; i < size * sizeof(T); ++i) bytes[i] = random_bits();
    return values;
  }
  void* get() const { return data.get(); }
  bool operator==(const Values& other) const {
    return std::memcmp(get(), other.get(), size * sizeof(T)) == 0;
  }
};

// A thread for every job: the least orderly of pools.
struct Threads {
  std::vector<std::thread> running;
  Workers workers;
  explicit Threads(int64_t count)
      : workers(count, [this](Workers::Job job) { running.emplace_back(std::move(job)); }) {}
  ~Threads() {
    for (std::thread& thread : running) thread.join();
  }
};

bool print_digests = false;

// A sum in which every value counts for something else, and how large it could be. The values have
// the precision of S: what is computed from rounded values has no more, whatever its type.
template <typename S, typename T>
void PrintDigest(const char* what, const Values<T>& values) {
  double sum = 0, magnitude = 0;
  for (int64_t i = 0; i < values.size; ++i) {
    const double term = Widen(values.data[i]) * (1 + i % 7);
    sum += term;
    magnitude += std::abs(term);
  }
  std::printf("%s %d %.17g %.17g\n", what, static_cast<int>(sizeof(S)), sum, magnitude);
}

// Calls once(workers), which returns its results, on one thread and on four.
template <typename S, typename Once>
void SameOnAnyThreads(const char* what, const Once& once) {
  Threads one(1), four(4);
  const auto results = once(one.workers);
  if (print_digests)
    std::apply([&](const auto&... each) { (PrintDigest<S>(what, each), ...); }, results);
  if (results == once(four.workers)) return;
  std::printf("%s depends on the number of threads\n", what);
  std::exit(1);
}

Shape DrawShape() {
  Shape s{};
  s.batch = Draw(1, 6);
  s.groups = Draw(1, 3);
  s.in_per_group = Draw(1, 70);
  s.features_per_group = Draw(1, 70);
  s.in = s.groups * s.in_per_group;
  s.features = s.groups * s.features_per_group;
  s.regions = Draw(0, 4) ? Draw(1, 9) : 33;
  s.positions = s.in_positions = s.taps = 1;
  const bool pointwise = Draw(0, 1);
  for (int d = 0; d < 3; ++d) {
    s.spatial[d] = d == 0 ? Draw(1, 2) : Draw(1, 9);
    s.kernel[d] = pointwise ? 1 : Draw(1, 3);
    s.strides[d] = pointwise ? 1 : Draw(1, 3);
    s.dilation[d] = pointwise ? 1 : Draw(1, 2);
    s.low[d] = pointwise ? 0 : Draw(0, 2);
    s.out[d] = pointwise ? s.spatial[d] : Draw(1, 9);
    s.positions *= s.out[d];
    s.in_positions *= s.spatial[d];
    s.taps *= s.kernel[d];
  }
  return s;
}

template <typename S, typename T, typename G>
void RegionConvolution() {
  const Shape s = DrawShape();
  const auto x = Values<S>::Numbers(s.batch * s.in_positions * s.in);
  const auto filters = Values<S>::Numbers(s.batch * s.regions * s.filter_size());
  const auto dy = Values<S>::Numbers(s.batch * s.positions * s.features);
  const auto guide = Values<G>::Bytes(s.batch * s.positions * s.regions);
  SameOnAnyThreads<S>("region_conv", [&](Workers& workers) {
    Values<S> y(dy.size), dx(x.size), dfilters(filters.size);
    Values<T> scores(guide.size);
    Forward<S, T>(s, workers, x.get(), filters.get(), guide.data.get(), y.get());
    Backward<S, T>(s, workers, x.get(), filters.get(), guide.data.get(), y.get(), dy.get(),
                   dx.get(), dfilters.get(), scores.get());
    return std::make_tuple(std::move(y), std::move(dx), std::move(dfilters), std::move(scores));
  });
}

// Rows of any size, as no region convolution asks for them.
template <typename T>
void Mixing() {
  const int64_t regions = Draw(1, 9);
  const MixShape s{Draw(1, 5),  regions, Draw(1, 9), Draw(1, 17), Draw(0, 1) ? regions : 1,
                   Draw(1, 900)};
  const auto weights = Values<T>::Numbers(s.rows() * s.n);
  const auto bank = Values<T>::Numbers(s.banks * s.n * s.size);
  const auto bias = Values<T>::Numbers(s.banks * s.size);
  const auto dfilters = Values<T>::Numbers(s.rows() * s.size);
  SameOnAnyThreads<T>("mixing", [&](Workers& workers) {
    Values<T> filters(dfilters.size), dweights(weights.size), dbank(bank.size), dbias(bias.size);
    Mix(s, workers, weights.data.get(), bank.data.get(), bias.data.get(), filters.data.get());
    MixGradients(s, workers, weights.data.get(), bank.data.get(), dfilters.data.get(),
                 dweights.data.get(), dbank.data.get(), dbias.data.get(), false);
    return std::make_tuple(std::move(filters), std::move(dweights), std::move(dbank),
                           std::move(dbias));
  });
}

// Filters that are mixed on the way, whole or tap by tap, from one bank or one for every region.
// Where they are not rounded in between, results are those of mixing and convolving in turn.
template <typename S, typename T, typename G>
void MixedRegionConvolution() {
  const Shape s = DrawShape();
  const int64_t taps = Draw(0, 1) ? s.taps : 1;
  const MixShape m{s.batch,
                   s.regions,
                   taps,
                   Draw(1, Draw(0, 1) ? 3 : 17),
                   Draw(0, 1) ? s.regions : 1,
                   s.filter_size() / taps};
  const auto x = Values<S>::Numbers(s.batch * s.in_positions * s.in);
  const auto weights = Values<S>::Numbers(m.rows() * m.n);
  const auto bank = Values<S>::Numbers(m.banks * m.n * m.size);
  const auto bias = Values<S>::Numbers(m.banks * m.size);
  const auto dy = Values<S>::Numbers(s.batch * s.positions * s.features);
  const auto guide = Values<G>::Bytes(s.batch * s.positions * s.regions);
  const auto once = [&](Workers& workers) {
    Values<S> y(dy.size), dx(x.size), dweights(weights.size), dbank(bank.size), dbias(bias.size);
    Values<T> scores(guide.size);
    MixedForward<S, T>(s, m, workers, x.get(), weights.get(), bank.get(), bias.get(),
                       guide.data.get(), y.get());
    const int64_t at_once = std::min(s.batch, 1 + workers.threads());
    Values<T> scratch(2 * at_once * s.regions * s.filter_size());
    MixedBackward<S, T>(s, m, workers, x.get(), weights.get(), bank.get(), bias.get(),
                        guide.data.get(), y.get(), dy.get(), dx.get(), dweights.get(), dbank.get(),
                        dbias.get(), scores.get(), at_once, scratch.get());
    return std::make_tuple(std::move(y), std::move(dx), std::move(dweights), std::move(dbank),
                           std::move(dbias), std::move(scores));
  };
  SameOnAnyThreads<S>("mixed_region_conv", once);
  if constexpr (std::is_same_v<S, T>) {
    Threads two(2);
    Values<T> y(dy.size), dx(x.size), dweights(weights.size), dbank(bank.size), dbias(bias.size);
    Values<T> scores(guide.size), filters(m.rows() * m.size), dfilters(filters.size);
    Mix(m, two.workers, weights.data.get(), bank.data.get(), bias.data.get(), filters.data.get());
    Forward<T, T>(s, two.workers, x.get(), filters.get(), guide.data.get(), y.get());
    Backward<T, T>(s, two.workers, x.get(), filters.get(), guide.data.get(), y.get(), dy.get(),
                   dx.get(), dfilters.get(), scores.get());
    MixGradients(m, two.workers, weights.data.get(), bank.data.get(), dfilters.data.get(),
                 dweights.data.get(), dbank.data.get(), dbias.data.get(), false);
    if (once(two.workers) == std::tie(y, dx, dweights, dbank, dbias, scores)) return;
    std::printf("mixed_region_conv is not what mixing and convolving in turn are\n");
    std::exit(1);
  }
}

void Run(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    RegionConvolution<float, float, float>();
    RegionConvolution<double, double, double>();
    RegionConvolution<BFloat16, float, float>();
    Mixing<float>();
    Mixing<double>();
    MixedRegionConvolution<float, float, float>();
    MixedRegionConvolution<double, double, double>();
    MixedRegionConvolution<BFloat16, float, float>();
  }
}

}  // namespace
}  // namespace drconv

int main(int count, char** arguments) {
  const std::string argument = count > 1 ? arguments[1] : "100";
  drconv::print_digests = argument == "digests";
  const int rounds = drconv::print_digests ? 100 : std::stoi(argument);
  drconv::Run(rounds);
  if (!drconv::print_digests) std::printf("%d rounds: no fault found\n", rounds);
}
