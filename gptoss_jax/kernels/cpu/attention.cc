// Attention of whole rows, without an array of scores in memory (Dao 2023, arXiv:2307.08691).

#include "attention.h"

namespace {

constexpr float kMasked = -1e30f;

// Online softmax of a chunk of queries over the keys seen so far: the maximum of each query's scores and, relative to
// it, the sum of the weights. The weighted sum of the values is separate.
struct Softmax {
  float largest[kChunk + kLanes], total[kChunk + kLanes];
};

// Reduces each of the first kTileRows vectors to a lane of the result.
template <typename F>
Vector Reduce(Vector* rows, F reduce) {
  Transpose(rows);
  Vector result = rows[0];
  for (int i = 1; i < kLanes; ++i) result = reduce(result, rows[i]);
  return result;
}

// Replaces the scores of kTileRows queries in `range` by weights, zero for keys that a query does not see, and updates
// the state. Writes the factors for earlier sums.
void Update(Softmax& state, int64_t row, float* scores, const Range& range, const Range* seen, float* factors) {
  Vector rows[kLanes] = {};
  for (int i = 0; i < kTileRows; ++i) {
    rows[i] = Broadcast(kMasked);
    for (int64_t j = range.begin; j < range.end; j += kLanes) {
      const Vector x = Load(scores + i * kStride + j);
      rows[i] = Max(rows[i], Within(x, seen[i].begin - j, seen[i].end - j, Broadcast(kMasked)));
    }
  }
  const Vector before = Load(state.largest + row);
  const Vector largest = Max(before, Reduce(rows, Max)), factor = Exp(before - largest);
  StorePartial(state.largest + row, largest, kTileRows), Store(factors, factor);
  for (int i = 0; i < kTileRows; ++i) {
    rows[i] = Vector{};
    for (int64_t j = range.begin; j < range.end; j += kLanes) {
      float* at = scores + i * kStride + j;
      const Vector weight = Within(Exp(Load(at) - state.largest[row + i]), seen[i].begin - j, seen[i].end - j, Vector{});
      Store(at, weight);
      rows[i] += weight;
    }
  }
  const Vector sum = Reduce(rows, [](Vector a, Vector b) { return a + b; });
  StorePartial(state.total + row, Load(state.total + row) * factor + sum, kTileRows);
}

// A task of the forward pass: a chunk of queries of all heads that share a key/value head.
template <typename T>
void ForwardChunk(const Problem& p, const Heads<T>& heads, const float* sinks, int64_t b, int64_t head, int64_t chunk,
                  T* out, float* lse) {
  const int64_t G = p.group(), rows = kChunk * p.width;
  float* q = Scratch((2 * G + 2) * rows + kTileRows * kStride);
  float *sums = q + G * rows, *keys = sums + G * rows, *values = keys + rows, *scores = values + rows;
  std::vector<Softmax> states(G);
  Block block{b, chunk * kChunk, std::min<int64_t>(kChunk, p.T - chunk * kChunk), 0, 0};
  for (int64_t g = 0; g < G; ++g) {
    const int64_t n = head * G + g;
    CopyRows(p, heads.q + p.QueryAt(b, block.query, n), p.N * p.H, block.queries, p.scale, q + g * rows);
    std::fill_n(states[g].largest, kChunk + kLanes, sinks == nullptr ? kMasked : sinks[n]);
    std::fill_n(states[g].total, kChunk + kLanes, sinks == nullptr ? 0 : 1);
  }
  std::memset(sums, 0, G * rows * sizeof(float));
  const int64_t end = block.query + block.queries;
  for (block.key = p.FirstKey(b, block.query); block.key < end; block.key += kChunk) {
    block.keys = std::min<int64_t>(kChunk, end - block.key);
    PackColumns(p, heads.k, block, head, keys);
    PackRows(p, heads.v, block, head, values);
    for (int64_t g = 0; g < G; ++g)
      for (int64_t row = 0; row < block.queries; row += kTileRows) {
        const Range range = VisibleKeys(p, block, row);
        if (range.begin == range.end) continue;
        const int64_t at = g * rows + row * p.width;
        Multiply<true>(q + at, p.width, keys + range.begin * p.H, kPanelCols * p.H, scores + range.begin, kStride, p.H,
                       range.end - range.begin, false);
        Range seen[kTileRows] = {};
        for (int64_t i = 0; i < kTileRows && row + i < block.queries; ++i) seen[i] = SeenBy(p, block, row + i, range);
        float factors[kLanes];
        Update(states[g], row, scores, range, seen, factors);
        for (int64_t i = 0; i < kTileRows; ++i) {
          float* sum = sums + at + i * p.width;
          if (factors[i] != 1)
            for (int64_t j = 0; j < p.width; j += kLanes) Store(sum + j, Load(sum + j) * factors[i]);
        }
        Multiply<true>(scores + range.begin, kStride, values + range.begin * kPanelCols, kPanelCols * block.keys,
                       sums + at, p.width, std::min(range.end, block.keys) - range.begin, p.width, true);
      }
  }
  for (int64_t g = 0; g < G; ++g)
    for (int64_t row = 0; row < block.queries; ++row) {
      const int64_t t = block.query + row, n = head * G + g;
      const float total = states[g].total[row];
      WriteRows(p, sums + g * rows + row * p.width, 1, 1 / total, false, out + p.QueryAt(b, t, n), 0);
      lse[(b * p.N + n) * p.T + t] = states[g].largest[row] + std::log(total);
    }
}

// out[B, T, N, H], of the type of q, k and v, and the logarithm of the softmax's denominator, lse[B, N, T], for the
// sinks[N], or none.
ffi::Error Forward(ffi::ThreadPool pool, Values q, Values k, Values v, Floats sinks, Ints segment_ids,
                   ffi::Result<Values> out, ffi::Result<Floats> lse, int64_t window) {
  const Problem p(q, k, segment_ids, window);
  const float* logits = sinks.element_count() ? sinks.typed_data() : nullptr;
  VisitType(q, [&](auto element) {
    using T = decltype(element);
    const Heads<T> heads(q, k, v);
    auto task = [&](int64_t index) {
      // In a full layer, the last chunks take longest: they run first.
      const int64_t chunk = p.chunks() - 1 - index / (p.B * p.K), row = index % (p.B * p.K);
      ForwardChunk(p, heads, logits, row / p.K, row % p.K, chunk, (T*)out->untyped_data(), lse->typed_data());
    };
    RunPhases({{p.B * p.K * p.chunks(), task}}, pool);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Attention, Forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Values>().Arg<Values>()
                                  .Arg<Floats>().Arg<Ints>().Ret<Values>().Ret<Floats>().Attr<int64_t>("window"));
