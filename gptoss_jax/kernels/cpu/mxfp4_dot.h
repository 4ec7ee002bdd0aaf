// Dot products of a few tokens with rows in MXFP4, in chunks of a vector of codes.
//
// With products of bytes (AVX2, AVX-512 VNNI), activations are 24-bit integers relative to the largest value of their
// block of 32, rounded by at most 2^-22 of that value: as little as a sum in float32 rounds, unless the largest value
// meets a code of zero. SwiGLU's limit of 7 bounds activations by 56, so that one is then off by 1.4e-5. An integer is
// three signed bytes, digits in base 256, multiplied with codes that are unsigned bytes: in halves, and plus 12. Sums
// over the 8 or 16 values of a lane are exact, and become floats just before they are multiplied by the scales of the
// block.

#pragma once

#include <limits>

#include "decode.h"
#include "mxfp4.h"

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) || defined(__AVX2__) && defined(__FMA__)
constexpr int kChunkBlocks = 4;
#else
constexpr int kChunkBlocks = 1;
#endif
constexpr int kChunkSize = kChunkBlocks * kBlockSize;
constexpr int kChunkBytes = kChunkBlocks * kBlockBytes;
constexpr int64_t kPrefetchBytes = 1024;

// How bytes of scales become floats: all but the smallest, 2^-127, which would be flushed to zero, and 255, which is
// NaN and becomes infinity; or only these two, the former doubled.
enum class Scales { kUsual, kSpecial };

#if defined(__AVX2__) && defined(__FMA__)

constexpr int kCodeOffset = 12;
alignas(16) constexpr int8_t kOffsetCodes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// The scales of a chunk.
template <Scales which>
inline __m128 LoadScales(const uint8_t* scale) {
  if constexpr (which == Scales::kSpecial) {
    float values[4];
    for (int i = 0; i < 4; ++i) values[i] = scale[i] == 0 || scale[i] == 255 ? ScaleOf(scale[i]) : 0;
    return _mm_loadu_ps(values);
  }
  int32_t bytes;
  std::memcpy(&bytes, scale, sizeof bytes);
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)), 23));
}

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int kDotLanes = 16;  // of 32 bits; each has 8 values of a block
constexpr int LaneOf(int block, int byte) { return 4 * block + byte / 4; }
constexpr int PlaceOf(int block, int byte, int odd) { return odd * kChunkBytes + block * kBlockBytes + byte; }
#else
constexpr int kDotLanes = 8;  // of 32 bits; each has 16 values of a block
// Quarters of a register have blocks 0, 2, 1, 3: first the lower halves of all blocks, then the upper ones.
constexpr int QuarterOf(int block) { return block % 2 * 2 + block / 2; }
constexpr int LaneOf(int block, int byte) { return 2 * QuarterOf(block) + byte % 8 / 4; }
constexpr int PlaceOf(int block, int byte, int odd) {
  return (byte / 8 * 2 + odd) * 32 + 8 * QuarterOf(block) + byte % 8;
}
#endif

struct alignas(64) Chunk {
  int8_t digits[3][2 * kChunkBytes];  // the highest first
  int32_t offset[kDotLanes];         // kCodeOffset times the sum of a lane's integers
  float unit[kDotLanes];             // the value of an integer 1 times a code of a half; NaN if one is not finite

  void SetBlock(int block, const float* x) {
    uint32_t bits[kBlockSize], max = 0;
    std::memcpy(bits, x, sizeof bits);
    for (int i = 0; i < kBlockSize; ++i) max = std::max(max, bits[i] & 0x7fffffffu);
    // Integers must not exceed 0x7f7f7f: the carries of the lower digits would overflow the highest. What is added
    // keeps them at 0x7f7f00.
    const int exponent = std::min<int>(252, 22 + 254 - (int)((max + 0x10200u) >> 23));
    const float factor = ScaleOf(exponent), unit_value = ScaleOf(253 - exponent);
    const bool is_finite = max < 0x7f800000u;
    for (int i = 0; i < kBlockBytes; ++i)
      unit[LaneOf(block, i)] = is_finite ? unit_value : std::numeric_limits<float>::quiet_NaN();
    if (!is_finite) return;
    for (int odd = 0; odd < 2; ++odd) {
      int32_t values[kBlockBytes];
      for (int i = 0; i < kBlockBytes; ++i) {
        const float scaled = x[2 * i + odd] * factor;
        values[i] = (int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
      }
      for (int i = 0; i < kBlockBytes; ++i) {
        const int32_t middle = (values[i] + 128) >> 8;
        const int place = PlaceOf(block, i, odd);
        digits[0][place] = (int8_t)((middle + 128) >> 8);
        digits[1][place] = (int8_t)middle;
        digits[2][place] = (int8_t)values[i];
        offset[LaneOf(block, i)] += kCodeOffset * values[i];
      }
    }
  }
};

#endif

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

using Sums = __m512;

// The codes of a chunk, plus kCodeOffset, in low and high nibbles, and their scales.
template <Scales which>
struct Codes {
  __m512i low, high;
  __m512 scales;

