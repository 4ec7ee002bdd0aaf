// The gradient of attention of whole rows (Dao 2023, arXiv:2307.08691; the sink's: docs/math.md, "Forward pass").

#include "attention.h"

namespace {

// Gradients of the heads are float, because several tasks add to them.
template <typename T>
struct Gradients {
  const T* d_out;
  const float* lse;          // [B, N, T]
  const float* delta;        // [B, N, T], the dot products of the output and its gradient
  float *dq, *dk, *dv;
};

// A thread's memory for a task of the backward pass.
struct Workspace {
  // Queries, scaled, and gradients of the output: as rows and packed.
  float *q_rows, *q_packed, *d_out_rows, *d_out_packed;
  float *key_columns, *key_rows, *value_columns;  // packed
  float *weights, *d_scores;                      // [kChunk, kStride]
  float *dq, *dk, *dv;

  explicit Workspace(int64_t rows) {
    float* next = Scratch(9 * rows + kTileRows * (rows / kChunk) + 2 * kChunk * kStride);
    for (float** part :
         {&q_rows, &q_packed, &d_out_rows, &d_out_packed, &key_columns, &key_rows, &value_columns, &dk, &dv})
      *part = next, next += rows;
    for (float** part : {&weights, &d_scores}) *part = next, next += kChunk * kStride;
    dq = next;
  }
};

// Computes the weights and the gradients of the scores of kTileRows queries; zero for keys that they do not see.
template <typename T>
void ScoreGradients(const Problem& p, const Gradients<T>& g, const Block& block, int64_t n, int64_t row,
                    const Range& range, const Workspace& w) {
  float *weights = w.weights + row * kStride, *d_scores = w.d_scores + row * kStride;
  const int64_t width = range.end - range.begin, panel_size = kPanelCols * p.H;
  Multiply<true>(w.q_rows + row * p.width, p.width, w.key_columns + range.begin * p.H, panel_size,
                 weights + range.begin, kStride, p.H, width, false);
  Multiply<true>(w.d_out_rows + row * p.width, p.width, w.value_columns + range.begin * p.H, panel_size,
                 d_scores + range.begin, kStride, p.H, width, false);
  for (int64_t i = 0; i < kTileRows && row + i < block.queries; ++i, weights += kStride, d_scores += kStride) {
    const int64_t token = (block.b * p.N + n) * p.T + block.query + row + i;
    const float lse = g.lse[token], delta = g.delta[token];
    const Range seen = SeenBy(p, block, row + i, range);
    for (int64_t j = 0; j < kChunk; j += kLanes) {
      Vector weight = {}, d_score = {};
      if (j >= range.begin && j < range.end) {
        weight = Within(Exp(Load(weights + j) - lse), seen.begin - j, seen.end - j, Vector{});
        d_score = Within(weight * (Load(d_scores + j) - delta), seen.begin - j, seen.end - j, Vector{});
      }
      Store(weights + j, weight), Store(d_scores + j, d_score);
    }
  }
}

// A task of the backward pass: a chunk of queries, of all heads that share a key/value head, and a chunk of keys. The
// first task of a chunk, with its own keys, writes the gradients, the others add to them.
template <typename T>
void BackwardChunks(const Problem& p, const Heads<T>& heads, const Gradients<T>& g, int64_t head, const Block& block) {
  const bool adds = block.query != block.key;
  if (adds && p.FirstKey(block.b, block.query) >= block.key + block.keys) return;
  const int64_t rows = kChunk * p.width, query_stride = p.N * p.H, key_stride = p.K * p.H;
  const Workspace w(rows);
  PackColumns(p, heads.k, block, head, w.key_columns);
  PackRows(p, heads.k, block, head, w.key_rows);
  PackColumns(p, heads.v, block, head, w.value_columns);
  std::memset(w.dk, 0, rows * sizeof(float)), std::memset(w.dv, 0, rows * sizeof(float));
  for (int64_t n = head * p.group(); n < (head + 1) * p.group(); ++n) {
    const int64_t at = p.QueryAt(block.b, block.query, n);
    CopyRows(p, heads.q + at, query_stride, block.queries, p.scale, w.q_rows);
    CopyRows(p, g.d_out + at, query_stride, block.queries, 1, w.d_out_rows);
    Pack(Strided<float>{w.q_rows, p.width, 1}, block.queries, p.width, w.q_packed);
    Pack(Strided<float>{w.d_out_rows, p.width, 1}, block.queries, p.width, w.d_out_packed);
    for (int64_t row = 0; row < block.queries; row += kTileRows) {
      const Range range = VisibleKeys(p, block, row);
      ScoreGradients(p, g, block, n, row, range, w);
      if (range.begin == range.end) continue;
      Multiply<true>(w.d_scores + row * kStride + range.begin, kStride, w.key_rows + range.begin * kPanelCols,
                     kPanelCols * block.keys, w.dq, p.width, std::min(range.end, block.keys) - range.begin, p.width,
                     false);
      WriteRows(p, w.dq, std::min<int64_t>(kTileRows, block.queries - row), p.scale, adds,
                g.dq + at + row * query_stride, query_stride);
    }
    for (int64_t key = 0; key < block.keys; key += kTileRows) {
      // Queries from the first of these keys to the end of the last one's window.
      const int64_t first = std::max<int64_t>(block.key + key - block.query, 0);
      const int64_t end = std::min(block.key + key + kTileRows - 1 + p.window - block.query, block.queries);
      if (first >= end) continue;
      const int64_t scores = first * kStride + key, from = first * kPanelCols, panel_size = kPanelCols * block.queries;
      Multiply<false>(w.weights + scores, kStride, w.d_out_packed + from, panel_size, w.dv + key * p.width, p.width,
                      end - first, p.width, true);
      Multiply<false>(w.d_scores + scores, kStride, w.q_packed + from, panel_size, w.dk + key * p.width, p.width,
                      end - first, p.width, true);
    }
  }
  const int64_t at = p.KeyAt(block.b, block.key, head);
  WriteRows(p, w.dk, block.keys, 1, adds, g.dk + at, key_stride);
  WriteRows(p, w.dv, block.keys, 1, adds, g.dv + at, key_stride);
}

// delta[B, N, T] of a chunk of tokens.
template <typename T>
void DotProducts(const Problem& p, int64_t b, int64_t chunk, const T* out, const T* d_out, float* delta) {
  for (int64_t t = chunk * kChunk; t < std::min<int64_t>(p.T, (chunk + 1) * kChunk); ++t)
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t at = p.QueryAt(b, t, n);
      Vector sum = {};
      for (int64_t j = 0; j < p.H; j += kLanes)
        sum += LoadPartial(out + at + j, p.H - j) * LoadPartial(d_out + at + j, p.H - j);
      delta[(b * p.N + n) * p.T + t] = HorizontalSum(sum);
    }
}

