// Decoding on CPU, as XLA FFI calls: a handful of rows times matrices that are far larger than they are, so that time
// is that of reading the matrices once. Each call gets the matrices of all layers and the number of one: nothing is
// copied out of a stack.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "mxfp4.h"
#include "parallel.h"

namespace {

constexpr int kRows = 4;          // worked through together
constexpr int64_t kInner = 64;    // lines of a matrix that stay in the cache while further rows use them
constexpr int64_t kLines = 192;   // lines of a task at most, where a matrix is shared out by lines, as they lie in memory
constexpr int64_t kWide = 2048;   // and columns
constexpr int64_t kBlock = 512;   // columns of a task at most, where it is shared out by columns
constexpr int64_t kLeast = 64;    // and at least

using Floats = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;
using Ints = ffi::Buffer<ffi::S32>;

// Columns of a task, where `columns` in all are to be shared among the threads.
int64_t BlockOf(int64_t columns, int64_t width, ffi::ThreadPool& pool) {
  const int64_t share = columns / (3 * std::max<int64_t>(pool.num_threads(), 1)) / kLanes * kLanes;
  return std::min(std::max(share, kLeast), std::min(kBlock, (width + kLanes - 1) / kLanes * kLanes));
}

struct Rows {
  const float* x[kRows];
  float* y[kRows];
};

// y[i][0 : columns] += x[i][0 : inner] w[0 : inner, 0 : columns] for each of the rows.
template <int rows>
void Add(const Rows& r, const float* w, int64_t w_line, int64_t inner, int64_t columns) {
  int64_t j = 0;
  for (; j + 4 <= inner; j += 4, w += 4 * w_line) {
    Vector x[rows][4];
    for (int i = 0; i < rows; ++i)
      for (int l = 0; l < 4; ++l) x[i][l] = Vector{} + r.x[i][j + l];
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      const Vector w0 = Load(w + c), w1 = Load(w + w_line + c);
      const Vector w2 = Load(w + 2 * w_line + c), w3 = Load(w + 3 * w_line + c);
      for (int l = 0; l < 4; ++l) __builtin_prefetch(w + (4 + l) * w_line + c);
      for (int i = 0; i < rows; ++i) {
        Vector sum = Load(r.y[i] + c);
        sum += x[i][0] * w0;
        sum += x[i][1] * w1;
        sum += x[i][2] * w2;
        sum += x[i][3] * w3;
        Store(r.y[i] + c, sum);
      }
    }
    for (; c < columns; ++c)
      for (int i = 0; i < rows; ++i)
        for (int l = 0; l < 4; ++l) r.y[i][c] += r.x[i][j + l] * w[l * w_line + c];
  }
  for (; j < inner; ++j, w += w_line)
    for (int i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) r.y[i][c] += r.x[i][j] * w[c];
}

float Total(Vector v) {
  float sum = 0;
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return sum + v[0];
}

// y[i][0 : columns] = x[i][0 : inner] w[0 : columns, 0 : inner]^T.
template <int rows>
void Dot(const Rows& r, const float* w, int64_t w_line, int64_t inner, int64_t columns) {
  constexpr int together = 4;
  for (int64_t c = 0; c < columns; c += together) {
    const int count = std::min<int64_t>(together, columns - c);
    const float* line[together];
    for (int l = 0; l < together; ++l) line[l] = w + (c + std::min(l, count - 1)) * w_line;
    Vector sum[rows][together] = {};
    int64_t j = 0;
    for (; j + kLanes <= inner; j += kLanes)
      for (int l = 0; l < together; ++l) {
        const Vector one = Load(line[l] + j);
        for (int i = 0; i < rows; ++i) sum[i][l] += Load(r.x[i] + j) * one;
      }
    for (int i = 0; i < rows; ++i)
      for (int l = 0; l < count; ++l) {
        float total = Total(sum[i][l]);
        for (int64_t k = j; k < inner; ++k) total += r.x[i][k] * line[l][k];
        r.y[i][c + l] = total;
      }
  }
}

