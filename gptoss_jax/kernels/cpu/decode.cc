// Products and attention of a few rows, as XLA FFI calls.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "decode.h"

namespace {

// y_i = x w_i[layer] for every weight, [layers, inner, columns].
ffi::Error Products(ffi::ThreadPool pool, Floats x, Ints layer, ffi::RemainingArgs weights,
                    ffi::RemainingRets results) {
  const int64_t rows = x.dimensions()[0], inner = x.dimensions()[1];
  struct Weight {
    Shares shares;
    const float* w;
    float* y;
    std::unique_ptr<float[]> further;  // sums of all parts but the first
  };
  std::vector<Weight> all;
  std::vector<std::pair<const Weight*, int64_t>> tasks;
  for (size_t i = 0; i < results.size(); ++i) {
    Floats y = **results.get<Floats>(i), w = *weights.get<Floats>(i);
    const Shares shares(1, inner, y.dimensions()[1]);
    const int64_t size = rows * shares.columns;
    all.push_back({shares, w.typed_data() + layer.typed_data()[0] * inner * shares.columns, y.typed_data(),
                   Unset((shares.parts - 1) * size)});
  }
  for (const Weight& weight : all)
    for (int64_t task = 0; task < weight.shares.tasks(); ++task) tasks.emplace_back(&weight, task);
  auto multiply = [&](int64_t number) {
    const auto [weight, task] = tasks[number];
    const Shares::One one = weight->shares.at(task);
    const int64_t columns = weight->shares.columns;
    float* sums = one.part == 0 ? weight->y : weight->further.get() + (one.part - 1) * rows * columns;
    std::vector<const float*> from;
    std::vector<float*> to;
    for (int64_t i = 0; i < rows; ++i) {
      from.push_back(x.typed_data() + i * inner + one.line), to.push_back(sums + i * columns + one.column);
      std::memset(to.back(), 0, one.width * sizeof(float));
    }
    AddAll(from, to, weight->w + one.line * columns + one.column, columns, one.count, one.width);
  };
  auto add = [&](int64_t row) {
    for (const Weight& weight : all) {
      const int64_t columns = weight.shares.columns, size = rows * columns;
      for (int64_t part = 1; part < weight.shares.parts; ++part)
        for (int64_t c = 0; c < columns; ++c)
          weight.y[row * columns + c] += weight.further[(part - 1) * size + row * columns + c];
    }
  };
  Run({{(int64_t)tasks.size(), multiply}, {rows, add}}, pool);
  return ffi::Error::Success();
}

// The same with w turned, [layers, columns, inner].
ffi::Error TurnedProducts(ffi::ThreadPool pool, Floats x, Ints layer, ffi::RemainingArgs weights,
                          ffi::RemainingRets results) {
  const int64_t rows = x.dimensions()[0], inner = x.dimensions()[1];
  struct Task {
    const float* w;
    float* y;
    int64_t columns, all;
  };
  std::vector<Task> tasks;
  for (size_t i = 0; i < results.size(); ++i) {
    Floats y = **results.get<Floats>(i), w = *weights.get<Floats>(i);
    const int64_t columns = y.dimensions()[1], block = BlockOf(columns, columns, pool);
    const float* start = w.typed_data() + layer.typed_data()[0] * inner * columns;
    for (int64_t c = 0; c < columns; c += block)
      tasks.push_back({start + c * inner, y.typed_data() + c, std::min(block, columns - c), columns});
  }
  auto multiply = [&](int64_t number) {
    const Task& t = tasks[number];
    InFours(rows, [&](int64_t first, int count) {
      Rows r;
      for (int i = 0; i < count; ++i)
        r.x[i] = x.typed_data() + (first + i) * inner, r.y[i] = t.y + (first + i) * t.all;
      BY_COUNT(count, Dot, r, t.w, inner, inner, t.columns)
    });
  };
  Run({{(int64_t)tasks.size(), multiply}}, pool);
  return ffi::Error::Success();
}

// One query of each sequence, q [B, N, H], over the first counts[b] slots of keys and values [layers, B, K, S, H];
// a count of 0 gives zeros. sinks [N] may be empty.
ffi::Error OneQuery(ffi::ThreadPool pool, Floats q, Floats keys, Floats values, Ints layer, Ints counts, Floats sinks,
                    ffi::Result<Floats> y) {
  const auto sizes = keys.dimensions();
  const int64_t B = sizes[1], K = sizes[2], S = sizes[3], H = sizes[4], G = q.dimensions()[1] / K;
  const float scale = 1 / std::sqrt((float)H);
  auto one = [&](int64_t task) {
    const int64_t b = task / K, count = std::min<int64_t>(counts.typed_data()[b], S);
    float* out = y->typed_data() + task * G * H;
    if (count <= 0) {
      std::memset(out, 0, G * H * sizeof(float));
      return;
    }
    const int64_t start = (layer.typed_data()[0] * B * K + task) * S * H;
    const float* query = q.typed_data() + task * G * H;
    const auto weights = Unset(G * count);
    std::vector<const float*> x(G), p(G);
    std::vector<float*> scores(G), result(G);
    for (int64_t g = 0; g < G; ++g) {
      x[g] = query + g * H, scores[g] = weights.get() + g * count, p[g] = scores[g], result[g] = out + g * H;
    }
    InFours(G, [&](int64_t first, int rows) {
      Rows r;
      for (int i = 0; i < rows; ++i) r.x[i] = x[first + i], r.y[i] = scores[first + i];
      BY_COUNT(rows, Dot, r, keys.typed_data() + start, H, H, count)
    });
    for (int64_t g = 0; g < G; ++g) {
      const float* sink = sinks.element_count() ? sinks.typed_data() + task % K * G + g : nullptr;
      float largest = scores[g][0];
      for (int64_t s = 1; s < count; ++s) largest = std::max(largest, scores[g][s]);
      largest *= scale;
      if (sink) largest = std::max(largest, *sink);
      float total = sink ? std::exp(*sink - largest) : 0;
      for (int64_t s = 0; s < count; s += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, count - s);
        Vector one = {};
        std::memcpy(&one, scores[g] + s, width * sizeof(float));
        one = Exp(one * scale - largest);
        std::memcpy(scores[g] + s, &one, width * sizeof(float));
      }
      for (int64_t s = 0; s < count; ++s) total += scores[g][s];
      for (int64_t s = 0; s < count; ++s) scores[g][s] /= total;
    }
    std::memset(out, 0, G * H * sizeof(float));
    AddAll(p, result, values.typed_data() + start, H, count, H);
  };
  Run({{B * K, one}}, pool);
  return ffi::Error::Success();
}

auto BindProducts() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Ints>().RemainingArgs().RemainingRets();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsProducts, Products, BindProducts());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsTurnedProducts, TurnedProducts, BindProducts());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsAttention, OneQuery,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
