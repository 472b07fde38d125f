// What functions that XLA calls have in common: XLA's threads, checks of buffers, the types of
// values.
//
// XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function) makes such a function known by a C name; which
// arguments, results and attributes it has, XLA takes from its signature.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "drconv_jax/native/values.h"
#include "drconv_jax/native/workers.h"
#include "xla/ffi/api/ffi.h"

namespace drconv {

namespace ffi = xla::ffi;

// The threads that XLA lends to a call. As a parameter it is bound like an ffi::ThreadPool.
class PoolWorkers : public Workers {
 public:
  PoolWorkers(ffi::ThreadPool pool)
      : Workers(pool.num_threads(), [pool](Job job) mutable { pool.Schedule(std::move(job)); }) {}
};

// The type of a buffer's values, and its dimensions.
struct Form {
  ffi::DataType type;
  std::vector<int64_t> dimensions;

  bool operator==(const Form& other) const {
    return type == other.type && dimensions == other.dimensions;
  }
  std::string ToString() const {
    std::ostringstream text;
    text << type << "[";
    for (size_t i = 0; i < dimensions.size(); ++i) text << (i ? ", " : "") << dimensions[i];
    text << "]";
    return text.str();
  }
};

inline Form FormOf(const ffi::AnyBuffer& buffer) {
  const auto dimensions = buffer.dimensions();
  return {buffer.element_type(), {dimensions.begin(), dimensions.end()}};
}

// A buffer by the name that errors call it, and the form that it must have.
struct Expected {
  const char* name;
  ffi::AnyBuffer given;
  Form form;
};

// An error that names the first buffer which has another form, if there is one.
inline ffi::Error Check(std::initializer_list<Expected> buffers) {
  for (const Expected& buffer : buffers) {
    const Form form = FormOf(buffer.given);
    if (!(form == buffer.form))
      return ffi::Error::InvalidArgument(std::string(buffer.name) + ": expected " +
                                         buffer.form.ToString() + ", got " + form.ToString());
  }
  return ffi::Error::Success();
}

// The type that values of `type` are computed in; none where the kernels do not compute with them.
inline std::optional<ffi::DataType> ComputingType(ffi::DataType type) {
  if (type == ffi::DataType::BF16) return ffi::DataType::F32;
  if (type == ffi::DataType::F32 || type == ffi::DataType::F64) return type;
  return std::nullopt;
}

// Calls body(S(), T()) for values that are stored as S and computed as T; `type` has a computing
// type.
template <typename Body>
void ByType(ffi::DataType type, const Body& body) {
  if (type == ffi::DataType::F32) body(float(), float());
  if (type == ffi::DataType::F64) body(double(), double());
  if (type == ffi::DataType::BF16) body(BFloat16(), float());
}

}  // namespace drconv

template <>
struct xla::ffi::CtxBinding<drconv::PoolWorkers> {
  using Ctx = ThreadPool;
};
