// The shape of a region convolution, and where its windows lie.

#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace drconv {

// Three spatial dimensions: where a call has fewer, the first are 1. No number but `low`, the
// padding before the input, is below 1.
struct Shape {
  int64_t batch, in, features, regions, groups;
  std::array<int64_t, 3> spatial, out, kernel, strides, low, dilation;
  int64_t positions, in_positions, taps, in_per_group, features_per_group;

  int64_t filter_size() const { return taps * in_per_group * features; }

  // Whether every window is the position of the input with its own index.
  bool pointwise() const {
    for (int d = 0; d < 3; ++d)
      if (kernel[d] != 1 || strides[d] != 1 || low[d] != 0 || out[d] != spatial[d]) return false;
    return true;
  }
};

// The offsets of Windows (products.h); none where they are pointwise.
inline std::vector<int32_t> WindowOffsets(const Shape& s) {
  if (s.pointwise()) return {};
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
              *next++ =
                  inside
                      ? static_cast<int32_t>((at[0] * s.spatial[1] + at[1]) * s.spatial[2] + at[2])
                      : -1;
            }
  return offsets;
}

}  // namespace drconv
