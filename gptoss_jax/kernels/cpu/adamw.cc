// AdamW in one pass over memory: each value of the parameters, gradients and moments is read once, and parameters and
// moments are written in place. A task is a block of one array, so that small arrays do not leave threads idle.

#include <cmath>

#include "common.h"

namespace {

constexpr int64_t kBlock = 1 << 15;

// What all arrays share. `clip` is the factor of the gradients, and rest1 and rest2 are 1 - beta1 and 1 - beta2, which
// would be less exact if computed here.
struct Rates {
  float clip, learning_rate, bias1, bias2, beta1, beta2, rest1, rest2, epsilon;
};

// In the order of optax's operations. Compilers vectorize the loop.
void Update(const Rates& r, float decay, const float* __restrict g, float* __restrict p, float* __restrict m,
            float* __restrict v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = g[i] * r.clip;
    m[i] = r.rest1 * gradient + r.beta1 * m[i];
    v[i] = r.rest2 * (gradient * gradient) + r.beta2 * v[i];
    const float update = (m[i] / r.bias1) / (std::sqrt(v[i] / r.bias2) + r.epsilon) + decay * p[i];
    p[i] += -r.learning_rate * update;
  }
}

// Calls make(array, start, count) for each block of each array.
template <typename F>
void ForEachBlock(const std::vector<int64_t>& sizes, F make) {
  for (size_t array = 0; array < sizes.size(); ++array)
    for (int64_t start = 0; start < sizes[array]; start += kBlock)
      make(array, start, std::min(kBlock, sizes[array] - start));
}

// Updates n arrays: arrays are all parameters, gradients, first and second moments; results are all parameters, first
// and second moments, which share the memory of the arguments. scalars: is_finite (0 changes nothing), clip,
// learning_rate, bias1 and bias2 (1 - beta^step).
ffi::Error AdamWUpdate(ffi::ThreadPool pool, Floats scalars, ffi::RemainingArgs arrays, ffi::RemainingRets results,
                       ffi::Span<const float> decays, float beta1, float beta2, float rest1, float rest2,
                       float epsilon) {
  const size_t n = decays.size();
  if (arrays.size() != 4 * n || results.size() != 3 * n) return ffi::Error::InvalidArgument("AdamW: missing arrays");
  const float* s = scalars.typed_data();
  const Rates rates{s[1], s[2], s[3], s[4], beta1, beta2, rest1, rest2, epsilon};
  std::vector<int64_t> sizes;
  std::vector<const float*> gradients;
  std::vector<float*> states;
  for (size_t i = 0; i < n; ++i) {
    Floats gradient = *arrays.get<Floats>(n + i);
    sizes.push_back(gradient.element_count());
    gradients.push_back(gradient.typed_data());
  }
  for (size_t i = 0; i < 3 * n; ++i) {
    states.push_back((**results.get<Floats>(i)).typed_data());
    if (states[i] != arrays.get<Floats>(i < n ? i : n + i)->typed_data())
      return ffi::Error::InvalidArgument("AdamW: results must share the memory of the arguments");
  }
  if (s[0] == 0) return ffi::Error::Success();
  struct Task {
    size_t array;
    int64_t start, count;
  };
  std::vector<Task> tasks;
  ForEachBlock(sizes, [&](size_t array, int64_t start, int64_t count) { tasks.push_back({array, start, count}); });
  auto run = [&](int64_t index) {
    const auto [i, start, count] = tasks[index];
    Update(rates, decays[i], gradients[i] + start, states[i] + start, states[n + i] + start, states[2 * n + i] + start,
           count);
  };
  RunPhases({{(int64_t)tasks.size(), run}}, pool);
  return ffi::Error::Success();
}

// The sum of the squares of a block, in vectors of floats.
float SquaredSum(const float* x, int64_t count) {
  constexpr int kVectors = 4;
  Vector sums[kVectors] = {};
  int64_t i = 0;
  for (; i + kVectors * kLanes <= count; i += kVectors * kLanes)
    for (int j = 0; j < kVectors; ++j) {
      const Vector values = Load(x + i + j * kLanes);
      sums[j] += values * values;
    }
  for (; i < count; i += kLanes) {
    const Vector values = LoadPartial(x + i, count - i);
    sums[0] += values * values;
  }
  return HorizontalSum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The norm of all arrays together. Blocks are summed in order, in double precision: the result does not depend on the
// number of threads.
ffi::Error Norm(ffi::ThreadPool pool, ffi::RemainingArgs arrays, ffi::Result<Floats> norm) {
  std::vector<int64_t> sizes;
  std::vector<std::pair<const float*, int64_t>> blocks;
  for (size_t i = 0; i < arrays.size(); ++i) sizes.push_back(arrays.get<Floats>(i)->element_count());
  ForEachBlock(sizes, [&](size_t array, int64_t start, int64_t count) {
    blocks.emplace_back(arrays.get<Floats>(array)->typed_data() + start, count);
  });
  std::vector<float> sums(blocks.size());
  auto run = [&](int64_t i) { sums[i] = SquaredSum(blocks[i].first, blocks[i].second); };
  RunPhases({{(int64_t)blocks.size(), run}}, pool);
  double total = 0;
  for (float sum : sums) total += sum;
  norm->typed_data()[0] = std::sqrt((float)total);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamW, AdamWUpdate,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().RemainingArgs().RemainingRets()
                                  .Attr<ffi::Span<const float>>("decays").Attr<float>("beta1").Attr<float>("beta2")
                                  .Attr<float>("rest1").Attr<float>("rest2").Attr<float>("epsilon"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(GlobalNorm, Norm,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<Floats>());
