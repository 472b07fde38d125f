// The memory of a call: scratch, and arguments and results in the type that they are computed in,
// which is wider than the type S that they are stored in where that is bfloat16.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "drconv_jax/native/inline.h"
#include "drconv_jax/native/values.h"
#include "drconv_jax/native/workers.h"

namespace drconv {

// Fresh memory costs a fault for every page that is first written, which for a large result can
// take longer than its arithmetic: where the system lets a program choose, pages are large.
constexpr size_t kLargePage = 2 << 20;

inline void PreferLargePages(void* data, size_t bytes) {
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

// Converts one row of `size` values.
template <typename From, typename To>
struct ConvertTask {
  using Value = To;
  int64_t size;
  const From* from;
  To* to;

  template <typename Isa>
  INLINE void Run(int64_t row) const {
    for (int64_t i = row * size; i < (row + 1) * size; ++i) Narrow(Widen(from[i]), to + i);
  }
};

// An argument, `rows` of `size` values, in its computing type: itself, or a copy.
template <typename S, typename T>
class Widened {
 public:
  Widened(Workers& workers, const void* source, int64_t rows, int64_t size) {
    if constexpr (std::is_same_v<S, T>) {
      data_ = static_cast<const T*>(source);
    } else {
      copy_ = Scratch<T>(rows * size);
      workers.For(rows, ConvertTask<S, T>{size, static_cast<const S*>(source), copy_.data()});
      data_ = copy_.data();
    }
  }
  const T* data() const { return data_; }

 private:
  Scratch<T> copy_;
  const T* data_;
};

// A result, `rows` of `size` values, in its computing type: itself, or a copy that Finish rounds
// into it.
template <typename S, typename T>
class Narrowed {
 public:
  Narrowed(void* target, int64_t rows, int64_t size)
      : target_(static_cast<S*>(target)), rows_(rows), size_(size) {
    PreferLargePages(target, rows * size * sizeof(S));
    if constexpr (!std::is_same_v<S, T>) {
      copy_ = Scratch<T>(rows * size);
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
      workers.For(rows_, ConvertTask<T, S>{size_, copy_.data(), target_});
  }

 private:
  S* target_;
  int64_t rows_, size_;
  Scratch<T> copy_;
};

}  // namespace drconv
