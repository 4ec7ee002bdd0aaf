// SwiGLU of the two halves of each row, and its gradient, in one pass each:
//   y = g * sigmoid(alpha * g) * (u + up_offset),  g = min(gate, limit),  u = clip(up, -limit, limit)

#define NATIVE_LANES
#include "common.h"

namespace {

inline Vector Sigmoid(Vector x) { return 1.0f / (1.0f + Exp(-x)); }

// 1 below the limit, 0 above it, and a half at it, as in JAX's gradient of a minimum.
inline Vector Slope(Vector x, float limit) {
  const Vector bound = Broadcast(limit), one = Broadcast(1), half = Broadcast(0.5f);
  return x < bound ? one : x > bound ? one - one : half;
}

inline Vector Abs(Vector x) { return x < 0.0f ? -x : x; }

// Calls run(row, column, count) for all vectors of rows of `columns` values, in parallel over rows.
template <typename F>
void ForEachVector(int64_t rows, int64_t columns, ffi::ThreadPool pool, F run) {
  // Small enough for the threads to finish together, large enough for the cost of a task not to matter.
  const int64_t rows_per_task = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(columns, 1));
  auto task = [&](int64_t index) {
    const int64_t end = std::min(rows, (index + 1) * rows_per_task);
    for (int64_t row = index * rows_per_task; row < end; ++row)
      for (int64_t column = 0; column < columns; column += kLanes) run(row, column, columns - column);
  };
  RunPhases({{CeilDiv(rows, rows_per_task), task}}, pool);
}

// y[R, F] of h[R, 2 F], both float or bfloat16.
ffi::Error Forward(ffi::ThreadPool pool, Values h, ffi::Result<Values> y, float alpha, float limit, float up_offset) {
  const int64_t rows = y->dimensions()[0], columns = y->dimensions()[1];
  VisitType(h, [&](auto element) {
    using T = decltype(element);
    const T* from = (const T*)h.untyped_data();
    T* to = (T*)y->untyped_data();
    ForEachVector(rows, columns, pool, [=](int64_t row, int64_t column, int64_t count) {
      const T* halves = from + row * 2 * columns + column;
      const Vector gate = Min(Broadcast(limit), LoadPartial(halves, count));
      const Vector up = Min(Broadcast(limit), Max(Broadcast(-limit), LoadPartial(halves + columns, count)));
      StorePartial(to + row * columns + column, gate * Sigmoid(alpha * gate) * (up + up_offset), count);
    });
  });
  return ffi::Error::Success();
}

// dh[R, 2 F] of h[R, 2 F] and the gradient g[R, F] of the result.
ffi::Error Backward(ffi::ThreadPool pool, Values h, Values g, ffi::Result<Values> dh, float alpha, float limit,
                    float up_offset) {
  const int64_t rows = g.dimensions()[0], columns = g.dimensions()[1];
  VisitType(h, [&](auto element) {
    using T = decltype(element);
    const T *from = (const T*)h.untyped_data(), *gradients = (const T*)g.untyped_data();
    T* to = (T*)dh->untyped_data();
    ForEachVector(rows, columns, pool, [=](int64_t row, int64_t column, int64_t count) {
      const int64_t offset = row * 2 * columns + column;
      const Vector raw_gate = LoadPartial(from + offset, count), raw_up = LoadPartial(from + offset + columns, count);
      const Vector gate = Min(Broadcast(limit), raw_gate);
      const Vector up = Min(Broadcast(limit), Max(Broadcast(-limit), raw_up));
      const Vector gradient = LoadPartial(gradients + row * columns + column, count);
      const Vector sigmoid = Sigmoid(alpha * gate), swish = gate * sigmoid;
      const Vector d_gate = gradient * (up + up_offset) * (sigmoid + alpha * swish * (1.0f - sigmoid));
      StorePartial(to + offset, d_gate * Slope(raw_gate, limit), count);
      StorePartial(to + offset + columns, gradient * swish * Slope(Abs(raw_up), limit), count);
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SwiGLU, Forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Ret<Values>().Attr<float>("alpha")
                                  .Attr<float>("limit").Attr<float>("up_offset"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SwiGLUGrad, Backward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Values>().Ret<Values>()
                                  .Attr<float>("alpha").Attr<float>("limit").Attr<float>("up_offset"));