  Codes(const uint8_t* bytes, const uint8_t* scale) {
    const __m512i codes = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kOffsetCodes));
    const __m512i nibble = _mm512_set1_epi8(15), value = _mm512_loadu_si512(bytes);
    low = _mm512_shuffle_epi8(codes, _mm512_and_si512(value, nibble));
    high = _mm512_shuffle_epi8(codes, _mm512_and_si512(_mm512_srli_epi16(value, 4), nibble));
    const __m512i block_of_lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    scales = _mm512_permutexvar_ps(block_of_lane, _mm512_castps128_ps512(LoadScales<which>(scale)));
  }
};

template <Scales which>
inline Sums AddChunk(Sums sums, const Codes<which>& w, const Chunk& x) {
  __m512i total = _mm512_setzero_si512();
  for (const auto& digit : x.digits) {
    total = _mm512_dpbusd_epi32(_mm512_slli_epi32(total, 8), w.low, _mm512_load_si512(digit));
    total = _mm512_dpbusd_epi32(total, w.high, _mm512_load_si512(digit + kChunkBytes));
  }
  total = _mm512_sub_epi32(total, _mm512_load_si512(x.offset));
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_load_ps(x.unit)), w.scales, sums);
}

inline float Total(Sums sums) { return HorizontalSum((Vector)sums); }

#elif defined(__AVX2__) && defined(__FMA__)

using Sums = __m256;

// The codes of a chunk, plus kCodeOffset, in the order of Chunk::digits, and their scales.
template <Scales which>
struct Codes {
  __m256i codes[4];
  __m256 scales;

  Codes(const uint8_t* bytes, const uint8_t* scale) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kOffsetCodes));
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i first = _mm256_loadu_si256((const __m256i*)bytes);
    const __m256i second = _mm256_loadu_si256((const __m256i*)bytes + 1);
    const __m256i halves[2] = {_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second)};
    for (int i = 0; i < 2; ++i) {
      codes[2 * i] = _mm256_shuffle_epi8(table, _mm256_and_si256(halves[i], nibble));
      codes[2 * i + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(halves[i], 4), nibble));
    }
    const __m256i block_of_lane = _mm256_set_epi32(3, 3, 1, 1, 2, 2, 0, 0);
    scales = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(LoadScales<which>(scale)), block_of_lane);
  }
};

template <Scales which>
inline Sums AddChunk(Sums sums, const Codes<which>& w, const Chunk& x) {
  // Of 16 bits, over eight values: at most 8 * 24 * 128, nothing saturates.
  const auto products = [&](int digit) {
    const __m256i* values = (const __m256i*)x.digits[digit];
    const auto product = [&](int i) { return _mm256_maddubs_epi16(w.codes[i], _mm256_load_si256(values + i)); };
    return _mm256_add_epi16(_mm256_add_epi16(product(0), product(1)), _mm256_add_epi16(product(2), product(3)));
  };
  const __m256i one = _mm256_set1_epi16(1), base = _mm256_set1_epi16(256);
  __m256i total = _mm256_add_epi32(_mm256_madd_epi16(products(0), base), _mm256_madd_epi16(products(1), one));
  total = _mm256_add_epi32(_mm256_slli_epi32(total, 8), _mm256_madd_epi16(products(2), one));
  total = _mm256_sub_epi32(total, _mm256_load_si256((const __m256i*)x.offset));
  return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_load_ps(x.unit)), w.scales, sums);
}

inline float Total(Sums sums) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#else

using Sums = Vector;
static_assert(kLanes == kBlockBytes, "a vector has half of a block");

struct Chunk {
  float even[kLanes], odd[kLanes];

  void SetBlock(int, const float* x) {
    for (int i = 0; i < kLanes; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
  }
};

template <Scales which>
struct Codes {
  Vector low, high;
  float scale;

