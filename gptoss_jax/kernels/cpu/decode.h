// Decoding on CPU: a handful of rows times matrices that are far larger than they are, so that time is that of reading
// the matrices once, line by line, as they lie in memory. Each call gets the matrices of all layers and the number of
// one: nothing is copied out of a stack.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"

namespace {

constexpr int kRows = 4;          // worked through together
constexpr int64_t kInner = 64;    // lines of a matrix that stay in the cache while further rows use them
constexpr int64_t kAhead = 768;   // numbers that are prefetched ahead of those in use, to the second cache
constexpr int64_t kLines = 192;   // lines of a task at most, where a matrix is shared out by lines, as they lie in memory
constexpr int64_t kWide = 2048;   // and columns
constexpr int64_t kBlock = 512;   // columns of a task at most, where it is shared out by columns
constexpr int64_t kLeast = 64;    // and at least

using Floats = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;
using Ints = ffi::Buffer<ffi::S32>;

// So many numbers that somebody is to write.
std::unique_ptr<float[]> Unset(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

// Columns of a task, where `columns` in all are to be shared among the threads.
int64_t BlockOf(int64_t columns, int64_t width, ffi::ThreadPool& pool) {
  const int64_t share = columns / (3 * std::max<int64_t>(pool.num_threads(), 1)) / kLanes * kLanes;
  return std::min(std::max(share, kLeast), std::min(kBlock, (width + kLanes - 1) / kLanes * kLanes));
}

struct Rows {
  const float* x[kRows];
  float* y[kRows];
};

// y[i][0 : columns] += x[i][0 : inner] w[0 : inner, 0 : columns] for each of the rows.
template <int rows>
void Add(const Rows& r, const float* w, int64_t w_line, int64_t inner, int64_t columns) {
  // One row has little to add: a single stream from memory is the fastest. More rows would do nothing but load and store
  // their sums, so they take four lines at a time.
  constexpr int lines = rows == 1 ? 1 : 4;
  const int64_t ahead = rows == 1 ? kAhead : lines * w_line;
  int64_t j = 0;
  for (; j + lines <= inner; j += lines, w += lines * w_line) {
    Vector x[rows][lines];
    for (int i = 0; i < rows; ++i)
      for (int l = 0; l < lines; ++l) x[i][l] = Vector{} + r.x[i][j + l];
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      Vector one[lines];
      for (int l = 0; l < lines; ++l) {
        one[l] = Load(w + l * w_line + c);
        __builtin_prefetch(w + l * w_line + c + ahead, 0, 2);
      }
      for (int i = 0; i < rows; ++i) {
        Vector sum = Load(r.y[i] + c);
        for (int l = 0; l < lines; ++l) sum += x[i][l] * one[l];
        Store(r.y[i] + c, sum);
      }
    }
    for (; c < columns; ++c)
      for (int i = 0; i < rows; ++i)
        for (int l = 0; l < lines; ++l) r.y[i][c] += r.x[i][j + l] * w[l * w_line + c];
  }
  for (; j < inner; ++j, w += w_line)
    for (int i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) r.y[i][c] += r.x[i][j] * w[c];
}

float Total(Vector v) {
  float sum = 0;
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return sum + v[0];
}

// y[i][0 : columns] = x[i][0 : inner] w[0 : columns, 0 : inner]^T.
template <int rows>
void Dot(const Rows& r, const float* w, int64_t w_line, int64_t inner, int64_t columns) {
  constexpr int together = 4;
  for (int64_t c = 0; c < columns; c += together) {
    const int count = std::min<int64_t>(together, columns - c);
    const float* line[together];
    for (int l = 0; l < together; ++l) line[l] = w + (c + std::min(l, count - 1)) * w_line;
    Vector sum[rows][together] = {};
    int64_t j = 0;
    for (; j + kLanes <= inner; j += kLanes)
      for (int l = 0; l < together; ++l) {
        const Vector one = Load(line[l] + j);
        for (int i = 0; i < rows; ++i) sum[i][l] += Load(r.x[i] + j) * one;
      }
    for (int i = 0; i < rows; ++i)
      for (int l = 0; l < count; ++l) {
        float total = Total(sum[i][l]);
        for (int64_t k = j; k < inner; ++k) total += r.x[i][k] * line[l][k];
        r.y[i][c + l] = total;
      }
  }
}

// Calls one(first, rows) for at most kRows rows at a time.
template <typename F>
void InFours(int64_t rows, F one) {
  for (int64_t i = 0; i < rows; i += kRows) one(i, std::min<int64_t>(kRows, rows - i));
}

#define BY_COUNT(count, function, ...)            \
  switch (count) {                                \
    case 1: function<1>(__VA_ARGS__); break;      \
    case 2: function<2>(__VA_ARGS__); break;      \
    case 3: function<3>(__VA_ARGS__); break;      \
    default: function<4>(__VA_ARGS__);            \
  }

// y[R, columns] += x[R, inner] w[inner, columns], any number of rows.
void AddAll(const std::vector<const float*>& x, const std::vector<float*>& y, const float* w, int64_t w_line,
            int64_t inner, int64_t columns) {
  for (int64_t from = 0; from < inner; from += kInner) {
    InFours(x.size(), [&](int64_t first, int count) {
      Rows r;
      for (int i = 0; i < count; ++i) r.x[i] = x[first + i] + from, r.y[i] = y[first + i];
      BY_COUNT(count, Add, r, w + from * w_line, w_line, std::min(kInner, inner - from), columns)
    });
  }
}

// How the matrices [lines, columns] of some groups are shared out: whole lines as far as possible, which lie one
// after another in memory. The parts do not depend on what else is asked for, so neither does how sums are rounded.
struct Shares {
  int64_t groups, lines, columns, parts, blocks;

  Shares(int64_t groups, int64_t lines, int64_t columns)
      : groups(groups), lines(lines), columns(columns), parts(std::max<int64_t>(1, (lines + kLines - 1) / kLines)),
        blocks((columns + kWide - 1) / kWide) {}

  int64_t tasks() const { return groups * parts * blocks; }

  struct One {
    int64_t group, part, line, count, column, width;
  };
  One at(int64_t task) const {
    const int64_t block = task % blocks, part = task / blocks % parts;
    const int64_t share = (lines + parts - 1) / parts, width = (columns / blocks + kLanes - 1) / kLanes * kLanes;
    const int64_t line = part * share, column = block * width;
    // The last block takes what is left.
    const int64_t end = block + 1 == blocks ? columns : column + width;
    return {task / blocks / parts, part, line, std::max<int64_t>(0, std::min(share, lines - line)), column, end - column};
  }
};

}  // namespace
