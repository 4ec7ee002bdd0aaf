// Shared by the grouped matmul and attention: a small matmul with its sums in registers, and the packing of its right
// operand.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "tile.h"

constexpr int kPanelCols = 2 * kTileLanes;  // columns of C per microkernel
constexpr int kRowsAhead = 8;               // rows of B between a prefetch and its use

template <typename T>
struct Strided {
  const T* data;
  int64_t row_stride, col_stride;
};

// C[rows, width] = first + A[rows, inner] B[inner, width], with a packed panel of B. A has contiguous rows or columns,
// a_stride apart. first may be null, for zero. Not inlined: in a larger function, compilers keep accumulators in memory.
template <int rows, bool a_is_row_major>
__attribute__((noinline)) void Microkernel(const float* a, int64_t a_stride, const float* panel, float* c,
                                           int64_t c_stride, int64_t inner, const float* first, int64_t first_stride,
                                           int width) {
  const int64_t row_stride = a_is_row_major ? a_stride : 1, col_stride = a_is_row_major ? 1 : a_stride;
  // Loops are unrolled to keep the accumulators in registers.
  Tile sum[rows][2] = {};
  if (first != nullptr) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
      for (int side = 0; side < 2; ++side) {
        const int column = side * kTileLanes;
        sum[i][side] = LoadPartial<Tile>(first + i * first_stride + column, width - column);
      }
  }
  for (int64_t j = 0; j < inner; ++j, panel += kPanelCols, a += col_stride) {
    const Tile left = *(const Tile*)panel, right = *(const Tile*)(panel + kTileLanes);
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const float value = a[i * row_stride];
      sum[i][0] += value * left;
      sum[i][1] += value * right;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
    for (int side = 0; side < 2; ++side) {
      const int column = side * kTileLanes;
      StorePartial(c + i * c_stride + column, sum[i][side], width - column);
    }
}

// Packs B[inner, columns] into panels of kPanelCols columns, padded with zeros.
template <typename T>
void Pack(const Strided<T>& matrix, int64_t inner, int64_t columns, float* packed) {
  const T* b = matrix.data;
  if (matrix.col_stride == 1) {
    // Row by row, and ahead: processors prefetch a row, but not the start of the next one.
    for (int64_t i = 0; i < inner; ++i, b += matrix.row_stride)
      for (int64_t j = 0; j < columns; j += kPanelCols) {
        __builtin_prefetch(b + kRowsAhead * matrix.row_stride + j);
        for (int x = 0; x < kPanelCols; x += kTileLanes)
          *(Tile*)(packed + j * inner + i * kPanelCols + x) = LoadPartial<Tile>(b + j + x, columns - j - x);
      }
    return;
  }
  for (int64_t j = 0; j < columns; j += kPanelCols, packed += kPanelCols * inner) {
    const int64_t width = std::min<int64_t>(kPanelCols, columns - j);
    int64_t done = 0;
    for (; width == kPanelCols && done + kTileLanes <= inner; done += kTileLanes)
      for (int x = 0; x < kPanelCols; x += kTileLanes)
        Transpose(b + done + x * matrix.col_stride, matrix.col_stride, packed + done * kPanelCols + x, kPanelCols);
    for (int64_t i = done; i < inner; ++i)
      for (int x = 0; x < kPanelCols; ++x)
        packed[i * kPanelCols + x] = x < width ? LoadOne(b + i + x * matrix.col_stride) : 0;
    b += kPanelCols * matrix.col_stride;
  }
}

// Returns this thread's memory, at least `count` floats, aligned to cache lines. Each call may overwrite it.
inline float* Scratch(int64_t count) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (count > capacity) {
    const int64_t size = CeilDiv(count, 16) * 16;
    capacity = 0;
    memory.reset((float*)std::aligned_alloc(64, size * sizeof(float)));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = size;
  }
  return memory.get();
}
