// Grouped matmul and its two gradients, as XLA FFI calls: rows sorted by group times one matrix per group. No rows are
// padded, and no matrix is copied as a whole.
//
// All matmuls share one microkernel. With C = A B for a group of m rows, inner size k, and n columns:
//   y  = x w      A row-major     B row-major
//   dx = g w^T    A row-major     B column-major
//   dw = x^T g    A column-major  B row-major (k are the group's rows)
// In MXFP4, the blocks of B are along its columns in y = x w^T, and along its rows in dx = g w.
// A block of B is packed into panels that stay in the L2 cache; A is read one broadcast float at a time, in place if its
// rows are contiguous floats, else from a copy of a few rows in the L1 cache. A task is a block of C of one group.
//
// A, B and C are float or bfloat16, independently. Sums are floats, and C is rounded once, when a sum is complete.

#include <algorithm>

#include "microkernel.h"
#include "mxfp4_pack.h"

namespace {

constexpr int kInnerBlock = 512;            // rows per packed block of B
constexpr int kColBlock = 15 * kBlockSize;  // columns per task: a packed block is at most 1 MB
constexpr int64_t kRowBlock = 192;          // fewest rows per task where rows are split, for each task packs B
constexpr int64_t kSumRows = 1536;          // most rows of C per task, if its sums are not stored in C

// An array of float or bfloat16.
struct Array {
  char* data;
  ffi::DataType type;
  bool is_rounded = false;  // floats that are rounded to bfloat16 when they are packed

  Array(const Values& values) : data((char*)values.untyped_data()), type(values.element_type()) {}

  bool is_float() const { return type == ffi::F32; }
  int64_t element_size() const { return is_float() ? sizeof(float) : sizeof(BFloat16); }
  Array operator+(int64_t elements) const {
    Array part = *this;
    part.data += elements * element_size();
    return part;
  }
};

struct Operand {
  Array data;
  int64_t row_stride, col_stride;

  Array at(int64_t row, int64_t column) const { return data + row * row_stride + column * col_stride; }
};

struct Matmul {
  int64_t m, n, k;
  Operand a;                         // [m, k]
  Operand b;                         // [k, n]
  Array c;                           // [m, n]
  const float* bias = nullptr;       // [n], or null
  float* b_sums = nullptr;           // output for the sum of each column of B, or null
  const uint8_t* blocks = nullptr;   // MXFP4 B instead of b: [n, k / 32, 16], or [k, n / 32, 16] if blocks_by_rows
  const uint8_t* scales = nullptr;   // [n, k / 32] or [k, n / 32]
  bool blocks_by_rows = false;
};

// A block of B to pack: rows row … row + inner, columns column … column + columns.
struct Block {
  int64_t row, inner, column, columns;
};

// Copies `rows` rows of A, in its order.
template <int rows, bool a_is_row_major>
void CopyRows(const Matmul& p, int64_t row, const Block& b, float* copy) {
  const Array from = p.a.at(row, b.row);
  if (a_is_row_major) {
    for (int i = 0; i < rows; ++i) {
      const BFloat16* a = (const BFloat16*)from.data + i * p.a.row_stride;
      for (int64_t j = 0; j < b.inner; j += kTileLanes) {
        __builtin_prefetch(a + rows * p.a.row_stride + j);
        StorePartial(copy + i * b.inner + j, LoadPartial<Tile>(a + j, b.inner - j), b.inner - j);
      }
    }
  } else if (from.is_float()) {
    const float* a = (const float*)from.data;
    for (int64_t j = 0; j < b.inner; ++j)
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) copy[j * rows + i] = a[j * p.a.col_stride + i];
  } else {
    // Whole vectors: the next one overwrites the values of other rows.
    const BFloat16* a = (const BFloat16*)from.data;
    for (int64_t j = 0; j < b.inner; ++j)
      Store(copy + j * rows, LoadPartial<Tile>(a + j * p.a.col_stride, p.m - row));
  }
}

