// MXFP4 to float: a block of 32 values is 16 bytes of two codes each, the low nibble first, and one scale byte
// (kernels/mxfp4/codec.py).

#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

constexpr int kBlockSize = 32;
constexpr int kBlockBytes = kBlockSize / 2;

alignas(64) constexpr float kCodes[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                                          -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
alignas(16) constexpr uint8_t kUpperBytes[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                                 0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
alignas(16) constexpr uint8_t kLowerBytes[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
                                                 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};

// 2^(scale - 127); NaN for 255. The smallest, 2^-127, would be flushed to zero: doubled here and halved in LoadCodes.
inline float ScaleOf(uint8_t scale) {
  const uint32_t bits = scale == 255 ? 0x7fc00000u : (uint32_t)(scale ? scale : 1) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

typedef uint8_t ByteLanes __attribute__((vector_size(16)));

// Writes the values of 16 codes, one in each byte, before multiplication by ScaleOf.
inline void StoreCodes(ByteLanes codes, float* to) {
#ifdef __AVX512F__
  _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32((__m128i)codes), _mm512_load_ps(kCodes)));
#elif defined(__AVX2__) && defined(__FMA__)
  // Only the upper two bytes of these floats are not zero: look each up, and move both into place.
  const __m128i first = _mm_shuffle_epi8(_mm_load_si128((const __m128i*)kLowerBytes), (__m128i)codes);
  const __m128i second = _mm_shuffle_epi8(_mm_load_si128((const __m128i*)kUpperBytes), (__m128i)codes);
  const auto widened = [](__m128i pairs) { return _mm256_slli_epi32(_mm256_cvtepu16_epi32(pairs), 16); };
  _mm256_storeu_si256((__m256i*)to, widened(_mm_unpacklo_epi8(first, second)));
  _mm256_storeu_si256((__m256i*)to + 1, widened(_mm_unpackhi_epi8(first, second)));
#else
  for (int i = 0; i < 16; ++i) to[i] = kCodes[codes[i]];
#endif
}

// The low and the high nibbles of 16 bytes.
inline ByteLanes LowNibbles(ByteLanes bytes) { return bytes & 15; }
inline ByteLanes HighNibbles(ByteLanes bytes) { return bytes >> 4; }

// The values of the low and the high nibbles of a block, before multiplication by ScaleOf. Needs vectors of 16 floats.
inline void LoadCodes(const uint8_t* bytes, uint8_t scale, Vector* low, Vector* high) {
  ByteLanes both;
  std::memcpy(&both, bytes, sizeof both);
  StoreCodes(LowNibbles(both), (float*)low);
  StoreCodes(HighNibbles(both), (float*)high);
  if (scale == 0) *low *= 0.5f, *high *= 0.5f;
}

// Transposes 16 rows of 16 bytes by interleaving the first half of the rows with the second, four times.
inline void TransposeBytes(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  constexpr int side = 16;
  ByteLanes rows[side], next[side];
  for (int i = 0; i < side; ++i) std::memcpy(&rows[i], from + i * from_stride, side);
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < side / 2; ++i) {
      const ByteLanes a = rows[i], b = rows[i + side / 2];
#ifdef __SSE2__
      next[2 * i] = (ByteLanes)_mm_unpacklo_epi8((__m128i)a, (__m128i)b);
      next[2 * i + 1] = (ByteLanes)_mm_unpackhi_epi8((__m128i)a, (__m128i)b);
#else
      for (int k = 0; k < side; ++k) {
        next[2 * i][k] = (k % 2 ? b : a)[k / 2];
        next[2 * i + 1][k] = (k % 2 ? b : a)[(k + side) / 2];
      }
#endif
    }
    std::memcpy(rows, next, sizeof rows);
  }
  for (int i = 0; i < side; ++i) std::memcpy(to + i * to_stride, &rows[i], side);
}
