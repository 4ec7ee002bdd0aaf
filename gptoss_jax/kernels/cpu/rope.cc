// Rotary position embedding in one pass: rotates each pair (i, i + H / 2) of every head by its angle.

#define NATIVE_LANES
#include "common.h"

namespace {

// y[B, T, N, H] of x[B, T, N, H], both float or bfloat16, and cos and sin[B, T, H / 2]; if inverse, by the negative
// angles.
ffi::Error Rotate(ffi::ThreadPool pool, Values x, Floats cos, Floats sin, ffi::Result<Values> y, bool inverse) {
  const auto sizes = x.dimensions();
  const int64_t tokens = sizes[0] * sizes[1], heads = sizes[2], half = sizes[3] / 2;
  const float sign = inverse ? -1.0f : 1.0f;
  const float *cosines = cos.typed_data(), *sines = sin.typed_data();
  // Small enough for the threads to finish together, large enough for the cost of a task not to matter.
  const int64_t tokens_per_task = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(heads * 2 * half, 1));
  VisitType(x, [&](auto element) {
    using T = decltype(element);
    const T* from = (const T*)x.untyped_data();
    T* to = (T*)y->untyped_data();
    auto task = [&](int64_t index) {
      const int64_t end = std::min(tokens, (index + 1) * tokens_per_task);
      for (int64_t token = index * tokens_per_task; token < end; ++token)
        for (int64_t i = 0; i < half; i += kLanes) {
          const int64_t count = half - i;
          const Vector c = LoadPartial(cosines + token * half + i, count);
          const Vector s = sign * LoadPartial(sines + token * half + i, count);
          for (int64_t head = 0; head < heads; ++head) {
            const int64_t offset = (token * heads + head) * 2 * half + i;
            const Vector a = LoadPartial(from + offset, count), b = LoadPartial(from + offset + half, count);
            StorePartial(to + offset, a * c - b * s, count);
            StorePartial(to + offset + half, b * c + a * s, count);
          }
        }
    };
    RunPhases({{CeilDiv(tokens, tokens_per_task), task}}, pool);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Rope, Rotate,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Floats>().Arg<Floats>()
                                  .Ret<Values>().Attr<bool>("inverse"));