// Runs all microkernels of `rows` rows of C, starting at `row`; returns the first remaining row. Writes to `sums`
// [p.m, b.columns], or only its first rows if there is one block, if C is not float.
template <int rows, bool a_is_row_major>
int64_t MultiplyRows(const Matmul& p, int64_t row, const float* packed, const Block& b, float* sums) {
  const bool is_first = b.row == 0, is_last = b.row + b.inner == p.k;
  for (; row + rows <= p.m; row += rows) {
    const float* a = (const float*)p.a.at(row, b.row).data;
    int64_t a_stride = p.a.row_stride;
    float copy[rows * kInnerBlock + kTileLanes];
    // Columns are often a multiple of a large power of two apart, and would evict one another from the L1 cache.
    if (!a_is_row_major || !p.a.data.is_float()) {
      CopyRows<rows, a_is_row_major>(p, row, b, copy);
      a = copy, a_stride = a_is_row_major ? b.inner : rows;
    }
    const Array result = p.c + (row * p.n + b.column);
    float* c = p.c.is_float() ? (float*)result.data : sums + (is_first && is_last ? 0 : row * b.columns);
    const int64_t c_stride = p.c.is_float() ? p.n : b.columns;
    for (int64_t j = 0; j < b.columns; j += kPanelCols) {
      // Accumulators start from the bias, and in later blocks from the previous sums.
      const float* first = !is_first ? c + j : p.bias == nullptr ? nullptr : p.bias + b.column + j;
      Microkernel<rows, a_is_row_major>(a, a_stride, packed + j * b.inner, c + j, c_stride, b.inner, first,
                                        is_first ? 0 : c_stride, std::min<int64_t>(kPanelCols, b.columns - j));
    }
    if (is_last && !p.c.is_float())
      for (int i = 0; i < rows; ++i)
        for (int64_t j = 0; j < b.columns; j += kTileLanes)
          StorePartial((BFloat16*)result.data + i * p.n + j,
                       LoadPartial<Tile>(c + i * c_stride + j, b.columns - j), b.columns - j);
  }
  return row;
}

// Packs a block of B.
void PackDense(const Matmul& p, const Block& block, float* packed) {
  const Array from = p.b.at(block.row, block.column);
  auto pack = [&](auto* data) {
    Pack(Strided<std::remove_pointer_t<decltype(data)>>{data, p.b.row_stride, p.b.col_stride}, block.inner,
         block.columns, packed);
  };
  if (!from.is_float())
    pack((BFloat16*)from.data);
  else if (from.is_rounded)
    pack((Rounded*)from.data);
  else
    pack((float*)from.data);
}

// Packs a block of B in MXFP4.
void PackMxfp4(const Matmul& p, const Block& block, float* packed) {
  if (p.blocks_by_rows)
    PackRows({p.blocks, p.scales, p.n / kBlockSize}, block.row, block.inner, block.column, block.columns, packed);
  else
    PackRowsTransposed({p.blocks, p.scales, p.k / kBlockSize}, block.column, block.columns, block.row, block.inner,
                       packed);
}

// Adds the columns of a packed block of B to b_sums.
void SumColumns(const Matmul& p, const Block& block, const float* packed) {
  for (int64_t j = 0; j < block.columns; j += kPanelCols) {
    const int64_t width = block.columns - j;
    float* sums = p.b_sums + block.column + j;
    Tile left = {}, right = {};
    if (block.row > 0) {
      left = LoadPartial<Tile>(sums, width);
      right = LoadPartial<Tile>(sums + kTileLanes, width - kTileLanes);
    }
    for (int64_t i = 0; i < block.inner; ++i, packed += kPanelCols)
      left += *(const Tile*)(packed), right += *(const Tile*)(packed + kTileLanes);
    StorePartial(sums, left, width), StorePartial(sums + kTileLanes, right, width - kTileLanes);
  }
}

// Rows row … row + count - 1 of a matmul.
Matmul SelectRows(const Matmul& p, int64_t row, int64_t count) {
  Matmul part = p;
  part.m = count, part.a.data = p.a.at(row, 0), part.c = p.c + row * p.n;
  if (row > 0) part.b_sums = nullptr;
  return part;
}

