// MXFP4 matrices to dense ones with the axes swapped, while loading weights: called through ctypes on NumPy arrays.
//
// Exact for all codes and scales, including subnormal results (kernels/mxfp4/codec.py).

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "mxfp4.h"

namespace {

// Rows and blocks transposed at a time: whole cache lines of both arrays, in the first-level cache.
constexpr int kTileRows = 128, kTileGroups = 4;
constexpr int kSide = 16;
// Scales for which every code is a normal number.
constexpr int kLeastUsualScale = 2, kLargestUsualScale = 252;

typedef uint16_t WordLanes __attribute__((vector_size(2 * kSide), aligned(2), may_alias));
typedef uint32_t LongLanes __attribute__((vector_size(4 * kSide), aligned(4), may_alias));

// One value as bfloat16 bits, as codec.bfloat16_bits.
uint16_t ValueBits(int code, int scale) {
  const int size = code & 7, half = size > 1 ? size & 1 : 0, exponent = scale + (size >> 1) - 1;
  int bits = exponent < 255 ? exponent << 7 | half << 6 : 0x7f80;
  if (exponent <= 0) bits = (128 + 64 * half) >> std::min(1 - exponent, 8);
  if (size == 0) bits = 0;
  if (scale == 255) bits = 0x7fc0;
  return bits | (code & 8) << 12;
}

// The values of 16 codes with usual scales. Exponent and half of a code from 2 on are its bits; the offset has the
// exponent of 0.5 minus half a step, because code 1 is 0.5, too.
WordLanes UsualBits(WordLanes codes, WordLanes offsets) {
  const WordLanes size = (codes & 7) << 6;
  const WordLanes bits = size + offsets + ((WordLanes)(size > 64) & 64);
  return (bits & (WordLanes)(size > 0)) | (codes & 8) << 12;
}

// Writes 16 values, past the cache if possible: they are not read again, and need not be read to be written.
void StoreValues(uint16_t* to, WordLanes bits, bool is_aligned) {
#ifdef __AVX2__
  if (is_aligned) return _mm256_stream_si256((__m256i*)to, (__m256i)bits);
#endif
  std::memcpy(to, &bits, sizeof bits);
}

void StoreValues(uint32_t* to, WordLanes bits, bool is_aligned) {
  // A bfloat16 is the upper half of a float32.
  const LongLanes wide = __builtin_convertvector(bits, LongLanes) << 16;
#ifdef __AVX2__
  if (is_aligned) {
    __m256i halves[2];
    std::memcpy(halves, &wide, sizeof wide);
    _mm256_stream_si256((__m256i*)to, halves[0]);
    return _mm256_stream_si256((__m256i*)(to + 8), halves[1]);
  }
#endif
  std::memcpy(to, &wide, sizeof wide);
}

struct Matrix {
  const uint8_t *blocks, *scales;
  int64_t rows, groups, block_stride, scale_stride;  // bytes from one row to the next
  int64_t first, last;                               // the inputs to write
  int64_t out_stride;                                // values from one input to the next
};

// One tile, whose bytes are transposed to [groups * 16, kTileRows].
template <typename T>
void UnpackTile(const Matrix& m, T* out, int64_t row, int64_t group) {
  alignas(64) uint8_t bytes[kTileGroups * kBlockBytes][kTileRows];
  alignas(64) uint16_t offsets[kTileRows];
  uint8_t scales[kTileRows];
  const int rows = std::min<int64_t>(kTileRows, m.rows - row);
  const int groups = std::min<int64_t>(kTileGroups, m.groups - group);
  const uint8_t* from = m.blocks + row * m.block_stride + group * kBlockBytes;
  int r = 0;
  for (; r + kSide <= rows; r += kSide)
    for (int g = 0; g < groups; ++g)
      TransposeBytes(from + r * m.block_stride + g * kBlockBytes, m.block_stride, &bytes[g * kBlockBytes][r],
                     kTileRows);
  for (; r < rows; ++r)
    for (int b = 0; b < groups * kBlockBytes; ++b) bytes[b][r] = from[r * m.block_stride + b];
  const int whole = rows / kSide * kSide;
  for (int g = 0; g < groups; ++g) {
    bool is_usual = true;
    for (r = 0; r < rows; ++r) {
      scales[r] = m.scales[(row + r) * m.scale_stride + group + g];
      offsets[r] = (scales[r] << 7) - 0xc0;
      is_usual &= scales[r] >= kLeastUsualScale && scales[r] <= kLargestUsualScale;
    }
    for (int i = 0; i < kBlockSize; ++i) {
      const int64_t input = (group + g) * kBlockSize + i;
      if (input < m.first || input >= m.last) continue;
      const uint8_t* line = bytes[g * kBlockBytes + i / 2];
      T* to = out + (input - m.first) * m.out_stride + row;
      const int shift = i % 2 * 4;
      r = 0;
      if (is_usual) {
        const bool is_aligned = (uintptr_t)to % 32 == 0;
        for (; r < whole; r += kSide) {
          ByteLanes narrow;
          WordLanes offset;
          std::memcpy(&narrow, line + r, sizeof narrow);
          std::memcpy(&offset, offsets + r, sizeof offset);
          StoreValues(to + r, UsualBits(__builtin_convertvector(narrow, WordLanes) >> shift & 15, offset), is_aligned);
        }
      }
      for (; r < rows; ++r) {
        const uint32_t bits = ValueBits(line[r] >> shift & 15, scales[r]);
        to[r] = sizeof(T) == 2 ? bits : bits << 16;
      }
    }
  }
}

template <typename T>
void Unpack(const Matrix& m, T* out) {
  for (int64_t row = 0; row < m.rows; row += kTileRows)
    for (int64_t group = 0; group < m.groups; group += kTileGroups) UnpackTile(m, out, row, group);
#ifdef __AVX2__
  _mm_sfence();
#endif
}

}  // namespace

// Unpacks `rows` rows of `groups` blocks of 16 bytes, with one scale each, to [last - first, rows]: the inputs from
// `first` to `last` of each row, in bfloat16 (`itemsize` 2) or float32 (4).
extern "C" void UnpackMxfp4(const uint8_t* blocks, int64_t block_stride, const uint8_t* scales, int64_t scale_stride,
                            int64_t rows, int64_t groups, int64_t first, int64_t last, void* out, int64_t out_stride,
                            int64_t itemsize) {
  const Matrix m{blocks, scales, rows, groups, block_stride, scale_stride, first, last, out_stride / itemsize};
  itemsize == 2 ? Unpack(m, (uint16_t*)out) : Unpack(m, (uint32_t*)out);
}
