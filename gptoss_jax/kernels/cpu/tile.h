// The vectors of the microkernel, as wide as the registers, and transposes of squares of them.

#pragma once

#include <cstring>
#include <utility>

#include "common.h"

// Accumulators must fit in the registers: AVX2 has 16, of 8 floats.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kTileRows = 6, kTileLanes = 8;
#else
constexpr int kTileRows = 12, kTileLanes = kLanes;
#endif
typedef float Tile __attribute__((vector_size(4 * kTileLanes), aligned(4), may_alias));

// A step of a transpose: swaps a[j] and b[j - step] for each lane j with the bit `step`.
template <int step, int... lane>
void ExchangeLanes(Tile& a, Tile& b, std::integer_sequence<int, lane...>) {
  const Tile low = __builtin_shufflevector(a, b, (lane & step ? kTileLanes + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? kTileLanes + lane : lane + step)...);
  a = low;
}

template <int step>
void ExchangeRows(Tile* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileLanes; ++i)
    if (!(i & step)) ExchangeLanes<step>(rows[i], rows[i + step], std::make_integer_sequence<int, kTileLanes>{});
}

// Transposes kTileLanes tiles.
inline void Transpose(Tile* rows) {
  ExchangeRows<1>(rows), ExchangeRows<2>(rows), ExchangeRows<4>(rows);
  if constexpr (kTileLanes > 8) ExchangeRows<8>(rows);
}

template <typename T>
void Transpose(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
  Tile rows[kTileLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kTileLanes; ++i) rows[i] = Load<Tile>(in + i * in_stride);
  Transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kTileLanes; ++i) *(Tile*)(out + i * out_stride) = rows[i];
}