// One task: at most `columns` columns of C, starting at `column`.
template <bool a_is_row_major>
void MultiplyColumns(const Matmul& p, int64_t column, int64_t columns) {
  const int64_t packed_size = (kInnerBlock + 1) * kColBlock;
  float* packed = Scratch(packed_size + (p.c.is_float() ? 0 : std::max<int64_t>(p.m, kTileRows) * columns));
  float* sums = packed + packed_size;
  // Blocks of equal size, so that the last one is not tiny.
  int64_t step = CeilDiv(p.k, std::max<int64_t>(1, CeilDiv(p.k, kInnerBlock)));
  if (p.blocks != nullptr) step = CeilDiv(step, kBlockSize) * kBlockSize;
  for (int64_t from = 0; from == 0 || from < p.k; from += step) {
    const Block block{from, std::min(step, p.k - from), column, std::min(columns, p.n - column)};
    if (p.blocks == nullptr)
      PackDense(p, block, packed);
    else
      PackMxfp4(p, block, packed);
    if (p.b_sums != nullptr) SumColumns(p, block, packed);
    int64_t row = MultiplyRows<kTileRows, a_is_row_major>(p, 0, packed, block, sums);
    if constexpr (kTileRows > 8) row = MultiplyRows<8, a_is_row_major>(p, row, packed, block, sums);
    row = MultiplyRows<4, a_is_row_major>(p, row, packed, block, sums);
    row = MultiplyRows<2, a_is_row_major>(p, row, packed, block, sums);
    MultiplyRows<1, a_is_row_major>(p, row, packed, block, sums);
    if (step == 0) break;
  }
}

void Multiply(const std::vector<Matmul>& matmuls, bool a_is_row_major, ffi::ThreadPool pool) {
  int64_t groups = 0, blocks = 0;
  for (const Matmul& p : matmuls)
    if (p.m > 0) ++groups, blocks += CeilDiv(p.n, kColBlock);
  if (blocks == 0) return;
  // If there are few tasks, splits rows or, where there are few, columns, so that every thread has one, and more if
  // groups differ in size.
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), wanted = groups > 1 ? 4 * threads : threads;
  struct Task {
    Matmul rows;
    int64_t column, columns, work;
  };
  std::vector<Task> tasks;
  for (const Matmul& p : matmuls) {
    if (p.m == 0) continue;
    int64_t parts = std::clamp<int64_t>(p.m / kRowBlock, 1, CeilDiv(wanted, blocks));
    const int64_t share = CeilDiv(CeilDiv(p.n, CeilDiv(CeilDiv(threads, groups), parts)), kBlockSize) * kBlockSize;
    const int64_t columns = std::min<int64_t>(kColBlock, share);
    if (!p.c.is_float()) parts = std::max(parts, CeilDiv(p.m, kSumRows));
    const int64_t rows = CeilDiv(CeilDiv(p.m, parts), kTileRows) * kTileRows;
    for (int64_t column = 0; column < p.n; column += columns)
      for (int64_t row = 0; row < p.m; row += rows) {
        const int64_t count = std::min(rows, p.m - row);
        tasks.push_back({SelectRows(p, row, count), column, columns, count * std::min(columns, p.n - column) * p.k});
      }
  }
  // Longest tasks first, so that threads finish at about the same time.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.work > y.work; });
  auto run = [&](int64_t index) {
    const Task& task = tasks[index];
    a_is_row_major ? MultiplyColumns<true>(task.rows, task.column, task.columns)
                   : MultiplyColumns<false>(task.rows, task.column, task.columns);
  };
  RunPhases({{(int64_t)tasks.size(), run}}, pool);
}

// The matmul of each group: make(e, row, count) for its `count` rows, starting at `row`. Sizes are clamped to `rows`.
template <typename F>
std::vector<Matmul> GroupMatmuls(const Ints& sizes, int64_t rows, F make) {
  std::vector<Matmul> matmuls;
  int64_t row = 0;
  for (int64_t e = 0; e < (int64_t)sizes.element_count(); ++e) {
    const int64_t count = std::min(std::max<int64_t>(sizes.typed_data()[e], 0), rows - row);
    matmuls.push_back(make(e, row, count));
    row += count;
  }
  return matmuls;
}

