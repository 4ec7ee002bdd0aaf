// Matmuls and attention for decoding, as XLA FFI calls.

#include <algorithm>
#include <cmath>

#include "decode.h"

namespace {

// The nonzero rows of x. Zero rows (slots without a sequence) are also zero in the result.
std::vector<int64_t> NonzeroRows(Floats x) {
  const int64_t num_rows = x.dimensions()[0], inner = x.dimensions()[1];
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* row = x.typed_data() + r * inner;
    if (std::any_of(row, row + inner, [](float value) { return value != 0; })) rows.push_back(r);
  }
  return rows;
}

void ZeroOtherRows(const std::vector<int64_t>& rows, Floats y) {
  const int64_t num_rows = y.dimensions()[0], columns = y.dimensions()[1];
  for (int64_t r = 0, next = 0; r < num_rows; ++r) {
    if (next < (int64_t)rows.size() && rows[next] == r)
      ++next;
    else
      std::memset(y.typed_data() + r * columns, 0, columns * sizeof(float));
  }
}

// y_i = x w_i[layer] for every weight, [layers, inner, columns], float or bfloat16.
ffi::Error Matmul(ffi::ThreadPool pool, Floats x, Ints layer, ffi::RemainingArgs weights, ffi::RemainingRets results,
                  bool rounded) {
  const int64_t num_rows = x.dimensions()[0], inner = x.dimensions()[1];
  const std::vector<int64_t> rows = NonzeroRows(x);
  std::vector<SplitMatmul> matmuls;
  std::vector<std::pair<size_t, int64_t>> tasks;  // of which matmul
  for (size_t i = 0; i < results.size(); ++i) {
    Floats y = **results.get<Floats>(i);
    ZeroOtherRows(rows, y);
    matmuls.emplace_back(WorkSplit(1, inner, y.dimensions()[1]), num_rows, y.typed_data());
    for (int64_t task = 0; task < matmuls[i].split.num_tasks(); ++task) tasks.emplace_back(i, task);
  }
  auto multiply = [&](int64_t index) {
    const auto [i, task] = tasks[index];
    const SplitMatmul& matmul = matmuls[i];
    const int64_t start = layer.typed_data()[0] * inner * matmul.split.columns;
    VisitWeights(*weights.get<Values>(i), rounded, start, [&, task = task](auto* w) {
      matmul.Multiply(matmul.split.task(task), w, nullptr, rows,
                      [&](int64_t r) { return x.typed_data() + r * inner; });
    });
  };
  auto add = [&](int64_t index) {
    for (const SplitMatmul& matmul : matmuls) matmul.AddPartialSums(rows[index]);
  };
  if (!rows.empty()) RunPhases({{(int64_t)tasks.size(), multiply}, {(int64_t)rows.size(), add}}, pool);
  return ffi::Error::Success();
}

// Matmul with transposed weights, [layers, columns, inner].
ffi::Error MatmulTransposed(ffi::ThreadPool pool, Floats x, Ints layer, ffi::RemainingArgs weights,
                            ffi::RemainingRets results, bool rounded) {
  const int64_t inner = x.dimensions()[1];
  const std::vector<int64_t> rows = NonzeroRows(x);
  struct Task {
    Values w;
    int64_t start;  // in w
    float* y;
    int64_t num_columns, y_stride;
  };
  std::vector<Task> tasks;
  for (size_t i = 0; i < results.size(); ++i) {
    Floats y = **results.get<Floats>(i);
    ZeroOtherRows(rows, y);
    const int64_t columns = y.dimensions()[1], step = TaskColumns(columns, columns, pool);
    for (int64_t c = 0; c < columns; c += step)
      tasks.push_back({*weights.get<Values>(i), (layer.typed_data()[0] * columns + c) * inner, y.typed_data() + c,
                       std::min(step, columns - c), columns});
  }
  auto multiply = [&](int64_t index) {
    const Task& task = tasks[index];
    const int64_t step = kLanes == 16 ? task.num_columns : std::max<int64_t>(4, kDotFloats / inner / 4 * 4);
    VisitWeights(task.w, rounded, task.start, [&](auto* w) {
      for (int64_t c = 0; c < task.num_columns; c += step)
        ForEachRowBlock(rows.size(), [&](int64_t first, auto n) {
          TokenBlock t;
          for (int i = 0; i < n; ++i)
            t.x[i] = x.typed_data() + rows[first + i] * inner, t.y[i] = task.y + rows[first + i] * task.y_stride + c;
          DotRows<n()>(t, w + c * inner, inner, std::min(step, task.num_columns - c));
        });
    });
  };
  RunPhases({{(int64_t)tasks.size(), multiply}}, pool);
  return ffi::Error::Success();
}

