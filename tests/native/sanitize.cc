// Runs the native kernel over many drawn shapes, in arrays of the exact size, with guide features
// of random bytes, on one thread and on four. Built with a sanitizer it fails at any access out of
// bounds and any race; by itself it fails where a result depends on the number of threads. With
// INCLUDE=$(python -c 'import jaxlib; print(jaxlib.__path__[0] + "/include")'):
//
//   for s in address,undefined thread; do
//     g++ -std=c++17 -O1 -g -Wno-psabi -fsanitize=$s -isystem $INCLUDE tests/native/sanitize.cc -o sanitize -pthread && ./sanitize
//   done
//
// With an argument it prints digests of all results, to compare processors: tests/native/arm64.sh
// runs it on an emulated arm64 and on x86-64's baseline, AVX2 and AVX-512, and compares.

#include "../../drconv_jax/region_conv/cpu.cc"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

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

// A sum in which every value counts for something else, and how large it could be.
template <typename T>
void PrintDigest(const char* what, const Values<T>& values) {
  double sum = 0, magnitude = 0;
  for (int64_t i = 0; i < values.size; ++i) {
    const double term = Widen(values.data[i]) * (1 + i % 7);
    sum += term;
    magnitude += std::abs(term);
  }
  std::printf("%s %d %.17g %.17g\n", what, static_cast<int>(sizeof(T)), sum, magnitude);
}

// Calls once(workers), which returns its results, on one thread and on four.
template <typename Once>
void SameOnAnyThreads(const char* what, const Once& once) {
  Threads one(1), four(4);
  const auto results = once(one.workers);
  if (print_digests)
    std::apply([&](const auto&... each) { (PrintDigest(what, each), ...); }, results);
  if (results == once(four.workers)) return;
  std::printf("%s depends on the number of threads\n", what);
  std::exit(1);
}

