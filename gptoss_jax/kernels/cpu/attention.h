// Shared by attention and its gradient. Heads, of type T, float or bfloat16, are read and written in place, in
// [B, T, N, H]. Rows are cut into chunks of kChunk tokens. The scores of a few queries and a chunk of keys are computed
// and used while they are in the L1 cache, and tiles of them that no query sees are skipped.

#pragma once

#define NATIVE_LANES
#include <cmath>

#include "microkernel.h"

namespace {

constexpr int kChunk = 96;  // a multiple of kTileRows and of kPanelCols
static_assert(kChunk % kTileRows == 0 && kChunk % kPanelCols == 0 && kTileLanes == kLanes);
// Rows of scores: not a power of two apart, so that columns do not evict one another from the L1 cache.
constexpr int kStride = kChunk + 16;

struct Problem {
  int64_t B, T, N, K, H, window;
  std::vector<int32_t> starts;  // [B, T], the index at which each token's segment starts
  float scale;
  int64_t width;  // H, padded to whole panels

  Problem(const Values& q, const Values& k, const Ints& segment_ids, int64_t window)
      : B(q.dimensions()[0]), T(q.dimensions()[1]), N(q.dimensions()[2]), K(k.dimensions()[2]), H(q.dimensions()[3]),
        window(window), starts(B * T), scale(1 / std::sqrt((float)H)), width(CeilDiv(H, kPanelCols) * kPanelCols) {
    const int32_t* ids = segment_ids.typed_data();
    for (int64_t i = 0; i < B * T; ++i) starts[i] = i % T && ids[i] == ids[i - 1] ? starts[i - 1] : i % T;
  }

  int64_t chunks() const { return CeilDiv(T, kChunk); }
  int64_t group() const { return N / K; }
  // The first key that a query sees; the last one is its own.
  int64_t FirstKey(int64_t b, int64_t t) const { return std::max<int64_t>(starts[b * T + t], t - window + 1); }
  int64_t QueryAt(int64_t b, int64_t t, int64_t n) const { return ((b * T + t) * N + n) * H; }
  int64_t KeyAt(int64_t b, int64_t t, int64_t k) const { return ((b * T + t) * K + k) * H; }
};

template <typename T>
struct Heads {
  const T *q, *k, *v;

  Heads(const Values& q, const Values& k, const Values& v)
      : q((const T*)q.untyped_data()), k((const T*)k.untyped_data()), v((const T*)v.untyped_data()) {}
};

// Queries of one head and keys, by their index in row b.
struct Block {
  int64_t b, query, queries, key, keys;
};

// Keys of a block, from its first one.
struct Range {
  int64_t begin, end;
};

// The keys that some of kTileRows queries from `row` see, in whole panels.
Range VisibleKeys(const Problem& p, const Block& block, int64_t row) {
  const int64_t first = block.query + row, last = block.query + std::min<int64_t>(row + kTileRows, block.queries) - 1;
  const int64_t begin = std::max<int64_t>(p.FirstKey(block.b, first) - block.key, 0);
  const int64_t end = std::min(last + 1 - block.key, block.keys);
  if (begin >= end) return {0, 0};
  return {begin / kPanelCols * kPanelCols, CeilDiv(end, kPanelCols) * kPanelCols};
}

// The part of a range that one query sees.
Range SeenBy(const Problem& p, const Block& block, int64_t row, const Range& range) {
  const int64_t t = block.query + row;
  return {std::max(p.FirstKey(block.b, t) - block.key, range.begin), std::min(t + 1 - block.key, range.end)};
}

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes), may_alias));

// Sets lanes at and beyond `end`, or before `begin`, to `other`.
inline Vector Within(Vector x, int64_t begin, int64_t end, Vector other) {
  if (begin <= 0 && end >= kLanes) return x;
  Lanes index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  const Lanes low = Lanes{} + (int32_t)std::max<int64_t>(begin, 0);
  const Lanes high = Lanes{} + (int32_t)std::min<int64_t>(end, kLanes);
  return (index >= low) & (index < high) ? x : other;
}

// out[kTileRows, columns] = (first or 0) + a[kTileRows, inner] packed[inner, columns].
template <bool a_is_row_major>
void Multiply(const float* a, int64_t a_stride, const float* packed, int64_t panel_size, float* out, int64_t stride,
              int64_t inner, int64_t columns, bool adds) {
  for (int64_t j = 0; j < columns; j += kPanelCols, packed += panel_size)
    Microkernel<kTileRows, a_is_row_major>(a, a_stride, packed, out + j, stride, inner, adds ? out + j : nullptr,
                                           stride, kPanelCols);
}

// Copies rows[count, H], `stride` apart, times `scale`, and pads them to p.width with zeros.
template <typename T>
void CopyRows(const Problem& p, const T* rows, int64_t stride, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i, rows += stride, to += p.width)
    for (int64_t j = 0; j < p.width; j += kLanes) {
      __builtin_prefetch(rows + kRowsAhead * stride + j);
      Store(to + j, LoadPartial(rows + j, p.H - j) * scale);
    }
}

// to[count, H] = or += rows[count, p.width] * scale.
template <typename T>
void WriteRows(const Problem& p, const float* rows, int64_t count, float scale, bool adds, T* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i, rows += p.width, to += stride)
    for (int64_t j = 0; j < p.H; j += kLanes) {
      Vector value = Load(rows + j) * scale;
      if (adds) value += LoadPartial(to + j, p.H - j);
      StorePartial(to + j, value, p.H - j);
    }
}

// A chunk of keys or values, packed as a matrix [H, keys] or [keys, H].
template <typename T>
void PackColumns(const Problem& p, const T* x, const Block& block, int64_t head, float* packed) {
  Pack(Strided<T>{x + p.KeyAt(block.b, block.key, head), 1, p.K * p.H}, p.H, block.keys, packed);
}
template <typename T>
void PackRows(const Problem& p, const T* x, const Block& block, int64_t head, float* packed) {
  Pack(Strided<T>{x + p.KeyAt(block.b, block.key, head), p.K * p.H, 1}, block.keys, p.H, packed);
}

}  // namespace
