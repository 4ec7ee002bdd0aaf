// MXFP4 to float: a block of 32 values is 16 bytes of two codes each, the low nibble first, and one scale byte
// (kernels/mxfp4/codec.py).

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "common.h"

constexpr int kBlockSize = 32;
constexpr int kBlockBytes = kBlockSize / 2;

alignas(64) constexpr float kCodes[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                                          -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// 2^(scale - 127); NaN for 255. The smallest, 2^-127, would be flushed to zero: doubled here and halved in LoadCodes.
inline float ScaleOf(uint8_t scale) {
  const uint32_t bits = scale == 255 ? 0x7fc00000u : (uint32_t)(scale ? scale : 1) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The values of the low and the high nibbles of a block, before multiplication by ScaleOf.
inline void LoadCodes(const uint8_t* bytes, uint8_t scale, Vector* low, Vector* high) {
#ifdef __AVX512F__
  const __m512 table = _mm512_load_ps(kCodes);
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
  // A permutation reads only the lowest four bits of an index.
  *low = (Vector)_mm512_permutexvar_ps(wide, table);
  *high = (Vector)_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
#else
  for (int i = 0; i < kBlockBytes; ++i) {
    (*low)[i] = kCodes[bytes[i] & 15];
    (*high)[i] = kCodes[bytes[i] >> 4];
  }
#endif
  if (scale == 0) *low *= 0.5f, *high *= 0.5f;
}
