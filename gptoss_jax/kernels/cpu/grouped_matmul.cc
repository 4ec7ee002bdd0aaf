// Grouped matrix products for CPU, as an XLA FFI call: rows sorted by group times one matrix per group, and the two
// gradients. Work is that of the rows there are; nothing is padded, and no matrix is copied whole.
//
// One kernel serves all three products. With C = A B for a group of m rows, k inner and n columns:
//   forward   y  = x w      A row-major    B row-major
//   turned    dx = g w^T    A row-major    B column-major
//   outer     dw = x^T g    A column-major B row-major (k are the group's rows)
// A block of B is packed into panels of 32 columns that stay in the second-level cache; A is read where it lies, a
// number at a time, broadcast. A task is a group and a block of columns; threads take the next task when they are done.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "mxfp4.h"
#include "parallel.h"

namespace {

constexpr int kRows = 12;             // of C in a microkernel: 12 x 2 vectors of sums fit the 32 registers of AVX-512
constexpr int kColumns = 2 * kLanes;  // of C in a microkernel
constexpr int kInner = 512;           // of k in a packed block
constexpr int kBlock = 15 * kColumns; // columns of a task: a packed block is 1 MB at most

struct Product {
  const float* a;
  const float* b;
  float* c;
  const float* bias;  // one number for each column, or null
  float* sums;        // where the sum of each column of B goes, or null
  int64_t m, n, k;
  int64_t a_row, a_inner;  // strides
  int64_t b_inner, b_column;
  int64_t c_row;
  const uint8_t* blocks = nullptr;  // packed B, [columns, k / 32, 16], instead of b
  const uint8_t* scales = nullptr;  // [columns, k / 32]
};

// C[rows, 32] += A[rows, k] B[k, 32], with B packed.
template <int rows, bool a_is_row_major>
void Micro(const Product& p, const float* a, const float* packed, float* c, int64_t inner, const float* first,
           int64_t first_row, int width) {
  Vector sum[rows][2];
  if (first == nullptr) {
    for (int i = 0; i < rows; ++i) sum[i][0] = sum[i][1] = Vector{};
  } else if (width == kColumns) {
    for (int i = 0; i < rows; ++i) {
      sum[i][0] = *(const Vector*)(first + i * first_row);
      sum[i][1] = *(const Vector*)(first + i * first_row + kLanes);
    }
  } else {
    for (int i = 0; i < rows; ++i) {
      alignas(64) float line[kColumns] = {};
      std::memcpy(line, first + i * first_row, width * sizeof(float));
      sum[i][0] = *(const Vector*)line;
      sum[i][1] = *(const Vector*)(line + kLanes);
    }
  }
  const int64_t a_row = a_is_row_major ? p.a_row : 1, a_inner = a_is_row_major ? 1 : p.a_inner;
  for (int64_t j = 0; j < inner; ++j) {
    const Vector left = *(const Vector*)packed, right = *(const Vector*)(packed + kLanes);
    packed += kColumns;
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const float one = a[i * a_row];
      sum[i][0] += one * left;
      sum[i][1] += one * right;
    }
    a += a_inner;
  }
  for (int i = 0; i < rows; ++i) {
    if (width == kColumns) {
      *(Vector*)(c + i * p.c_row) = sum[i][0];
      *(Vector*)(c + i * p.c_row + kLanes) = sum[i][1];
    } else {
      alignas(64) float line[kColumns];
      *(Vector*)line = sum[i][0];
      *(Vector*)(line + kLanes) = sum[i][1];
      std::memcpy(c + i * p.c_row, line, width * sizeof(float));
    }
  }
}

template <int rows, bool a_is_row_major>
void Rows(const Product& p, int64_t row, const float* packed, int64_t column, int64_t columns, int64_t from,
          int64_t inner) {
  const float* a = p.a + row * p.a_row + from * p.a_inner;
  for (int64_t j = 0; j < columns; j += kColumns) {
    float* c = p.c + row * p.c_row + column + j;
    const int width = std::min<int64_t>(kColumns, columns - j);
    // The sums start from the bias, and in later blocks of k from what is there.
    const float* first = from > 0 ? c : p.bias == nullptr ? nullptr : p.bias + column + j;
    Micro<rows, a_is_row_major>(p, a, packed + j * inner, c, inner, first, from > 0 ? p.c_row : 0, width);
  }
}