// The same with packed w: x[i] has the even numbers of each group of 32 first, then the odd ones.
template <int rows>
void DotPacked(const Rows& r, const uint8_t* blocks, const uint8_t* scales, int64_t groups, int64_t line_groups,
               int64_t columns) {
  for (int64_t c = 0; c < columns; ++c, blocks += line_groups * kGroupBytes, scales += line_groups) {
    Vector sum[rows] = {};
    for (int64_t g = 0; g < groups; ++g) {
      Vector low, high;
      Codes(blocks + g * kGroupBytes, scales[g], &low, &high);
      const float scale = ScaleOf(scales[g]);
      for (int i = 0; i < rows; ++i) {
        const float* x = r.x[i] + g * kGroup;
        sum[i] += scale * (low * Load(x) + high * Load(x + kLanes));
      }
    }
    for (int i = 0; i < rows; ++i) r.y[i][c] = Total(sum[i]);
  }
}

// Calls one(first, rows) for at most kRows rows at a time.
template <typename F>
void InFours(int64_t rows, F one) {
  for (int64_t i = 0; i < rows; i += kRows) one(i, std::min<int64_t>(kRows, rows - i));
}

#define BY_COUNT(count, function, ...)            \
  switch (count) {                                \
    case 1: function<1>(__VA_ARGS__); break;      \
    case 2: function<2>(__VA_ARGS__); break;      \
    case 3: function<3>(__VA_ARGS__); break;      \
    default: function<4>(__VA_ARGS__);            \
  }

// y[R, columns] += x[R, inner] w[inner, columns], any number of rows.
void AddAll(const std::vector<const float*>& x, const std::vector<float*>& y, const float* w, int64_t w_line,
            int64_t inner, int64_t columns) {
  for (int64_t from = 0; from < inner; from += kInner) {
    InFours(x.size(), [&](int64_t first, int count) {
      Rows r;
      for (int i = 0; i < count; ++i) r.x[i] = x[first + i] + from, r.y[i] = y[first + i];
      BY_COUNT(count, Add, r, w + from * w_line, w_line, std::min(kInner, inner - from), columns)
    });
  }
}

// How the matrices [lines, columns] of some groups are shared out: whole lines as far as possible, which lie one
// after another in memory. The parts do not depend on what else is asked for, so neither does how sums are rounded.
struct Shares {
  int64_t groups, lines, columns, parts, blocks;

  Shares(int64_t groups, int64_t lines, int64_t columns)
      : groups(groups), lines(lines), columns(columns), parts(std::max<int64_t>(1, (lines + kLines - 1) / kLines)),
        blocks((columns + kWide - 1) / kWide) {}

  int64_t tasks() const { return groups * parts * blocks; }

  struct One {
    int64_t group, part, line, count, column, width;
  };
  One at(int64_t task) const {
    const int64_t block = task % blocks, part = task / blocks % parts;
    const int64_t share = (lines + parts - 1) / parts, width = (columns / blocks + kLanes - 1) / kLanes * kLanes;
    const int64_t line = part * share, column = block * width;
    // The last block takes what is left.
    const int64_t end = block + 1 == blocks ? columns : column + width;
    return {task / blocks / parts, part, line, std::max<int64_t>(0, std::min(share, lines - line)), column, end - column};
  }
};

// sum[0 : count] += each further part, which are `step` numbers apart.
void AddParts(float* sum, int64_t step, int64_t parts, int64_t count) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < count; ++i) sum[i] += sum[part * step + i];
}