// y[R, n], zero in rows without a group.
ffi::Error MultiplyGroups(const std::vector<Matmul>& matmuls, ffi::Result<Values>& y, ffi::ThreadPool pool) {
  const int64_t rows = y->dimensions()[0], n = y->dimensions()[1];
  int64_t row = 0;
  for (const Matmul& p : matmuls) row += p.m;
  const Array rest = Array(*y) + row * n;
  std::memset(rest.data, 0, (rows - row) * n * rest.element_size());
  Multiply(matmuls, true, pool);
  return ffi::Error::Success();
}

// y[R, n] = x[R, k] w[e], or x[R, k] w[e]^T with w [G, n, k]. The bias [E, n], which may be empty, is for one layer of
// E groups; w has the groups of all layers. If x is bfloat16, w is rounded to it.
ffi::Error Grouped(ffi::ThreadPool pool, Values x, Values w, Floats bias, Ints sizes, ffi::Result<Values> y,
                   bool transposed) {
  const int64_t k = x.dimensions()[1], n = y->dimensions()[1];
  const int64_t num_biases = bias.element_count() ? bias.dimensions()[0] : 0;
  Array matrices(w);
  matrices.is_rounded = x.element_type() == ffi::BF16;
  auto make = [&](int64_t e, int64_t row, int64_t count) {
    const Operand b{matrices + e * n * k, transposed ? 1 : n, transposed ? k : 1};
    Matmul p{count, n, k, {Array(x) + row * k, k, 1}, b, Array(*y) + row * n};
    if (num_biases) p.bias = bias.typed_data() + e % num_biases * n;
    return p;
  };
  return MultiplyGroups(GroupMatmuls(sizes, x.dimensions()[0], make), y, pool);
}

// y[R, n] = x[R, k] w[e]^T for w in MXFP4: blocks [G, n, k / 32, 16] and scales [G, n, k / 32]; or, transposed, x[R, k]
// w[e] with blocks [G, k, n / 32, 16] and scales [G, k, n / 32].
ffi::Error GroupedMxfp4(ffi::ThreadPool pool, Values x, Bytes blocks, Bytes scales, Ints sizes, ffi::Result<Values> y,
                        bool transposed) {
  const int64_t k = x.dimensions()[1], n = y->dimensions()[1];
  auto make = [&](int64_t e, int64_t row, int64_t count) {
    const Operand a{Array(x) + row * k, k, 1};
    Matmul p{count, n, k, a, a, Array(*y) + row * n};  // without B
    p.blocks = blocks.typed_data() + e * n * k / kBlockSize * kBlockBytes;
    p.scales = scales.typed_data() + e * n * k / kBlockSize;
    p.blocks_by_rows = transposed;
    return p;
  };
  return MultiplyGroups(GroupMatmuls(sizes, x.dimensions()[0], make), y, pool);
}

// dw[e] = x_e^T g_e, and db[e], the sum of the rows of g_e; zero for an empty group.
ffi::Error GroupedWeightGrad(ffi::ThreadPool pool, Values x, Values g, Ints sizes, ffi::Result<Values> dw,
                             ffi::Result<Floats> db) {
  const int64_t m = x.dimensions()[1], n = g.dimensions()[1];
  auto make = [&](int64_t e, int64_t row, int64_t count) {
    const Operand b{Array(g) + row * n, n, 1};
    Matmul p{m, n, count, {Array(x) + row * m, 1, m}, b, Array(*dw) + e * m * n};
    p.b_sums = db->typed_data() + e * n;
    return p;
  };
  Multiply(GroupMatmuls(sizes, x.dimensions()[0], make), false, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMatmul, Grouped,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Values>().Arg<Floats>()
                                  .Arg<Ints>().Ret<Values>().Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMatmulMxfp4, GroupedMxfp4,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Bytes>().Arg<Bytes>()
                                  .Arg<Ints>().Ret<Values>().Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMatmulWeightGrad, GroupedWeightGrad,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Values>().Arg<Values>().Arg<Ints>()
                                  .Ret<Values>().Ret<Floats>());
