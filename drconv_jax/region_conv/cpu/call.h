// What a call must be for the kernels to trust it: its attributes, and the form of every buffer.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "drconv_jax/native/handlers.h"
#include "drconv_jax/region_conv/cpu/mixing.h"
#include "drconv_jax/region_conv/cpu/shape.h"

namespace drconv {

// Of all handlers: for every spatial dimension the taps of the kernel, the steps between windows,
// the padding before the input and the steps between taps; groups of channels.
struct Attributes {
  ffi::Span<const int64_t> kernel, strides, low, dilation;
  int64_t groups;
};

// Numbers stay below this one, and so does every product of them that counts positions, taps or
// values of one filter: no other product overflows then.
constexpr int64_t kTooLarge = int64_t{1} << 31;

// The product of numbers from 1 to kTooLarge, or kTooLarge where it is not below that.
inline int64_t Product(std::initializer_list<int64_t> numbers) {
  int64_t product = 1;
  for (int64_t number : numbers) product = std::min(product * number, kTooLarge);
  return product;
}

inline ffi::Error Malformed(const std::string& name, const std::string& why) {
  return ffi::Error::InvalidArgument(name + ": " + why);
}

// As many numbers as there are spatial dimensions, each at least `least`.
inline ffi::Error CheckNumbers(const char* name, ffi::Span<const int64_t> numbers, size_t rank,
                               int64_t least) {
  if (numbers.size() != rank) return Malformed(name, "expected a number for every dimension");
  for (int64_t number : numbers)
    if (number < least || number >= kTooLarge)
      return Malformed(name, "got " + std::to_string(number));
  return ffi::Error::Success();
}

// (batch, *spatial, channels), of values that the kernels compute with, not empty.
inline ffi::Error CheckImages(const char* name, const ffi::AnyBuffer& buffer, size_t rank) {
  const Form form = FormOf(buffer);
  bool good = form.dimensions.size() == rank + 2 && ComputingType(form.type);
  for (int64_t dimension : form.dimensions) good &= dimension >= 1 && dimension < kTooLarge;
  return good ? ffi::Error::Success() : Malformed(name, "got " + form.ToString());
}

// x (batch, *spatial, in), guide features (batch, *out, regions) and y (batch, *out, features),
// with one to three spatial dimensions.
inline ffi::ErrorOr<Shape> ReadShape(const Attributes& attributes, const ffi::AnyBuffer& x,
                                     const ffi::AnyBuffer& guide, const ffi::AnyBuffer& y) {
  const size_t rank = attributes.kernel.size();
  if (rank < 1 || rank > 3)
    return ffi::Unexpected(Malformed("kernel", "expected one to three numbers"));
  for (const ffi::Error& error :
       {CheckNumbers("kernel", attributes.kernel, rank, 1),
        CheckNumbers("strides", attributes.strides, rank, 1),
        CheckNumbers("low", attributes.low, rank, 1 - kTooLarge),
        CheckNumbers("dilation", attributes.dilation, rank, 1), CheckImages("x", x, rank),
        CheckImages("guide", guide, rank), CheckImages("y", y, rank)})
    if (error.failure()) return ffi::Unexpected(error);

  const auto xs = x.dimensions(), gs = guide.dimensions(), ys = y.dimensions();
  Shape s{};
  s.batch = xs[0];
  s.in = xs[rank + 1];
  s.regions = gs[rank + 1];
  s.features = ys[rank + 1];
  s.groups = attributes.groups;
  if (s.groups < 1 || s.in % s.groups != 0 || s.features % s.groups != 0)
    return ffi::Unexpected(Malformed("groups", "got " + std::to_string(s.groups) + " with " +
                                                   std::to_string(s.in) + " channels and " +
                                                   std::to_string(s.features) + " features"));
  s.in_per_group = s.in / s.groups;
  s.features_per_group = s.features / s.groups;
  s.spatial = s.kernel = s.out = s.strides = s.dilation = {1, 1, 1};
  for (size_t i = 0, d = 3 - rank; i < rank; ++i, ++d) {
    s.spatial[d] = xs[1 + i];
    s.kernel[d] = attributes.kernel[i];
    s.out[d] = gs[1 + i];
    s.strides[d] = attributes.strides[i];
    s.low[d] = attributes.low[i];
    s.dilation[d] = attributes.dilation[i];
  }
  s.positions = Product({s.out[0], s.out[1], s.out[2]});
  s.in_positions = Product({s.spatial[0], s.spatial[1], s.spatial[2]});
  s.taps = Product({s.kernel[0], s.kernel[1], s.kernel[2]});
  if (s.in_positions == kTooLarge) return ffi::Unexpected(Malformed("x", "too many positions"));
  if (s.positions == kTooLarge) return ffi::Unexpected(Malformed("y", "too many positions"));
  if (Product({s.taps, s.in_per_group, s.features}) == kTooLarge)
    return ffi::Unexpected(Malformed("kernel", "too many values of a filter"));

  Form guide_form{*ComputingType(guide.element_type()), FormOf(guide).dimensions};
  guide_form.dimensions.front() = s.batch;
  Form y_form{x.element_type(), guide_form.dimensions};
  y_form.dimensions.back() = s.features;
  ffi::Error error = Check({{"guide", guide, guide_form}, {"y", y, y_form}});
  if (error.failure()) return ffi::Unexpected(error);
  return s;
}

// weights (batch, regions, taps or 1, n), bank (regions or 1, n, size), bias (regions or 1, size).
inline ffi::ErrorOr<MixShape> ReadMixShape(const Shape& shape, ffi::DataType type,
                                           const ffi::AnyBuffer& weights,
                                           const ffi::AnyBuffer& bank, const ffi::AnyBuffer& bias) {
  const auto ws = weights.dimensions(), bs = bank.dimensions();
  // Where there is a choice, what is expected is what is given, if that may be.
  MixShape s{shape.batch, shape.regions, shape.taps, 1, shape.regions, 0};
  if (ws.size() == 4 && ws[2] == 1) s.taps = 1;
  if (ws.size() == 4 && ws[3] > 1) s.n = ws[3];
  if (bs.size() == 3 && bs[0] == 1) s.banks = 1;
  s.size = shape.filter_size() / s.taps;
  ffi::Error error = Check({{"weights", weights, {type, {s.batch, s.regions, s.taps, s.n}}},
                            {"bank", bank, {type, {s.banks, s.n, s.size}}},
                            {"bias", bias, {type, {s.banks, s.size}}}});
  if (error.failure()) return ffi::Unexpected(error);
  if (Product({s.batch, s.regions, s.taps}) == kTooLarge)
    return ffi::Unexpected(Malformed("weights", "too many rows"));
  return s;
}

}  // namespace drconv