// y_i = x w_i[layer] for every weight, [layers, inner, columns].
ffi::Error Products(ffi::ThreadPool pool, Floats x, Ints layer, ffi::RemainingArgs weights,
                    ffi::RemainingRets results) {
  const int64_t rows = x.dimensions()[0], inner = x.dimensions()[1];
  struct Weight {
    Shares shares;
    const float* w;
    float* y;
    std::unique_ptr<float[]> further;  // sums of all parts but the first
  };
  std::vector<Weight> all;
  std::vector<std::pair<const Weight*, int64_t>> tasks;
  for (size_t i = 0; i < results.size(); ++i) {
    Floats y = **results.get<Floats>(i), w = *weights.get<Floats>(i);
    const Shares shares(1, inner, y.dimensions()[1]);
    const int64_t size = rows * shares.columns;
    all.push_back({shares, w.typed_data() + layer.typed_data()[0] * inner * shares.columns, y.typed_data(),
                   std::make_unique<float[]>((shares.parts - 1) * size)});
  }
  for (const Weight& weight : all)
    for (int64_t task = 0; task < weight.shares.tasks(); ++task) tasks.emplace_back(&weight, task);
  auto multiply = [&](int64_t number) {
    const auto [weight, task] = tasks[number];
    const Shares::One one = weight->shares.at(task);
    const int64_t columns = weight->shares.columns;
    float* sums = one.part == 0 ? weight->y : weight->further.get() + (one.part - 1) * rows * columns;
    std::vector<const float*> from;
    std::vector<float*> to;
    for (int64_t i = 0; i < rows; ++i) {
      from.push_back(x.typed_data() + i * inner + one.line), to.push_back(sums + i * columns + one.column);
      std::memset(to.back(), 0, one.width * sizeof(float));
    }
    AddAll(from, to, weight->w + one.line * columns + one.column, columns, one.count, one.width);
  };
  auto add = [&](int64_t row) {
    for (const Weight& weight : all) {
      const int64_t columns = weight.shares.columns, size = rows * columns;
      for (int64_t part = 1; part < weight.shares.parts; ++part)
        for (int64_t c = 0; c < columns; ++c)
          weight.y[row * columns + c] += weight.further[(part - 1) * size + row * columns + c];
    }
  };
  Run({{(int64_t)tasks.size(), multiply}, {rows, add}}, pool);
  return ffi::Error::Success();
}

// The same with w turned, [layers, columns, inner].
ffi::Error TurnedProducts(ffi::ThreadPool pool, Floats x, Ints layer, ffi::RemainingArgs weights,
                          ffi::RemainingRets results) {
  const int64_t rows = x.dimensions()[0], inner = x.dimensions()[1];
  struct Task {
    const float* w;
    float* y;
    int64_t columns, all;
  };
  std::vector<Task> tasks;
  for (size_t i = 0; i < results.size(); ++i) {
    Floats y = **results.get<Floats>(i), w = *weights.get<Floats>(i);
    const int64_t columns = y.dimensions()[1], block = BlockOf(columns, columns, pool);
    const float* start = w.typed_data() + layer.typed_data()[0] * inner * columns;
    for (int64_t c = 0; c < columns; c += block)
      tasks.push_back({start + c * inner, y.typed_data() + c, std::min(block, columns - c), columns});
  }
  auto multiply = [&](int64_t number) {
    const Task& t = tasks[number];
    InFours(rows, [&](int64_t first, int count) {
      Rows r;
      for (int i = 0; i < count; ++i)
        r.x[i] = x.typed_data() + (first + i) * inner, r.y[i] = t.y + (first + i) * t.all;
      BY_COUNT(count, Dot, r, t.w, inner, inner, t.columns)
    });
  };
  Run({{(int64_t)tasks.size(), multiply}}, pool);
  return ffi::Error::Success();
}

// What both forms of the experts' matrices have in common.
struct Experts {
  int64_t tokens, width, hidden, experts, chosen;  // M, D, F, E, X
  int64_t first;                                   // expert 0 of this layer
  const float *x, *gate_up_bias, *down_bias;       // the biases may be null
  float alpha, limit, offset;

  struct Group {
    int64_t number;             // in its layer
    int64_t expert;             // of all layers
    std::vector<int64_t> rows;  // token * X + place
  };
  std::vector<Group> groups;

