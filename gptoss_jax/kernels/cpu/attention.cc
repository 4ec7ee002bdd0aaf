// Attention of whole rows, without an array of scores in memory (Dao 2023, arXiv:2307.08691).

#include "attention.h"

namespace {

constexpr float kMasked = -1e30f;

inline float HorizontalMax(Vector v) {
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, v[i]);
  return largest;
}

// Online softmax of a query over the keys seen so far: the maximum of the scores and, relative to it, the sum of the
// weights. The weighted sum of the values is separate.
struct Softmax {
  float largest, total;
};

// Replaces the scores in `range` by weights, zero for keys that the query does not see, and updates the state. Returns
// the factor for earlier sums.
float Update(Softmax& state, float* scores, const Range& range, const Range& seen) {
  Vector maximum = Broadcast(state.largest);
  for (int64_t j = range.begin; j < range.end; j += kLanes) {
    const Vector x = Within(Load(scores + j), seen.begin - j, seen.end - j, Broadcast(kMasked));
    maximum = Max(maximum, x);
  }
  const float largest = HorizontalMax(maximum), factor = std::exp(state.largest - largest);
  Vector total = {};
  for (int64_t j = range.begin; j < range.end; j += kLanes) {
    const Vector weight = Within(Exp(Load(scores + j) - largest), seen.begin - j, seen.end - j, Vector{});
    Store(scores + j, weight);
    total += weight;
  }
  state = {largest, state.total * factor + HorizontalSum(total)};
  return factor;
}

// A task of the forward pass: a chunk of queries of all heads that share a key/value head.
void ForwardChunk(const Problem& p, const float* sinks, int64_t b, int64_t head, int64_t chunk, float* out,
                  float* lse) {
  const int64_t G = p.group(), rows = kChunk * p.width;
  float* q = Scratch((2 * G + 2) * rows + kTileRows * kStride);
  float *sums = q + G * rows, *keys = sums + G * rows, *values = keys + rows, *scores = values + rows;
  std::vector<Softmax> states(G * kChunk);
  Block block{b, chunk * kChunk, std::min<int64_t>(kChunk, p.T - chunk * kChunk), 0, 0};
  for (int64_t g = 0; g < G; ++g) {
    const int64_t n = head * G + g;
    CopyRows(p, p.q + p.QueryAt(b, block.query, n), p.N * p.H, block.queries, p.scale, q + g * rows);
    const Softmax first = sinks == nullptr ? Softmax{kMasked, 0} : Softmax{sinks[n], 1};
    std::fill_n(&states[g * kChunk], kChunk, first);
  }
  std::memset(sums, 0, G * rows * sizeof(float));
  const int64_t end = block.query + block.queries;
  for (block.key = p.FirstKey(b, block.query); block.key < end; block.key += kChunk) {
    block.keys = std::min<int64_t>(kChunk, end - block.key);
    PackColumns(p, p.k, block, head, keys);
    PackRows(p, p.v, block, head, values);
    for (int64_t g = 0; g < G; ++g)
      for (int64_t row = 0; row < block.queries; row += kTileRows) {
        const Range range = VisibleKeys(p, block, row);
        if (range.begin == range.end) continue;
        const int64_t at = g * rows + row * p.width;
        Multiply<true>(q + at, p.width, keys + range.begin * p.H, kPanelCols * p.H, scores + range.begin, kStride, p.H,
                       range.end - range.begin, false);
        for (int64_t i = 0; i < kTileRows && row + i < block.queries; ++i) {
          Softmax& state = states[g * kChunk + row + i];
          const float factor = Update(state, scores + i * kStride, range, SeenBy(p, block, row + i, range));
          float* sum = sums + at + i * p.width;
          if (factor != 1)
            for (int64_t j = 0; j < p.width; j += kLanes) Store(sum + j, Load(sum + j) * factor);
        }
        Multiply<true>(scores + range.begin, kStride, values + range.begin * kPanelCols, kPanelCols * block.keys,
                       sums + at, p.width, std::min(range.end, block.keys) - range.begin, p.width, true);
      }
  }
  for (int64_t g = 0; g < G; ++g)
    for (int64_t row = 0; row < block.queries; ++row) {
      const int64_t t = block.query + row, n = head * G + g;
      const Softmax& state = states[g * kChunk + row];
      WriteRows(p, sums + g * rows + row * p.width, 1, 1 / state.total, false, out + p.QueryAt(b, t, n), 0);
      lse[(b * p.N + n) * p.T + t] = state.largest + std::log(state.total);
    }
}

// out[B, T, N, H], and the logarithm of the softmax's denominator, lse[B, N, T], for the sinks[N], or none.
ffi::Error Forward(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats sinks, Ints segment_ids,
                   ffi::Result<Floats> out, ffi::Result<Floats> lse, int64_t window) {
  const Problem p(q, k, v, segment_ids, window);
  const float* logits = sinks.element_count() ? sinks.typed_data() : nullptr;
  auto task = [&](int64_t index) {
    // In a full layer, the last chunks take longest: they run first.
    const int64_t chunk = p.chunks() - 1 - index / (p.B * p.K), row = index % (p.B * p.K);
    ForwardChunk(p, logits, row / p.K, row % p.K, chunk, out->typed_data(), lse->typed_data());
  };
  RunPhases({{p.B * p.K * p.chunks(), task}}, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Attention, Forward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Floats>().Arg<Ints>().Ret<Floats>().Ret<Floats>().Attr<int64_t>("window"));
