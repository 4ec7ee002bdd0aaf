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

// The values of the low and the high nibbles of a block, before multiplication by ScaleOf. Needs vectors of 16 floats.
inline void LoadCodes(const uint8_t* bytes, uint8_t scale, Vector* low, Vector* high) {
#ifdef __AVX512F__
  const __m512 table = _mm512_load_ps(kCodes);
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
  // A permutation reads only the lowest four bits of an index.
  *low = (Vector)_mm512_permutexvar_ps(wide, table);
  *high = (Vector)_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
#elif defined(__AVX2__) && defined(__FMA__)
  // Only the upper two bytes of these floats are not zero: look each up, and move both into place.
  const __m128i upper = _mm_load_si128((const __m128i*)kUpperBytes);
  const __m128i lower = _mm_load_si128((const __m128i*)kLowerBytes);
  const __m128i nibble = _mm_set1_epi8(15), both = _mm_loadu_si128((const __m128i*)bytes);
  const auto values = [&](__m128i codes, Vector* to) {
    const __m128i first = _mm_shuffle_epi8(lower, codes), second = _mm_shuffle_epi8(upper, codes);
    const auto widened = [](__m128i pairs) { return _mm256_slli_epi32(_mm256_cvtepu16_epi32(pairs), 16); };
    _mm256_storeu_si256((__m256i*)to, widened(_mm_unpacklo_epi8(first, second)));
    _mm256_storeu_si256((__m256i*)to + 1, widened(_mm_unpackhi_epi8(first, second)));
  };
  values(_mm_and_si128(both, nibble), low);
  values(_mm_and_si128(_mm_srli_epi16(both, 4), nibble), high);
#else
  for (int i = 0; i < kBlockBytes; ++i) {
    (*low)[i] = kCodes[bytes[i] & 15];
    (*high)[i] = kCodes[bytes[i] >> 4];
  }
#endif
  if (scale == 0) *low *= 0.5f, *high *= 0.5f;
}
