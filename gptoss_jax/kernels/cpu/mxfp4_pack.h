// Packs matrices in MXFP4 into panels for the microkernel.

#pragma once

#include <algorithm>

#include "microkernel.h"
#include "mxfp4.h"

// A matrix whose rows are `groups` blocks of 32 values.
struct Mxfp4Matrix {
  const uint8_t *blocks, *scales;
  int64_t groups;
};

// Loads the values of a block in order.
inline void LoadBlock(const Mxfp4Matrix& m, int64_t index, float* to) {
  const uint8_t scale = m.scales[index];
  ByteLanes both;
  std::memcpy(&both, m.blocks + index * kBlockBytes, sizeof both);
  const ByteLanes low = LowNibbles(both), high = HighNibbles(both);
  StoreCodes(__builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), to);
  StoreCodes(__builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), to + 16);
  for (int i = 0; i < kBlockSize; i += kTileLanes) {
    Tile values = Load<Tile>(to + i);
    if (scale == 0) values *= 0.5f;
    Store(to + i, values * ScaleOf(scale));
  }
}

// Packs rows row … row + inner - 1 and columns column … column + columns - 1 of a matrix, in the order of its bytes.
inline void PackRows(const Mxfp4Matrix& m, int64_t row, int64_t inner, int64_t column, int64_t columns, float* packed) {
  static_assert(kBlockSize % kPanelCols == 0);
  for (int64_t i = 0; i < inner; ++i)
    for (int64_t j = 0; j < columns; j += kBlockSize) {
      float values[kBlockSize];
      LoadBlock(m, (row + i) * m.groups + (column + j) / kBlockSize, values);
      for (int x = 0; x < kBlockSize; x += kPanelCols)
        std::memcpy(packed + (j + x) * inner + i * kPanelCols, values + x, kPanelCols * sizeof(float));
    }
}

// Packs the transpose of rows column … column + columns - 1 and columns row … row + inner - 1 of a matrix: transposes
// the bytes of 16 rows, so that the codes of one of its columns are in one vector.
inline void PackRowsTransposed(const Mxfp4Matrix& m, int64_t column, int64_t columns, int64_t row, int64_t inner,
                               float* packed) {
  constexpr int side = 16;
  static_assert(kPanelCols % side == 0 && side % kTileLanes == 0 && kBlockBytes == side);
  for (int64_t j = 0; j < CeilDiv(columns, kPanelCols) * kPanelCols; j += side) {
    float* panel = packed + j / kPanelCols * kPanelCols * inner + j % kPanelCols;
    const int width = std::clamp<int64_t>(columns - j, 0, side);
    for (int64_t i = 0; i < inner; i += kBlockSize) {
      const int64_t first = (column + j) * m.groups + (row + i) / kBlockSize;
      alignas(64) uint8_t bytes[side][side] = {};
      alignas(64) float scales[side] = {}, halves[side] = {};
      bool has_smallest = false;
      for (int x = 0; x < width; ++x) {
        const uint8_t scale = m.scales[first + x * m.groups];
        scales[x] = ScaleOf(scale), halves[x] = scale == 0 ? 0.5f : 1.0f, has_smallest |= scale == 0;
      }
      if (width == side) {
        TransposeBytes(m.blocks + first * kBlockBytes, m.groups * kBlockBytes, bytes[0], side);
      } else {
        for (int x = 0; x < width; ++x)
          for (int b = 0; b < side; ++b) bytes[b][x] = m.blocks[(first + x * m.groups) * kBlockBytes + b];
      }
      for (int k = 0; k < kBlockSize; ++k) {
        ByteLanes both;
        std::memcpy(&both, bytes[k / 2], sizeof both);
        alignas(64) float values[side];
        StoreCodes(k % 2 ? HighNibbles(both) : LowNibbles(both), values);
        for (int x = 0; x < side; x += kTileLanes) {
          Tile value = Load<Tile>(values + x);
          if (has_smallest) value *= Load<Tile>(halves + x);
          Store(panel + (i + k) * kPanelCols + x, value * Load<Tile>(scales + x));
        }
      }
    }
  }
}