// Turns 16 x 16 numbers: in[i] is a line, out is written a column of lines apart.
void Turn(const float* in, int64_t in_line, float* out, int64_t out_line) {
  Vector t[kLanes], u[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = *(const Vector*)(in + i * in_line);
  for (int i = 0; i < kLanes; i += 2) {
    u[i] = __builtin_shufflevector(t[i], t[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    u[i + 1] = __builtin_shufflevector(t[i], t[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = i; j < i + 2; ++j) {
      t[j] = __builtin_shufflevector(u[j], u[j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      t[j + 2] = __builtin_shufflevector(u[j], u[j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  for (int i = 0; i < kLanes; i += 8) {
    for (int j = i; j < i + 4; ++j) {
      u[j] = __builtin_shufflevector(t[j], t[j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      u[j + 4] = __builtin_shufflevector(t[j], t[j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  }
  for (int j = 0; j < 8; ++j) {
    *(Vector*)(out + j * out_line) =
        __builtin_shufflevector(u[j], u[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    *(Vector*)(out + (j + 8) * out_line) =
        __builtin_shufflevector(u[j], u[j + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

// The same of packed B, whose columns are whole lines of groups of 32.
void Unpack(const Product& p, int64_t column, int64_t columns, int64_t from, int64_t inner, float* packed) {
  const int64_t groups = p.k / kGroup;
  for (int64_t j = 0; j < columns; j += kColumns, packed += kColumns * inner) {
    const int width = std::min<int64_t>(kColumns, columns - j);
    for (int64_t g = from / kGroup, i = 0; i < inner; ++g, i += kGroup) {
      alignas(64) float lines[kColumns][kGroup] = {};
      for (int x = 0; x < width; ++x) {
        const int64_t group = (column + j + x) * groups + g;
        Vector low, high;
        Codes(p.blocks + group * kGroupBytes, p.scales[group], &low, &high);
        low *= ScaleOf(p.scales[group]), high *= ScaleOf(p.scales[group]);
        for (int lane = 0; lane < kLanes; ++lane) lines[x][2 * lane] = low[lane], lines[x][2 * lane + 1] = high[lane];
      }
      for (int64_t down = 0; down < kGroup; down += kLanes)
        for (int64_t right = 0; right < kColumns; right += kLanes)
          Turn(&lines[right][down], kGroup, packed + (i + down) * kColumns + right, kColumns);
    }
  }
}

// Packs B[from : from + inner, column : column + columns] into panels of 32 columns, filled up with zeros.
void Pack(const Product& p, int64_t column, int64_t columns, int64_t from, int64_t inner, float* packed) {
  for (int64_t j = 0; j < columns; j += kColumns, packed += kColumns * inner) {
    const int width = std::min<int64_t>(kColumns, columns - j);
    const float* b = p.b + from * p.b_inner + (column + j) * p.b_column;
    if (p.b_column == 1) {
      for (int64_t i = 0; i < inner; ++i) {
        float* line = packed + i * kColumns;
        if (width == kColumns) {
          *(Vector*)line = *(const Vector*)(b + i * p.b_inner);
          *(Vector*)(line + kLanes) = *(const Vector*)(b + i * p.b_inner + kLanes);
        } else {
          std::memset(line, 0, kColumns * sizeof(float));
          std::memcpy(line, b + i * p.b_inner, width * sizeof(float));
        }
      }
      continue;
    }
    int64_t done = 0;
    if (width == kColumns) {
      for (; done + kLanes <= inner; done += kLanes) {
        Turn(b + done, p.b_column, packed + done * kColumns, kColumns);
        Turn(b + done + kLanes * p.b_column, p.b_column, packed + done * kColumns + kLanes, kColumns);
      }
    }
    for (int64_t i = done; i < inner; ++i)
      for (int x = 0; x < kColumns; ++x) packed[i * kColumns + x] = x < width ? b[i + x * p.b_column] : 0;
  }
}

// Adds up the columns of a packed block of B.
void Sum(const Product& p, int64_t column, int64_t columns, int64_t from, int64_t inner, const float* packed) {
  for (int64_t j = 0; j < columns; j += kColumns) {
    const int width = std::min<int64_t>(kColumns, columns - j);
    float* sums = p.sums + column + j;
    alignas(64) float line[kColumns] = {};
    if (from > 0) std::memcpy(line, sums, width * sizeof(float));
    Vector left = *(const Vector*)line, right = *(const Vector*)(line + kLanes);
    for (int64_t i = 0; i < inner; ++i, packed += kColumns) {
      left += *(const Vector*)packed;
      right += *(const Vector*)(packed + kLanes);
    }
    *(Vector*)line = left;
    *(Vector*)(line + kLanes) = right;
    std::memcpy(sums, line, width * sizeof(float));
  }
}

template <bool a_is_row_major>
void Columns(const Product& p, int64_t column, float* packed) {
  const int64_t columns = std::min<int64_t>(kBlock, p.n - column);
  // Blocks of k of equal size, so that the last one is not a sliver.
  const int64_t blocks = std::max<int64_t>(1, (p.k + kInner - 1) / kInner);
  int64_t step = (p.k + blocks - 1) / blocks;
  if (p.blocks != nullptr) step = (step + kGroup - 1) / kGroup * kGroup;
  for (int64_t from = 0; from == 0 || from < p.k; from += step) {
    const int64_t inner = std::min(step, p.k - from);
    p.blocks == nullptr ? Pack(p, column, columns, from, inner, packed)
                        : Unpack(p, column, columns, from, inner, packed);
    if (p.sums != nullptr) Sum(p, column, columns, from, inner, packed);
    int64_t row = 0;
#define ROWS(count)                   \
  for (; row + count <= p.m; row += count) \
    Rows<count, a_is_row_major>(p, row, packed, column, columns, from, inner);
    ROWS(12) ROWS(8) ROWS(4) ROWS(2) ROWS(1)
#undef ROWS
    if (step == 0) break;
  }
}

float* Scratch() {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory(
      (float*)std::aligned_alloc(64, (kInner + 1) * kBlock * sizeof(float)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory.get();
}

// Runs all column blocks of all products on the threads there are.
void Multiply(const std::vector<Product>& products, bool a_is_row_major, ffi::ThreadPool pool) {
  std::vector<std::pair<const Product*, int64_t>> tasks;
  for (const Product& p : products)
    for (int64_t column = 0; column < p.n; column += kBlock) tasks.emplace_back(&p, column);
  // The longest first: what is left at the end is short.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](auto& x, auto& y) { return x.first->m * x.first->k > y.first->m * y.first->k; });
  auto one = [&](int64_t task) {
    const auto [p, column] = tasks[task];
    a_is_row_major ? Columns<true>(*p, column, Scratch()) : Columns<false>(*p, column, Scratch());
  };
  Run({{(int64_t)tasks.size(), one}}, pool);
}

using Floats = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;
using Sizes = ffi::Buffer<ffi::S32>;

// The groups' sizes as they are used: never past the rows there are.
std::vector<int64_t> Clamped(const Sizes& sizes, int64_t rows) {
  std::vector<int64_t> found;
  for (int64_t e = 0, left = rows; e < (int64_t)sizes.element_count(); ++e) {
    found.push_back(std::min(std::max<int64_t>(sizes.typed_data()[e], 0), left));
    left -= found.back();
  }
  return found;
}

// y[R, N] = x[R, K] w[e], or x[R, K] w[e]^T with w [E, N, K]; plus the group's bias [E, N], where there is one.
ffi::Error Forward(ffi::ThreadPool pool, Floats x, Floats w, Floats bias, Sizes sizes, ffi::Result<Floats> y,
                   bool turned) {
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1];
  std::vector<Product> products;
  int64_t row = 0, e = 0;
  for (int64_t m : Clamped(sizes, rows)) {
    const float* start = bias.element_count() ? bias.typed_data() + e * n : nullptr;
    if (m)
      products.push_back({x.typed_data() + row * k, w.typed_data() + e * n * k, y->typed_data() + row * n, start,
                           nullptr, m, n, k, k, 1, turned ? 1 : n, turned ? k : 1, n});
    row += m, ++e;
  }
  Multiply(products, true, pool);
  std::memset(y->typed_data() + row * n, 0, (rows - row) * n * sizeof(float));
  return ffi::Error::Success();
}

// y[R, N] = x[R, K] w[e]^T with packed w, [E, N, K / 32, 16] and [E, N, K / 32].
ffi::Error Packed(ffi::ThreadPool pool, Floats x, Bytes blocks, Bytes scales, Sizes sizes,
                  ffi::Result<Floats> y) {
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1];
  std::vector<Product> products;
  int64_t row = 0, e = 0;
  for (int64_t m : Clamped(sizes, rows)) {
    const int64_t group = e * n * (k / kGroup);
    if (m)
      products.push_back({x.typed_data() + row * k, nullptr, y->typed_data() + row * n, nullptr, nullptr, m, n, k, k, 1, 1,
                          k, n, blocks.typed_data() + group * kGroupBytes, scales.typed_data() + group});
    row += m, ++e;
  }
  Multiply(products, true, pool);
  std::memset(y->typed_data() + row * n, 0, (rows - row) * n * sizeof(float));
  return ffi::Error::Success();
}

// dw[e] = x_e^T g_e, and db[e] the sum of the rows of g_e; zero for a group without rows.
ffi::Error Outer(ffi::ThreadPool pool, Floats x, Floats g, Sizes sizes, ffi::Result<Floats> dw,
                 ffi::Result<Floats> db) {
  const int64_t rows = x.dimensions()[0], m = x.dimensions()[1], n = g.dimensions()[1];
  std::vector<Product> products;
  int64_t row = 0, e = 0;
  for (int64_t k : Clamped(sizes, rows)) {
    products.push_back({x.typed_data() + row * m, g.typed_data() + row * n, dw->typed_data() + e * m * n, nullptr,
                         db->typed_data() + e * n, m, n, k, 1, m, n, 1, n});
    row += k, ++e;
  }
  Multiply(products, false, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Sizes>()
                                  .Ret<Floats>()
                                  .Attr<bool>("turned"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedPacked, Packed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Sizes>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedOuter, Outer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Sizes>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