// The gradient of head n's sink.
template <typename T>
float SinkGradient(const Problem& p, int64_t n, float sink, const Gradients<T>& g) {
  Vector sum = {};
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t t = 0, at = (b * p.N + n) * p.T; t < p.T; t += kLanes)
      sum -= Exp(sink - LoadPartial(g.lse + at + t, p.T - t)) * LoadPartial(g.delta + at + t, p.T - t);
  return HorizontalSum(sum);
}

// The gradients of q, k, v and the sinks, if there are any, all float. q, k, v, out and d_out have one type.
ffi::Error Backward(ffi::ThreadPool pool, Values q, Values k, Values v, Floats sinks, Ints segment_ids, Values out,
                    Floats lse, Values d_out, ffi::Result<Floats> dq, ffi::Result<Floats> dk, ffi::Result<Floats> dv,
                    ffi::Result<Floats> d_sinks, int64_t window) {
  const Problem p(q, k, segment_ids, window);
  const int64_t chunks = p.chunks(), pairs = p.B * p.K, num_sinks = sinks.element_count();
  const auto delta = Uninitialized(p.B * p.N * p.T);
  VisitType(q, [&](auto element) {
    using T = decltype(element);
    const Heads<T> heads(q, k, v);
    const Gradients<T> g{(const T*)d_out.untyped_data(), lse.typed_data(), delta.get(),
                         dq->typed_data(), dk->typed_data(), dv->typed_data()};
    std::vector<Phase> phases{{p.B * chunks, [&](int64_t index) {
      DotProducts(p, index / chunks, index % chunks, (const T*)out.untyped_data(), g.d_out, delta.get());
    }}};
    if (num_sinks)
      phases.push_back({num_sinks, [&](int64_t n) {
        d_sinks->typed_data()[n] = SinkGradient(p, n, sinks.typed_data()[n], g);
      }});
    // In each phase, a chunk of keys meets the chunk of queries `distance` after it: no two tasks write to the same
    // memory, and the order of all sums is fixed.
    for (int64_t distance = 0; distance < chunks && (distance - 1) * kChunk + 1 < window; ++distance)
      phases.push_back({pairs * (chunks - distance), [&, distance](int64_t index) {
        const int64_t pair = index % pairs, key = index / pairs * kChunk, query = key + distance * kChunk;
        const Block block{pair / p.K, query, std::min<int64_t>(kChunk, p.T - query), key,
                          std::min<int64_t>(kChunk, p.T - key)};
        BackwardChunks(p, heads, g, pair % p.K, block);
      }});
    RunPhases(std::move(phases), pool);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttentionGrad, Backward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Values>().Arg<Values>()
                                  .Arg<Floats>().Arg<Ints>().Arg<Values>().Arg<Floats>().Arg<Values>().Ret<Floats>()
                                  .Ret<Floats>().Ret<Floats>().Ret<Floats>().Attr<int64_t>("window"));