// In-place softmax of scale * scores[0 : count], with an additional sink logit unless `sink` is null.
void Softmax(float* scores, int64_t count, float scale, const float* sink) {
  float max = scores[0];
  for (int64_t s = 1; s < count; ++s) max = std::max(max, scores[s]);
  max *= scale;
  if (sink) max = std::max(max, *sink);
  float total = sink ? std::exp(*sink - max) : 0;
  for (int64_t s = 0; s < count; s += kLanes)
    StorePartial(scores + s, Exp(LoadPartial(scores + s, count - s) * scale - max), count - s);
  for (int64_t s = 0; s < count; ++s) total += scores[s];
  for (int64_t s = 0; s < count; ++s) scores[s] /= total;
}

// Attention of one query per sequence, q [B, N, H], to the first counts[b] slots of keys and values [layers, B, K, S,
// H], float or bfloat16; zeros for a count of 0. sinks [N] may be empty.
ffi::Error Attention(ffi::ThreadPool pool, Floats q, Values keys, Values values, Ints layer, Ints counts, Floats sinks,
                     ffi::Result<Floats> y) {
  const auto sizes = keys.dimensions();
  const int64_t B = sizes[1], K = sizes[2], S = sizes[3], H = sizes[4], G = q.dimensions()[1] / K;
  // A task is one key/value head of one sequence, for all of its G query heads.
  auto attend = [&](int64_t task) {
    const int64_t b = task / K, count = std::min<int64_t>(counts.typed_data()[b], S);
    float* out = y->typed_data() + task * G * H;
    std::memset(out, 0, G * H * sizeof(float));
    if (count <= 0) return;
    const int64_t start = (layer.typed_data()[0] * B * K + task) * S * H;
    const auto weights = Uninitialized(G * count);
    ForEachRowBlock(G, [&](int64_t first, auto n) {
      TokenBlock t;
      for (int i = 0; i < n; ++i)
        t.x[i] = q.typed_data() + (task * G + first + i) * H, t.y[i] = weights.get() + (first + i) * count;
      VisitWeights(keys, false, start, [&](auto* rows) { DotRows<n()>(t, rows, H, count); });
    });
    std::vector<const float*> from(G);
    std::vector<float*> to(G);
    for (int64_t g = 0; g < G; ++g) {
      const float* sink = sinks.element_count() ? sinks.typed_data() + task % K * G + g : nullptr;
      Softmax(weights.get() + g * count, count, 1 / std::sqrt((float)H), sink);
      from[g] = weights.get() + g * count, to[g] = out + g * H;
    }
    VisitWeights(values, false, start, [&](auto* rows) { AddProducts(from, to, rows, H, count, H); });
  };
  RunPhases({{B * K, attend}}, pool);
  return ffi::Error::Success();
}

auto BindMatmul() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Ints>().RemainingArgs().RemainingRets()
      .Attr<bool>("rounded");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeMatmul, Matmul, BindMatmul());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeMatmulTransposed, MatmulTransposed, BindMatmul());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeAttention, Attention,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Values>().Arg<Values>()
                                  .Arg<Ints>().Arg<Ints>().Arg<Floats>().Ret<Floats>());