Shape DrawShape() {
  Shape s{};
  s.batch = Draw(0, 9) ? Draw(1, 6) : 0;
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

// Guide features of random bytes.
template <typename G>
class Guide {
 public:
  Guide(const Shape& s, XLA_FFI_DataType type)
      : dims_{s.batch, s.out[0], s.out[1], s.out[2], s.regions},
        values_(Values<G>::Bytes(s.batch * s.positions * s.regions)),
        buffer_{XLA_FFI_Buffer_STRUCT_SIZE, nullptr, type, values_.get(), 5, dims_.data()} {}
  Guide(const Guide&) = delete;
  ffi::AnyBuffer buffer() const { return ffi::AnyBuffer(&buffer_); }

 private:
  std::array<int64_t, 5> dims_;
  Values<G> values_;
  XLA_FFI_Buffer buffer_;
};

template <typename S, typename T, typename G>
void RegionConvolution(XLA_FFI_DataType guide_type) {
  const Shape s = DrawShape();
  const auto x = Values<S>::Numbers(s.batch * s.in_positions * s.in);
  const auto filters = Values<S>::Numbers(s.batch * s.regions * s.filter_size());
  const auto dy = Values<S>::Numbers(s.batch * s.positions * s.features);
  const Guide<G> guide(s, guide_type);
  SameOnAnyThreads("region_conv", [&](Workers& workers) {
    Values<S> y(dy.size), dx(x.size), dfilters(filters.size);
    Values<T> scores(s.batch * s.positions * s.regions);
    Forward<S, T>(s, workers, x.get(), filters.get(), guide.buffer(), y.get());
    Backward<S, T>(s, workers, x.get(), filters.get(), guide.buffer(), y.get(), dy.get(), dx.get(),
                   dfilters.get(), scores.get());
    return std::make_tuple(std::move(y), std::move(dx), std::move(dfilters), std::move(scores));
  });
}

template <typename S, typename T>
void Mixing() {
  const MixShape s{Draw(0, 5), Draw(1, 9), Draw(1, 9), Draw(1, 17), Draw(1, 900)};
  const auto weights = Values<S>::Numbers(s.rows() * s.regions * s.n);
  const auto bank = Values<S>::Numbers(s.regions * s.n * s.size);
  const auto bias = Values<S>::Numbers(s.regions * s.size);
  const auto dfilters = Values<S>::Numbers(s.rows() * s.regions * s.size);
  SameOnAnyThreads("mixing", [&](Workers& workers) {
    Values<S> filters(dfilters.size), dweights(weights.size), dbank(bank.size), dbias(bias.size);
    Mix<S, T>(s, workers, weights.get(), bank.get(), bias.get(), filters.get());
    MixBackward<S, T>(s, workers, weights.get(), bank.get(), dfilters.get(), dweights.get(),
                      dbank.get(), dbias.get());
    return std::make_tuple(std::move(filters), std::move(dweights), std::move(dbank),
                           std::move(dbias));
  });
}

// Filters that are mixed on the way, from one bank for all regions or one for each. Where they are not
// rounded in between, results are those of mixing and convolving in turn.
template <typename S, typename T, typename G>
void MixedRegionConvolution(XLA_FFI_DataType guide_type) {
  const Shape s = DrawShape();
  const int64_t n = Draw(1, Draw(0, 1) ? 3 : 17), per_tap = s.in_per_group * s.features;
  const MixShape mixture = Draw(0, 1) ? MixShape{s.batch, s.regions, 1, n, s.filter_size()}
                                      : MixShape{s.batch, s.taps, s.regions, n, per_tap};
  const auto x = Values<S>::Numbers(s.batch * s.in_positions * s.in);
  const auto weights = Values<S>::Numbers(mixture.rows() * mixture.regions * n);
  const auto bank = Values<S>::Numbers(mixture.regions * n * mixture.size);
  const auto bias = Values<S>::Numbers(mixture.regions * mixture.size);
  const auto dy = Values<S>::Numbers(s.batch * s.positions * s.features);
  const Guide<G> guide(s, guide_type);
  const auto once = [&](Workers& workers, bool in_turn) {
    Values<S> y(dy.size), dx(x.size), dweights(weights.size), dbank(bank.size), dbias(bias.size);
    Values<T> scores(s.batch * s.positions * s.regions);
    if (in_turn) {
      Values<S> filters(s.batch * s.regions * s.filter_size()), dfilters(filters.size);
      Mix<S, T>(mixture, workers, weights.get(), bank.get(), bias.get(), filters.get());
      Forward<S, T>(s, workers, x.get(), filters.get(), guide.buffer(), y.get());
      Backward<S, T>(s, workers, x.get(), filters.get(), guide.buffer(), y.get(), dy.get(),
                     dx.get(), dfilters.get(), scores.get());
      MixBackward<S, T>(mixture, workers, weights.get(), bank.get(), dfilters.get(),
                        dweights.get(), dbank.get(), dbias.get());
    } else {
      MixedForward<S, T>(s, mixture, workers, x.get(), weights.get(), bank.get(), bias.get(),
                         guide.buffer(), y.get());
      const int64_t at_once = std::min(s.batch, 1 + workers.threads());
      Values<T> scratch(2 * at_once * s.regions * s.filter_size());
      MixedBackward<S, T>(s, mixture, workers, x.get(), weights.get(), bank.get(), bias.get(),
                          guide.buffer(), y.get(), dy.get(), dx.get(), dweights.get(), dbank.get(),
                          dbias.get(), scores.get(), at_once, scratch.data.get());
    }
    return std::make_tuple(std::move(y), std::move(dx), std::move(dweights), std::move(dbank),
                           std::move(dbias), std::move(scores));
  };
  SameOnAnyThreads("mixed_region_conv", [&](Workers& workers) { return once(workers, false); });
  Threads two(2);
  if (!std::is_same_v<S, T> || once(two.workers, true) == once(two.workers, false)) return;
  std::printf("mixed_region_conv is not what mixing and convolving in turn are\n");
  std::exit(1);
}

}  // namespace

int main(int count, char**) {
  print_digests = count > 1;
  constexpr int kRounds = 100;
  for (int round = 0; round < kRounds; ++round) {
    RegionConvolution<float, float, float>(XLA_FFI_DataType_F32);
    RegionConvolution<double, double, double>(XLA_FFI_DataType_F64);
    RegionConvolution<BFloat16, float, float>(XLA_FFI_DataType_F32);
    Mixing<float, float>();
    Mixing<double, double>();
    Mixing<BFloat16, float>();
    MixedRegionConvolution<float, float, float>(XLA_FFI_DataType_F32);
    MixedRegionConvolution<double, double, double>(XLA_FFI_DataType_F64);
    MixedRegionConvolution<BFloat16, float, float>(XLA_FFI_DataType_F32);
  }
  if (!print_digests) std::printf("%d rounds: no fault found\n", kRounds);
}