  Codes(const uint8_t* bytes, const uint8_t* scale)
      : scale((*scale == 0 || *scale == 255) == (which == Scales::kSpecial) ? ScaleOf(*scale) : 0) {
    LoadCodes(bytes, 1, &low, &high);  // of no special scale
  }
};

template <Scales which>
inline Sums AddChunk(Sums sums, const Codes<which>& w, const Chunk& x) {
  return sums + w.scale * (w.low * Load(x.even) + w.high * Load(x.odd));
}

inline float Total(Sums sums) { return HorizontalSum(sums); }

#endif

// Tokens for Mxfp4Rows: chunks of activations, and where results go.
struct Mxfp4Tokens {
  const Chunk* x[kTokenBlock];
  float* y[kTokenBlock];
};

// Rows of activations as chunks; a row is padded with zeros to whole ones.
struct ChunkRows {
  int64_t row_chunks;
  std::unique_ptr<Chunk[]> chunks;

  ChunkRows(int64_t rows, int64_t inner)
      : row_chunks(CeilDiv(inner, kChunkSize)), chunks(new Chunk[rows * row_chunks]) {}

  const Chunk* row(int64_t r) const { return chunks.get() + r * row_chunks; }

  // Sets values `first` to first + count - 1 of a row: whole blocks, from the start of a chunk.
  void Set(int64_t r, int64_t first, int64_t count, const float* x) const {
    for (int64_t done = 0; done < count; done += kChunkSize) {
      Chunk* chunk = chunks.get() + r * row_chunks + (first + done) / kChunkSize;
      std::memset((void*)chunk, 0, sizeof *chunk);
      for (int64_t i = 0; i < std::min<int64_t>(kChunkSize, count - done); i += kBlockSize)
        chunk->SetBlock(i / kBlockSize, x + done + i);
    }
  }
};

// A matrix [rows, inner] in MXFP4.
struct Mxfp4Rows {
  const uint8_t* blocks;
  const uint8_t* scales;
  int64_t num_blocks;  // of a row

  // From row `row` of a stack of matrices.
  Mxfp4Rows(const uint8_t* stack, const uint8_t* scale_stack, int64_t row, int64_t inner)
      : blocks(stack + row * (inner / kBlockSize) * kBlockBytes), scales(scale_stack + row * (inner / kBlockSize)),
        num_blocks(inner / kBlockSize) {}

  // y[i][c] = the product of x[i] and row c, for rows 0 ... columns - 1.
  template <int tokens>
  void Dot(const Mxfp4Tokens& t, int64_t columns) const {
    ForEachRow<tokens, Scales::kUsual>(t, columns, [&](int i, int64_t c, float sum) { t.y[i][c] = sum; });
    const int64_t count = columns * num_blocks;
    if (std::memchr(scales, 0, count) || std::memchr(scales, 255, count))
      ForEachRow<tokens, Scales::kSpecial>(t, columns,
                                           [&](int i, int64_t c, float sum) { t.y[i][c] += 0.5f * sum; });
  }

 private:
  template <int tokens, Scales which, typename F>
  void ForEachRow(const Mxfp4Tokens& t, int64_t columns, F f) const {
    const uint8_t *block = blocks, *scale = scales;
    const int64_t whole = num_blocks / kChunkBlocks;
    const int rest = num_blocks % kChunkBlocks;
    for (int64_t c = 0; c < columns; ++c) {
      Sums sums[tokens] = {};
      for (int64_t i = 0; i < whole; ++i, block += kChunkBytes, scale += kChunkBlocks) {
        const Codes<which> w(block, scale);
        __builtin_prefetch(block + kPrefetchBytes);
        for (int j = 0; j < tokens; ++j) sums[j] = AddChunk(sums[j], w, t.x[j][i]);
      }
      if (rest) {
        uint8_t padded[kChunkBytes] = {}, padded_scale[kChunkBlocks] = {};
        std::memcpy(padded, block, rest * kBlockBytes);
        std::memcpy(padded_scale, scale, rest);
        const Codes<which> w(padded, padded_scale);
        for (int j = 0; j < tokens; ++j) sums[j] = AddChunk(sums[j], w, t.x[j][whole]);
        block += rest * kBlockBytes, scale += rest;
      }
      for (int j = 0; j < tokens; ++j) f(j, c, Total(sums[j]));
    }
  }
};
