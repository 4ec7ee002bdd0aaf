// Dot products of a few tokens with rows in MXFP4, in chunks of a vector of codes.
//
// With products of bytes (AVX2, AVX-512 VNNI), activations are 24-bit integers relative to the largest value of their
// block of 32, rounded by at most 2^-22 of that value: as little as a sum in float32 rounds, unless the largest value
// meets a code of zero. SwiGLU's limit of 7 bounds activations by 56, so that one is then off by 1.4e-5. An integer is
// three signed bytes, digits in base 256, multiplied with codes that are unsigned bytes: in halves, and plus 12. Sums
// over the 8 values of a lane are exact, and become floats just before they are multiplied by the scales of the block.

#pragma once

#include <limits>

#include "decode.h"
#include "mxfp4.h"

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int kChunkBlocks = 4;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kChunkBlocks = 2;
#else
constexpr int kChunkBlocks = 1;
#endif
constexpr int kChunkSize = kChunkBlocks * kBlockSize;
constexpr int kChunkBytes = kChunkBlocks * kBlockBytes;
constexpr int64_t kPrefetchBytes = 1024;

// 2^(scale - 127), NaN for 255. The smallest, 2^-127, would be flushed to zero: the first table has a zero for it, the
// second one twice the value, and zeros for all others.
struct ScaleTables {
  float usual[256], tiny[256] = {ScaleOf(0)};

  ScaleTables() {
    for (int scale = 0; scale < 256; ++scale) usual[scale] = scale ? ScaleOf(scale) : 0;
  }
};
inline const ScaleTables kScaleTables;

#if defined(__AVX2__) && defined(__FMA__)

constexpr int kDotLanes = 4 * kChunkBlocks;  // of 32 bits; lane l has 8 values of block l / 4
constexpr int kCodeOffset = 12;
alignas(16) constexpr int8_t kOffsetCodes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct alignas(64) Chunk {
  int8_t digits[3][2][kChunkBytes];  // the highest first; of the even values (low nibbles) and of the odd ones
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
    std::fill_n(unit + 4 * block, 4, is_finite ? unit_value : std::numeric_limits<float>::quiet_NaN());
    if (!is_finite) return;
    for (int odd = 0; odd < 2; ++odd) {
      int32_t values[kBlockBytes];
      for (int i = 0; i < kBlockBytes; ++i) {
        const float scaled = x[2 * i + odd] * factor;
        values[i] = (int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
      }
      for (int i = 0; i < kBlockBytes; ++i) {
        const int32_t middle = (values[i] + 128) >> 8;
        digits[0][odd][block * kBlockBytes + i] = (int8_t)((middle + 128) >> 8);
        digits[1][odd][block * kBlockBytes + i] = (int8_t)middle;
        digits[2][odd][block * kBlockBytes + i] = (int8_t)values[i];
      }
      for (int i = 0; i < kBlockBytes; ++i) offset[4 * block + i / 4] += kCodeOffset * values[i];
    }
  }
};

#endif

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

using Sums = __m512;

// The codes of `count` blocks, plus kCodeOffset, in low and high nibbles, and their scales.
struct Codes {
  __m512i low, high;
  __m512 scales = _mm512_setzero_ps();

  Codes(const uint8_t* bytes, const uint8_t* scale, const float* table, int count) {
    const __m512i codes = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kOffsetCodes));
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i value = _mm512_maskz_loadu_epi32((__mmask16)((1u << 4 * count) - 1), bytes);
    low = _mm512_shuffle_epi8(codes, _mm512_and_si512(value, nibble));
    high = _mm512_shuffle_epi8(codes, _mm512_and_si512(_mm512_srli_epi16(value, 4), nibble));
    for (int block = 0; block < count; ++block)
      scales = _mm512_mask_broadcastss_ps(scales, (__mmask16)(15u << 4 * block), _mm_load_ss(table + scale[block]));
  }
};

