// The region convolution on a CPU, forward and backward, as functions that XLA calls: with filters
// that are given (forward.h, backward.h), and with filters that are mixed on the way (mixed.h).

#include "drconv_jax/native/handlers.h"

#include <algorithm>
#include <cstdint>

#include "drconv_jax/region_conv/cpu/backward.h"
#include "drconv_jax/region_conv/cpu/call.h"
#include "drconv_jax/region_conv/cpu/forward.h"
#include "drconv_jax/region_conv/cpu/mixed.h"
#include "drconv_jax/region_conv/cpu/regions.h"
#include "drconv_jax/region_conv/cpu/shape.h"

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(drconv::Attributes,
                                      StructMember<Span<const int64_t>>("kernel"),
                                      StructMember<Span<const int64_t>>("strides"),
                                      StructMember<Span<const int64_t>>("low"),
                                      StructMember<Span<const int64_t>>("dilation"),
                                      StructMember<int64_t>("groups"));

namespace drconv {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

GuideFeatures GuideOf(const Buffer& guide) {
  if (guide.element_type() == ffi::DataType::F64) return guide.typed_data<double>();
  return guide.typed_data<float>();
}

// (batch, regions, *kernel, in / groups, features), in the type of x.
Form FiltersForm(const Attributes& attributes, const Shape& shape, const Buffer& x) {
  Form form{x.element_type(), {shape.batch, shape.regions}};
  form.dimensions.insert(form.dimensions.end(), attributes.kernel.begin(), attributes.kernel.end());
  form.dimensions.insert(form.dimensions.end(), {shape.in_per_group, shape.features});
  return form;
}

// As the guide features, in the type that values like those of x are computed in.
Form ScoresForm(const Buffer& x, const Buffer& guide) {
  return {*ComputingType(x.element_type()), FormOf(guide).dimensions};
}

ffi::Error ForwardHandler(PoolWorkers workers, Buffer x, Buffer filters, Buffer guide, Result y,
                          Attributes attributes) {
  const auto shape = ReadShape(attributes, x, guide, *y);
  if (!shape) return shape.error();
  const auto error = Check({{"filters", filters, FiltersForm(attributes, *shape, x)}});
  if (error.failure()) return error;
  ByType(x.element_type(), [&](auto s, auto t) {
    Forward<decltype(s), decltype(t)>(*shape, workers, x.untyped_data(), filters.untyped_data(),
                                      GuideOf(guide), y->untyped_data());
  });
  return ffi::Error::Success();
}

ffi::Error BackwardHandler(PoolWorkers workers, Buffer x, Buffer filters, Buffer guide, Buffer y,
                           Buffer dy, Result dx, Result dfilters, Result scores,
                           Attributes attributes) {
  const auto shape = ReadShape(attributes, x, guide, y);
  if (!shape) return shape.error();
  const Form filters_form = FiltersForm(attributes, *shape, x);
  const auto error = Check({{"filters", filters, filters_form},
                            {"dy", dy, FormOf(y)},
                            {"dx", *dx, FormOf(x)},
                            {"dfilters", *dfilters, filters_form},
                            {"scores", *scores, ScoresForm(x, guide)}});
  if (error.failure()) return error;
  ByType(x.element_type(), [&](auto s, auto t) {
    Backward<decltype(s), decltype(t)>(
        *shape, workers, x.untyped_data(), filters.untyped_data(), GuideOf(guide), y.untyped_data(),
        dy.untyped_data(), dx->untyped_data(), dfilters->untyped_data(), scores->untyped_data());
  });
  return ffi::Error::Success();
}

ffi::Error MixedForwardHandler(PoolWorkers workers, Buffer x, Buffer weights, Buffer bank,
                               Buffer bias, Buffer guide, Result y, Attributes attributes) {
  const auto shape = ReadShape(attributes, x, guide, *y);
  if (!shape) return shape.error();
  const auto mixture = ReadMixShape(*shape, x.element_type(), weights, bank, bias);
  if (!mixture) return mixture.error();
  ByType(x.element_type(), [&](auto s, auto t) {
    MixedForward<decltype(s), decltype(t)>(*shape, *mixture, workers, x.untyped_data(),
                                           weights.untyped_data(), bank.untyped_data(),
                                           bias.untyped_data(), GuideOf(guide), y->untyped_data());
  });
  return ffi::Error::Success();
}

// scratch (2, samples at once, values of a sample's filters) is what the kernel writes filters and
// their gradients to.
ffi::Error MixedBackwardHandler(PoolWorkers workers, Buffer x, Buffer weights, Buffer bank,
                                Buffer bias, Buffer guide, Buffer y, Buffer dy, Result dx,
                                Result dweights, Result dbank, Result dbias, Result scores,
                                Result scratch, Attributes attributes) {
  const auto shape = ReadShape(attributes, x, guide, y);
  if (!shape) return shape.error();
  const auto mixture = ReadMixShape(*shape, x.element_type(), weights, bank, bias);
  if (!mixture) return mixture.error();
  const auto given = scratch->dimensions();
  const int64_t at_once = given.size() == 3 ? std::max<int64_t>(1, given[1]) : 1;
  const Form scores_form = ScoresForm(x, guide);
  const auto error =
      Check({{"dy", dy, FormOf(y)},
             {"dx", *dx, FormOf(x)},
             {"dweights", *dweights, FormOf(weights)},
             {"dbank", *dbank, FormOf(bank)},
             {"dbias", *dbias, FormOf(bias)},
             {"scores", *scores, scores_form},
             {"scratch",
              *scratch,
              {scores_form.type, {2, at_once, shape->regions * shape->filter_size()}}}});
  if (error.failure()) return error;
  ByType(x.element_type(), [&](auto s, auto t) {
    MixedBackward<decltype(s), decltype(t)>(
        *shape, *mixture, workers, x.untyped_data(), weights.untyped_data(), bank.untyped_data(),
        bias.untyped_data(), GuideOf(guide), y.untyped_data(), dy.untyped_data(),
        dx->untyped_data(), dweights->untyped_data(), dbank->untyped_data(), dbias->untyped_data(),
        scores->untyped_data(), at_once, scratch->untyped_data());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace drconv

XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_region_conv_forward, drconv::ForwardHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_region_conv_backward, drconv::BackwardHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_mixed_region_conv_forward, drconv::MixedForwardHandler);
XLA_FFI_DEFINE_HANDLER_SYMBOL(drconv_mixed_region_conv_backward, drconv::MixedBackwardHandler);