  Experts(Floats x, Ints chosen, Ints first, Floats gate_up_bias, Floats down_bias, int64_t experts, int64_t hidden,
          float alpha, float limit, float offset)
      : tokens(x.dimensions()[0]), width(x.dimensions()[1]), hidden(hidden), experts(experts),
        chosen(chosen.dimensions()[1]), first(first.typed_data()[0]), x(x.typed_data()),
        gate_up_bias(gate_up_bias.element_count() ? gate_up_bias.typed_data() : nullptr),
        down_bias(down_bias.element_count() ? down_bias.typed_data() : nullptr),
        alpha(alpha), limit(limit), offset(offset) {
    std::vector<int64_t> place(experts, -1);
    for (int64_t r = 0; r < tokens * this->chosen; ++r) {
      const int32_t expert = chosen.typed_data()[r];
      if (expert < 0 || expert >= experts) continue;
      if (place[expert] < 0) place[expert] = groups.size(), groups.push_back({expert, this->first + expert, {}});
      groups[place[expert]].rows.push_back(r);
    }
  }

  int64_t rows() const { return tokens * chosen; }

  // gate[0 : count] becomes the activation of it and of up.
  void Gate(float* gate, const float* up, int64_t count) const {
    for (int64_t c = 0; c < count; c += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, count - c);
      Vector one[2] = {};
      std::memcpy(&one[0], gate + c, width * sizeof(float));
      std::memcpy(&one[1], up + c, width * sizeof(float));
      const Vector g = Least(one[0], Fill(limit)), u = Most(Least(one[1], Fill(limit)), Fill(-limit));
      one[0] = g / (1.0f + Exp(-alpha * g)) * (u + offset);
      std::memcpy(gate + c, &one[0], width * sizeof(float));
    }
  }

  // The weighted sum of each token's results z [rows, D].
  void Sum(const float* z, const Ints& picked, const float* weights, float* y) const {
    std::memset(y, 0, tokens * width * sizeof(float));
    for (int64_t r = 0; r < rows(); ++r) {
      const int32_t expert = picked.typed_data()[r];
      if (expert < 0 || expert >= experts) continue;
      for (int64_t d = 0; d < width; ++d) y[r / chosen * width + d] += weights[r] * z[r * width + d];
    }
  }
};

