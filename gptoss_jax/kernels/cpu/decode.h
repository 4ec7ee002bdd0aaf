// Decoding: matmuls of a few tokens with much larger matrices. Run time is the time to read each used matrix once, in
// memory order. Every call takes weights stacked over layers and a layer index: nothing is copied out of a stack.

#pragma once

// Wider vectors than registers are slow: compilers keep them in memory.
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define VECTOR_LANES 8
#endif

#include "common.h"

namespace {

constexpr int kTokenBlock = 4;           // tokens per pass over a matrix
constexpr int64_t kInnerBlock = 64;      // matrix rows that stay in cache for the next tokens
constexpr int64_t kPrefetchDistance = 3072;  // in bytes, into the L2 cache
constexpr int64_t kMaxSplitRows = 192;   // per task of a WorkSplit
constexpr int64_t kMaxSplitCols = 2048;
constexpr int64_t kMaxCols = 512;        // per task, if a matrix is split only by columns
constexpr int64_t kMinCols = 64;
constexpr int64_t kDotFloats = 1 << 14;  // of a transposed matrix, that stay in cache for the next tokens

// Columns per task, for `columns` in total, in matrices of `width`, shared by all threads.
int64_t TaskColumns(int64_t columns, int64_t width, ffi::ThreadPool& pool) {
  const int64_t share = columns / (3 * std::max<int64_t>(pool.num_threads(), 1)) / kLanes * kLanes;
  return std::min(std::max(share, kMinCols), std::min(kMaxCols, CeilDiv(width, kLanes) * kLanes));
}

// Calls f with the weights from index `start` on. Floats are rounded to bfloat16 as they are read, if `rounded`.
template <typename F>
void VisitWeights(const Values& weights, bool rounded, int64_t start, F f) {
  const void* data = weights.untyped_data();
  if (weights.element_type() == ffi::BF16)
    f((const BFloat16*)data + start);
  else if (rounded)
    f((const Rounded*)data + start);
  else
    f((const float*)data + start);
}

struct TokenBlock {
  const float* x[kTokenBlock];
  float* y[kTokenBlock];
};

// Calls f(first, n) for blocks of at most kTokenBlock tokens; n is a std::integral_constant.
template <typename F>
void ForEachRowBlock(int64_t tokens, F f) {
  for (int64_t i = 0; i < tokens; i += kTokenBlock) {
    switch (tokens - i) {
      case 1: f(i, std::integral_constant<int, 1>{}); break;
      case 2: f(i, std::integral_constant<int, 2>{}); break;
      case 3: f(i, std::integral_constant<int, 3>{}); break;
      default: f(i, std::integral_constant<int, kTokenBlock>{});
    }
  }
}

// y[i][0 : columns] += x[i][0 : inner] w[0 : inner, 0 : columns] for each token; rows of w are `stride` apart.
template <int tokens, typename W>
void AddProduct(const TokenBlock& t, const W* w, int64_t stride, int64_t inner, int64_t columns) {
  // For one token, a single stream from memory is fastest with AVX-512. With AVX2 or more tokens, loads and stores of
  // their sums dominate, so process four rows of w at a time.
  constexpr int rows = tokens == 1 && kLanes == 16 ? 1 : 4;
  const int64_t prefetch = rows == 1 ? kPrefetchDistance / sizeof(W) : rows * stride;
  int64_t j = 0;
  for (; j + rows <= inner; j += rows, w += rows * stride) {
    Vector x[tokens][rows];
    for (int i = 0; i < tokens; ++i)
      for (int r = 0; r < rows; ++r) x[i][r] = Broadcast(t.x[i][j + r]);
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      Vector value[rows];
      for (int r = 0; r < rows; ++r) {
        value[r] = Load(w + r * stride + c);
        __builtin_prefetch(w + r * stride + c + prefetch, 0, 2);
      }
      for (int i = 0; i < tokens; ++i) {
        Vector sum = Load(t.y[i] + c);
        for (int r = 0; r < rows; ++r) sum += x[i][r] * value[r];
        Store(t.y[i] + c, sum);
      }
    }
    for (; c < columns; ++c)
      for (int i = 0; i < tokens; ++i)
        for (int r = 0; r < rows; ++r) t.y[i][c] += t.x[i][j + r] * LoadOne(w + r * stride + c);
  }
  for (; j < inner; ++j, w += stride)
    for (int i = 0; i < tokens; ++i)
      for (int64_t c = 0; c < columns; ++c) t.y[i][c] += t.x[i][j] * LoadOne(w + c);
}

