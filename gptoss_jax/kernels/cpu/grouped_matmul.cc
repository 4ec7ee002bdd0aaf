// Grouped matmul and its two gradients, as XLA FFI calls: rows sorted by group times one matrix per group. No rows are
// padded, and no matrix is copied as a whole.
//
// All matmuls share one microkernel. With C = A B for a group of m rows, inner size k, and n columns:
//   y  = x w      A row-major     B row-major
//   dx = g w^T    A row-major     B column-major
//   dw = x^T g    A column-major  B row-major (k are the group's rows)
// In MXFP4, the blocks of B are along its columns in y = x w^T, and along its rows in dx = g w.
// A block of B is packed into panels that stay in the L2 cache; A is read one broadcast float at a time, in place if its
// rows are contiguous, else from a copy of a few rows in the L1 cache. A task is a block of C of one group.

#include <algorithm>

#include "microkernel.h"
#include "mxfp4.h"

namespace {

constexpr int kInnerBlock = 512;            // rows per packed block of B
constexpr int kColBlock = 15 * kBlockSize;  // columns per task: a packed block is at most 1 MB
constexpr int kRowBlock = 192;              // fewest rows per task where rows are split, for each task packs B

struct Matmul {
  int64_t m, n, k;
  Strided a;                         // [m, k]
  Strided b;                         // [k, n]
  float* c;                          // [m, n]
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

// A task: rows row … row + rows, columns column … column + columns of C.
struct Task {
  const Matmul* matmul;
  int64_t row, rows, column, columns;
};

// Runs all microkernels of `rows` rows of C, from `row` to `end`; returns the first remaining row.
template <int rows, bool a_is_row_major>
int64_t MultiplyRows(const Matmul& p, int64_t row, int64_t end, const float* packed, const Block& b) {
  for (; row + rows <= end; row += rows) {
    const float* a = p.a.data + row * p.a.row_stride + b.row * p.a.col_stride;
    float copy[a_is_row_major ? 1 : rows * kInnerBlock];
    if constexpr (!a_is_row_major) {
      // Columns are often a multiple of a large power of two apart, and would evict one another from the L1 cache.
      for (int64_t j = 0; j < b.inner; ++j)
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i) copy[j * rows + i] = a[j * p.a.col_stride + i];
      a = copy;
    }
    for (int64_t j = 0; j < b.columns; j += kPanelCols) {
      float* c = p.c + row * p.n + b.column + j;
      // Accumulators start from the bias, and in later blocks from the previous sums.
      const float* first = b.row > 0 ? c : p.bias == nullptr ? nullptr : p.bias + b.column + j;
      const int64_t a_stride = a_is_row_major ? p.a.row_stride : rows;
      Microkernel<rows, a_is_row_major>(a, a_stride, packed + j * b.inner, c, p.n, b.inner, first,
                                        b.row > 0 ? p.n : 0, std::min<int64_t>(kPanelCols, b.columns - j));
    }
  }
  return row;
}

// Loads the values of an MXFP4 block in order.
void LoadBlock(const Matmul& p, int64_t index, float* to) {
  const uint8_t scale = p.scales[index];
  Vector low, high;
  LoadCodes(p.blocks + index * kBlockBytes, scale, &low, &high);
  low *= ScaleOf(scale), high *= ScaleOf(scale);
  Store(to, __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  Store(to + kLanes, __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}

// Packs a block of B in MXFP4, with columns stored as rows of blocks of 32.
void PackMxfp4Columns(const Matmul& p, const Block& block, float* packed) {
  for (int64_t j = 0; j < block.columns; j += kPanelCols, packed += kPanelCols * block.inner) {
    const int width = std::min<int64_t>(kPanelCols, block.columns - j);
    for (int64_t i = 0; i < block.inner; i += kBlockSize) {
      alignas(64) float values[kPanelCols][kBlockSize] = {};
      for (int x = 0; x < width; ++x)
        LoadBlock(p, ((block.column + j + x) * p.k + block.row + i) / kBlockSize, values[x]);
      for (int row = 0; row < kBlockSize; row += kTileLanes)
        for (int col = 0; col < kPanelCols; col += kTileLanes)
          Transpose(&values[col][row], kBlockSize, packed + (i + row) * kPanelCols + col, kPanelCols);
    }
  }
}

// Packs a block of B in MXFP4 with blocks along rows.
void PackMxfp4Rows(const Matmul& p, const Block& block, float* packed) {
  static_assert(kBlockSize % kPanelCols == 0);
  // Row by row, in the storage order of the bytes.
  for (int64_t i = 0; i < block.inner; ++i)
    for (int64_t j = 0; j < block.columns; j += kBlockSize) {
      float values[kBlockSize];
      LoadBlock(p, ((block.row + i) * p.n + block.column + j) / kBlockSize, values);
      for (int x = 0; x < kBlockSize; x += kPanelCols)
        std::memcpy(packed + (j + x) * block.inner + i * kPanelCols, values + x, kPanelCols * sizeof(float));
    }
}

// Adds the columns of a packed block of B to b_sums.
void SumColumns(const Matmul& p, const Block& block, const float* packed) {
  for (int64_t j = 0; j < block.columns; j += kPanelCols) {
    const int64_t width = block.columns - j;
    float* sums = p.b_sums + block.column + j;
    Tile left = {}, right = {};
    if (block.row > 0) left = LoadTile(sums, width), right = LoadTile(sums + kTileLanes, width - kTileLanes);
    for (int64_t i = 0; i < block.inner; ++i, packed += kPanelCols)
      left += *(const Tile*)(packed), right += *(const Tile*)(packed + kTileLanes);
    StoreTile(sums, left, width), StoreTile(sums + kTileLanes, right, width - kTileLanes);
  }
}

template <bool a_is_row_major>
void RunTask(const Task& task) {
  const Matmul& p = *task.matmul;
  float* packed = Scratch((kInnerBlock + 1) * kColBlock);
  // Blocks of equal size, so that the last one is not tiny.
  int64_t step = CeilDiv(p.k, std::max<int64_t>(1, CeilDiv(p.k, kInnerBlock)));
  if (p.blocks != nullptr) step = CeilDiv(step, kBlockSize) * kBlockSize;
  for (int64_t from = 0; from == 0 || from < p.k; from += step) {
    const Block block{from, std::min(step, p.k - from), task.column, task.columns};
    if (p.blocks == nullptr)
      Pack({p.b.data + block.row * p.b.row_stride + block.column * p.b.col_stride, p.b.row_stride, p.b.col_stride},
           block.inner, block.columns, packed);
    else
      p.blocks_by_rows ? PackMxfp4Rows(p, block, packed) : PackMxfp4Columns(p, block, packed);
    if (p.b_sums != nullptr && task.row == 0) SumColumns(p, block, packed);
    const int64_t end = task.row + task.rows;
    int64_t row = MultiplyRows<kTileRows, a_is_row_major>(p, task.row, end, packed, block);
    if constexpr (kTileRows > 8) row = MultiplyRows<8, a_is_row_major>(p, row, end, packed, block);
    row = MultiplyRows<4, a_is_row_major>(p, row, end, packed, block);
    row = MultiplyRows<2, a_is_row_major>(p, row, end, packed, block);
    MultiplyRows<1, a_is_row_major>(p, row, end, packed, block);
    if (step == 0) break;
  }
}

void Multiply(const std::vector<Matmul>& matmuls, bool a_is_row_major, ffi::ThreadPool pool) {
  int64_t groups = 0, blocks = 0;
  for (const Matmul& p : matmuls)
    if (p.m > 0) ++groups, blocks += CeilDiv(p.n, kColBlock);
  if (groups == 0) return;
  // If there are few tasks, splits rows or, where there are few, columns, so that every thread has one, and more if
  // groups differ in size.
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), wanted = groups > 1 ? 4 * threads : threads;
  std::vector<Task> tasks;
  for (const Matmul& p : matmuls) {
    if (p.m == 0) continue;
    const int64_t parts = CeilDiv(wanted, blocks), row_parts = std::clamp<int64_t>(p.m / kRowBlock, 1, parts);
    const int64_t rows = CeilDiv(CeilDiv(p.m, row_parts), kTileRows) * kTileRows;
    const int64_t share = CeilDiv(CeilDiv(p.n, CeilDiv(CeilDiv(threads, groups), row_parts)), kBlockSize) * kBlockSize;
    const int64_t columns = std::min<int64_t>(kColBlock, share);
    for (int64_t column = 0; column < p.n; column += columns)
      for (int64_t row = 0; row < p.m; row += rows)
        tasks.push_back({&p, row, std::min(rows, p.m - row), column, std::min(columns, p.n - column)});
  }
  // Longest tasks first, so that threads finish at about the same time.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) {
    return x.rows * x.columns * x.matmul->k > y.rows * y.columns * y.matmul->k;
  });
  auto run = [&](int64_t index) { a_is_row_major ? RunTask<true>(tasks[index]) : RunTask<false>(tasks[index]); };
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
ffi::Error MultiplyGroups(const std::vector<Matmul>& matmuls, ffi::Result<Floats>& y, ffi::ThreadPool pool) {
  const int64_t rows = y->dimensions()[0], n = y->dimensions()[1];
  int64_t row = 0;
  for (const Matmul& p : matmuls) row += p.m;
  std::memset(y->typed_data() + row * n, 0, (rows - row) * n * sizeof(float));
  Multiply(matmuls, true, pool);
  return ffi::Error::Success();
}

// y[R, n] = x[R, k] w[e], or x[R, k] w[e]^T with w [G, n, k]. The bias [E, n], which may be empty, is for one layer of
// E groups; w has the groups of all layers.
ffi::Error Grouped(ffi::ThreadPool pool, Floats x, Floats w, Floats bias, Ints sizes, ffi::Result<Floats> y,
                   bool transposed) {
  const int64_t k = x.dimensions()[1], n = y->dimensions()[1];
  const int64_t num_biases = bias.element_count() ? bias.dimensions()[0] : 0;
  auto make = [&](int64_t e, int64_t row, int64_t count) {
    const Strided b{w.typed_data() + e * n * k, transposed ? 1 : n, transposed ? k : 1};
    Matmul p{count, n, k, {x.typed_data() + row * k, k, 1}, b, y->typed_data() + row * n};
    if (num_biases) p.bias = bias.typed_data() + e % num_biases * n;
    return p;
  };
  return MultiplyGroups(GroupMatmuls(sizes, x.dimensions()[0], make), y, pool);
}

// y[R, n] = x[R, k] w[e]^T for w in MXFP4: blocks [G, n, k / 32, 16] and scales [G, n, k / 32]; or, transposed, x[R, k]
// w[e] with blocks [G, k, n / 32, 16] and scales [G, k, n / 32].
ffi::Error GroupedMxfp4(ffi::ThreadPool pool, Floats x, Bytes blocks, Bytes scales, Ints sizes, ffi::Result<Floats> y,
                        bool transposed) {
  const int64_t k = x.dimensions()[1], n = y->dimensions()[1];
  auto make = [&](int64_t e, int64_t row, int64_t count) {
    Matmul p{count, n, k, {x.typed_data() + row * k, k, 1}, {nullptr, 1, k}, y->typed_data() + row * n};
    p.blocks = blocks.typed_data() + e * n * k / kBlockSize * kBlockBytes;
    p.scales = scales.typed_data() + e * n * k / kBlockSize;
    p.blocks_by_rows = transposed;
    return p;
  };
  return MultiplyGroups(GroupMatmuls(sizes, x.dimensions()[0], make), y, pool);
}

// dw[e] = x_e^T g_e, and db[e], the sum of the rows of g_e; zero for an empty group.
ffi::Error GroupedWeightGrad(ffi::ThreadPool pool, Floats x, Floats g, Ints sizes, ffi::Result<Floats> dw,
                             ffi::Result<Floats> db) {
  const int64_t m = x.dimensions()[1], n = g.dimensions()[1];
  auto make = [&](int64_t e, int64_t row, int64_t count) {
    const Strided b{g.typed_data() + row * n, n, 1};
    Matmul p{m, n, count, {x.typed_data() + row * m, 1, m}, b, dw->typed_data() + e * m * n};
    p.b_sums = db->typed_data() + e * n;
    return p;
  };
  Multiply(GroupMatmuls(sizes, x.dimensions()[0], make), false, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMatmul, Grouped,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
                                  .Arg<Ints>().Ret<Floats>().Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMatmulMxfp4, GroupedMxfp4,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Bytes>().Arg<Bytes>()
                                  .Arg<Ints>().Ret<Floats>().Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMatmulWeightGrad, GroupedWeightGrad,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Ints>()
                                  .Ret<Floats>().Ret<Floats>());