// The weighted sum of the outputs of each token's experts. The matrices are those of all layers' experts, [experts, D,
// 2, F] and [experts, F, D]; `first` is the layer's first one. The biases are those of the layer alone.
ffi::Error FewRowsOfExperts(ffi::ThreadPool pool, Floats x, Ints chosen, Floats weights, Ints first, Floats gate_up,
                            Floats gate_up_bias, Floats down, Floats down_bias, ffi::Result<Floats> y,
                            int64_t experts, float alpha, float limit, float offset) {
  const Experts e(x, chosen, first, gate_up_bias, down_bias, experts, down.dimensions()[1], alpha, limit, offset);
  const int64_t D = e.width, F = e.hidden, rows = e.rows();
  const Shares up(e.groups.size(), D, 2 * F), down_again(e.groups.size(), F, D);
  // Each share of the lines has sums of its own, which are added up in their order.
  auto h = std::make_unique<float[]>(up.parts * rows * 2 * F), z = std::make_unique<float[]>(down_again.parts * rows * D);

  auto multiply = [&](const Shares& shares, int64_t task, const float* w, const float* bias, auto input, float* sums) {
    const Shares::One one = shares.at(task);
    const auto& group = e.groups[one.group];
    std::vector<const float*> from;
    std::vector<float*> to;
    for (int64_t r : group.rows) {
      float* out = sums + (one.part * rows + r) * shares.columns + one.column;
      if (bias && one.part == 0)
        std::memcpy(out, bias + group.number * shares.columns + one.column, one.width * sizeof(float));
      else
        std::memset(out, 0, one.width * sizeof(float));
      from.push_back(input(r) + one.line), to.push_back(out);
    }
    const float* start = w + (group.expert * shares.lines + one.line) * shares.columns + one.column;
    AddAll(from, to, start, shares.columns, one.count, one.width);
  };
  auto gate = [&](int64_t task) {
    for (int64_t r : e.groups[task].rows) {
      float* sum = h.get() + r * 2 * F;
      AddParts(sum, rows * 2 * F, up.parts, 2 * F);
      e.Gate(sum, sum + F, F);
    }
  };
  Run({{up.tasks(), [&](int64_t task) {
          multiply(up, task, gate_up.typed_data(), e.gate_up_bias, [&](int64_t r) { return e.x + r / e.chosen * D; },
                   h.get());
        }},
       {(int64_t)e.groups.size(), gate},
       {down_again.tasks(), [&](int64_t task) {
          multiply(down_again, task, down.typed_data(), e.down_bias, [&](int64_t r) { return h.get() + r * 2 * F; },
                   z.get());
        }}},
      pool);
  for (const auto& group : e.groups)
    for (int64_t r : group.rows) AddParts(z.get() + r * D, rows * D, down_again.parts, D);
  e.Sum(z.get(), chosen, weights.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

// Where number i of a line of x stands for DotPacked.
int64_t Turned(int64_t i) { return i / kGroup * kGroup + i % 2 * kLanes + i % kGroup / 2; }

// The same with packed matrices, [experts, F, 2, D / 32, 16] and [experts, D, F / 32, 16], with their scales.
ffi::Error FewRowsOfPacked(ffi::ThreadPool pool, Floats x, Ints chosen, Floats weights, Ints first, Bytes gate_up,
                           Bytes gate_up_scales, Floats gate_up_bias, Bytes down, Bytes down_scales, Floats down_bias,
                           ffi::Result<Floats> y, int64_t experts, float alpha, float limit, float offset) {
  const Experts e(x, chosen, first, gate_up_bias, down_bias, experts, gate_up.dimensions()[1], alpha, limit, offset);
  const int64_t D = e.width, F = e.hidden, x_groups = D / kGroup, h_groups = F / kGroup;
  auto turned = std::make_unique<float[]>(e.tokens * D);
  for (int64_t m = 0; m < e.tokens; ++m)
    for (int64_t d = 0; d < D; ++d) turned[m * D + Turned(d)] = e.x[m * D + d];
  auto a = std::make_unique<float[]>(e.rows() * F), z = std::make_unique<float[]>(e.rows() * D);
  const int64_t count = e.groups.size();
  const int64_t f_block = BlockOf(count * F, F, pool), d_block = BlockOf(count * D, D, pool);
  const int64_t f_blocks = (F + f_block - 1) / f_block, d_blocks = (D + d_block - 1) / d_block;

  auto up = [&](int64_t task) {
    const auto& group = e.groups[task / f_blocks];
    const int64_t f = task % f_blocks * f_block, columns = std::min(f_block, F - f);
    InFours(group.rows.size(), [&](int64_t first, int rows) {
      float h[kRows][2 * kBlock];  // gate and up take turns
      Rows r;
      for (int i = 0; i < rows; ++i)
        r.x[i] = turned.get() + group.rows[first + i] / e.chosen * D, r.y[i] = h[i];
      const int64_t line = (group.expert * F + f) * 2;
      BY_COUNT(rows, DotPacked, r, gate_up.typed_data() + line * x_groups * kGroupBytes,
               gate_up_scales.typed_data() + line * x_groups, x_groups, x_groups, 2 * columns)
      for (int i = 0; i < rows; ++i) {
        float halves[2][kBlock];
        for (int half = 0; half < 2; ++half)
          for (int64_t c = 0; c < columns; ++c)
            halves[half][c] =
                h[i][2 * c + half] + (e.gate_up_bias ? e.gate_up_bias[(group.number * 2 + half) * F + f + c] : 0);
        e.Gate(halves[0], halves[1], columns);
        for (int64_t c = 0; c < columns; ++c) a[group.rows[first + i] * F + Turned(f + c)] = halves[0][c];
      }
    });
  };
  auto down_again = [&](int64_t task) {
    const auto& group = e.groups[task / d_blocks];
    const int64_t d = task % d_blocks * d_block, columns = std::min(d_block, D - d);
    InFours(group.rows.size(), [&](int64_t first, int rows) {
      Rows r;
      for (int i = 0; i < rows; ++i) {
        r.x[i] = a.get() + group.rows[first + i] * F;
        r.y[i] = z.get() + group.rows[first + i] * D + d;
      }
      const int64_t line = group.expert * D + d;
      BY_COUNT(rows, DotPacked, r, down.typed_data() + line * h_groups * kGroupBytes,
               down_scales.typed_data() + line * h_groups, h_groups, h_groups, columns)
      for (int i = 0; e.down_bias && i < rows; ++i)
        for (int64_t c = 0; c < columns; ++c) r.y[i][c] += e.down_bias[group.number * D + d + c];
    });
  };
  Run({{count * f_blocks, up}, {count * d_blocks, down_again}}, pool);
  e.Sum(z.get(), chosen, weights.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

// One query of each sequence, q [B, N, H], over the first counts[b] slots of keys and values [layers, B, K, S, H];
// a count of 0 gives zeros. sinks [N] may be empty.
ffi::Error OneQuery(ffi::ThreadPool pool, Floats q, Floats keys, Floats values, Ints layer, Ints counts, Floats sinks,
                    ffi::Result<Floats> y) {
  const auto sizes = keys.dimensions();
  const int64_t B = sizes[1], K = sizes[2], S = sizes[3], H = sizes[4], G = q.dimensions()[1] / K;
  const float scale = 1 / std::sqrt((float)H);
  auto one = [&](int64_t task) {
    const int64_t b = task / K, count = std::min<int64_t>(counts.typed_data()[b], S);
    float* out = y->typed_data() + task * G * H;
    if (count <= 0) {
      std::memset(out, 0, G * H * sizeof(float));
      return;
    }
    const int64_t start = (layer.typed_data()[0] * B * K + task) * S * H;
    const float* query = q.typed_data() + task * G * H;
    auto weights = std::make_unique<float[]>(G * count);
    std::vector<const float*> x(G), p(G);
    std::vector<float*> scores(G), result(G);
    for (int64_t g = 0; g < G; ++g) {
      x[g] = query + g * H, scores[g] = weights.get() + g * count, p[g] = scores[g], result[g] = out + g * H;
    }
    InFours(G, [&](int64_t first, int rows) {
      Rows r;
      for (int i = 0; i < rows; ++i) r.x[i] = x[first + i], r.y[i] = scores[first + i];
      BY_COUNT(rows, Dot, r, keys.typed_data() + start, H, H, count)
    });
    for (int64_t g = 0; g < G; ++g) {
      const float* sink = sinks.element_count() ? sinks.typed_data() + task % K * G + g : nullptr;
      float largest = scores[g][0];
      for (int64_t s = 1; s < count; ++s) largest = std::max(largest, scores[g][s]);
      largest *= scale;
      if (sink) largest = std::max(largest, *sink);
      float total = sink ? std::exp(*sink - largest) : 0;
      for (int64_t s = 0; s < count; s += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, count - s);
        Vector one = {};
        std::memcpy(&one, scores[g] + s, width * sizeof(float));
        one = Exp(one * scale - largest);
        std::memcpy(scores[g] + s, &one, width * sizeof(float));
      }
      for (int64_t s = 0; s < count; ++s) total += scores[g][s];
      for (int64_t s = 0; s < count; ++s) scores[g][s] /= total;
    }
    std::memset(out, 0, G * H * sizeof(float));
    AddAll(p, result, values.typed_data() + start, H, count, H);
  };
  Run({{B * K, one}}, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsProducts, Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsTurnedProducts, TurnedProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsExperts, FewRowsOfExperts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("experts")
                                  .Attr<float>("alpha")
                                  .Attr<float>("limit")
                                  .Attr<float>("offset"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsPacked, FewRowsOfPacked,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Floats>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("experts")
                                  .Attr<float>("alpha")
                                  .Attr<float>("limit")
                                  .Attr<float>("offset"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsAttention, OneQuery,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