// AddProduct for any number of tokens.
template <typename W>
void AddProducts(const std::vector<const float*>& x, const std::vector<float*>& y, const W* w, int64_t stride,
                 int64_t inner, int64_t columns) {
  for (int64_t from = 0; from < inner; from += kInnerBlock) {
    ForEachRowBlock(x.size(), [&](int64_t first, auto n) {
      TokenBlock t;
      for (int i = 0; i < n; ++i) t.x[i] = x[first + i] + from, t.y[i] = y[first + i];
      AddProduct<n()>(t, w + from * stride, stride, std::min(kInnerBlock, inner - from), columns);
    });
  }
}

// y[i][0 : columns] = x[i][0 : inner] w[0 : columns, 0 : inner]^T for each token.
template <int tokens, typename W>
void DotRows(const TokenBlock& t, const W* w, int64_t inner, int64_t columns) {
  constexpr int rows = kLanes < 16 && tokens > 2 ? 2 : 4;  // of w at a time; their sums are in registers
  for (int64_t c = 0; c < columns; c += rows) {
    const int count = std::min<int64_t>(rows, columns - c);
    const W* row[rows];
    for (int r = 0; r < rows; ++r) row[r] = w + (c + std::min(r, count - 1)) * inner;
    Vector sum[tokens][rows] = {};
    int64_t j = 0;
    for (; j + kLanes <= inner; j += kLanes)
      for (int r = 0; r < rows; ++r) {
        const Vector value = Load(row[r] + j);
        for (int i = 0; i < tokens; ++i) sum[i][r] += Load(t.x[i] + j) * value;
      }
    for (int i = 0; i < tokens; ++i)
      for (int r = 0; r < count; ++r) {
        float total = HorizontalSum(sum[i][r]);
        for (int64_t k = j; k < inner; ++k) total += t.x[i][k] * LoadOne(row[r] + k);
        t.y[i][c + r] = total;
      }
  }
}

// Splits the [inner, columns] matrices of some groups into tasks, of whole rows where possible, because these are
// contiguous in memory. The split, and thus the rounding of sums, depends only on the sizes of the matrices.
struct WorkSplit {
  int64_t groups, inner, columns, parts, column_blocks;

  WorkSplit(int64_t groups, int64_t inner, int64_t columns)
      : groups(groups), inner(inner), columns(columns), parts(std::max<int64_t>(1, CeilDiv(inner, kMaxSplitRows))),
        column_blocks(CeilDiv(columns, kMaxSplitCols)) {}

  int64_t num_tasks() const { return groups * parts * column_blocks; }

  struct Task {
    int64_t group, part, row, num_rows, column, num_columns;
  };
  Task task(int64_t index) const {
    const int64_t block = index % column_blocks, part = index / column_blocks % parts;
    const int64_t max_rows = CeilDiv(inner, parts), row = part * max_rows;
    const int64_t width = CeilDiv(columns / column_blocks, kLanes) * kLanes, column = block * width;
    const int64_t end = block + 1 == column_blocks ? columns : column + width;
    return {index / column_blocks / parts, part, row, std::max<int64_t>(0, std::min(max_rows, inner - row)), column,
            end - column};
  }
};

// y = x w in the tasks of a WorkSplit. The first part of the rows of w writes to y, the others to partial sums, which
// are added in order.
struct SplitMatmul {
  WorkSplit split;
  int64_t num_rows;
  float* y;                               // [num_rows, columns]
  std::unique_ptr<float[]> partial_sums;  // [parts - 1, num_rows, columns]

  SplitMatmul(WorkSplit split, int64_t num_rows, float* y)
      : split(split), num_rows(num_rows), y(y), partial_sums(Uninitialized((split.parts - 1) * size())) {}

  int64_t size() const { return num_rows * split.columns; }

  // Computes the given rows of y with their w and bias (or null); x(r) is the row of x for row r of y.
  template <typename W, typename X>
  void Multiply(const WorkSplit::Task& t, const W* w, const float* bias, const std::vector<int64_t>& rows,
                X x) const {
    std::vector<const float*> from;
    std::vector<float*> to;
    for (int64_t r : rows) {
      float* sums = t.part == 0 ? y : partial_sums.get() + (t.part - 1) * size();
      from.push_back(x(r) + t.row), to.push_back(sums + r * split.columns + t.column);
      if (bias && t.part == 0)
        std::memcpy(to.back(), bias + t.column, t.num_columns * sizeof(float));
      else
        std::memset(to.back(), 0, t.num_columns * sizeof(float));
    }
    AddProducts(from, to, w + t.row * split.columns + t.column, split.columns, t.num_rows, t.num_columns);
  }

  void AddPartialSums(int64_t row) const {
    for (int64_t part = 1; part < split.parts; ++part) {
      const float* sums = partial_sums.get() + (part - 1) * size() + row * split.columns;
      for (int64_t c = 0; c < split.columns; ++c) y[row * split.columns + c] += sums[c];
    }
  }
};

}  // namespace