inline Sums AddChunk(Sums sums, const Codes& w, const Chunk& x) {
  __m512i total = _mm512_setzero_si512();
  for (int digit = 0; digit < 3; ++digit) {
    total = _mm512_dpbusd_epi32(_mm512_slli_epi32(total, 8), w.low, _mm512_load_si512(x.digits[digit][0]));
    total = _mm512_dpbusd_epi32(total, w.high, _mm512_load_si512(x.digits[digit][1]));
  }
  total = _mm512_sub_epi32(total, _mm512_load_si512(x.offset));
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_load_ps(x.unit)), w.scales, sums);
}

inline float Total(Sums sums) { return HorizontalSum((Vector)sums); }

#elif defined(__AVX2__) && defined(__FMA__)

using Sums = __m256;

// The codes of `count` blocks, plus kCodeOffset, in low and high nibbles, and their scales.
struct Codes {
  __m256i low, high;
  __m256 scales;

  Codes(const uint8_t* bytes, const uint8_t* scale, const float* table, int count) {
    const __m256i codes = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kOffsetCodes));
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i value = count > 1 ? _mm256_loadu_si256((const __m256i*)bytes)
                                    : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)bytes));
    low = _mm256_shuffle_epi8(codes, _mm256_and_si256(value, nibble));
    high = _mm256_shuffle_epi8(codes, _mm256_and_si256(_mm256_srli_epi16(value, 4), nibble));
    scales = _mm256_blend_ps(_mm256_broadcast_ss(table + scale[0]),
                             count > 1 ? _mm256_broadcast_ss(table + scale[1]) : _mm256_setzero_ps(), 0xf0);
  }
};

inline Sums AddChunk(Sums sums, const Codes& w, const Chunk& x) {
  // Of 16 bits, over four values: nothing saturates.
  const auto products = [&](int digit) {
    const __m256i *even = (const __m256i*)x.digits[digit][0], *odd = (const __m256i*)x.digits[digit][1];
    return _mm256_add_epi16(_mm256_maddubs_epi16(w.low, _mm256_load_si256(even)),
                            _mm256_maddubs_epi16(w.high, _mm256_load_si256(odd)));
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

struct Codes {
  Vector low, high;
  float scale;

  Codes(const uint8_t* bytes, const uint8_t* scale, const float* table, int) : scale(table[*scale]) {
    LoadCodes(bytes, 1, &low, &high);  // of no special scale: the table has these
  }
};

inline Sums AddChunk(Sums sums, const Codes& w, const Chunk& x) {
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
    ForEachRow<tokens>(t, columns, kScaleTables.usual, [&](int i, int64_t c, float sum) { t.y[i][c] = sum; });
    if (std::memchr(scales, 0, columns * num_blocks))
      ForEachRow<tokens>(t, columns, kScaleTables.tiny, [&](int i, int64_t c, float sum) { t.y[i][c] += 0.5f * sum; });
  }

 private:
  template <int tokens, typename F>
  void ForEachRow(const Mxfp4Tokens& t, int64_t columns, const float* table, F f) const {
    const uint8_t *block = blocks, *scale = scales;
    const int64_t whole = num_blocks / kChunkBlocks;
    const int rest = num_blocks % kChunkBlocks;
    for (int64_t c = 0; c < columns; ++c) {
      Sums sums[tokens] = {};
      for (int64_t i = 0; i < whole; ++i, block += kChunkBytes, scale += kChunkBlocks) {
        const Codes w(block, scale, table, kChunkBlocks);
        __builtin_prefetch(block + kPrefetchBytes);
        for (int j = 0; j < tokens; ++j) sums[j] = AddChunk(sums[j], w, t.x[j][i]);
      }
      if (rest) {
        const Codes w(block, scale, table, rest);
        for (int j = 0; j < tokens; ++j) sums[j] = AddChunk(sums[j], w, t.x[j][whole]);
        block += rest * kBlockBytes, scale += rest;
      }
      for (int j = 0; j < tokens; ++j) f(j, c, Total(sums[j]));
    }
  }
};
