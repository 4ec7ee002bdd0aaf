// The experts of a few rows, plain and packed, as XLA FFI calls. Matrices of experts that no row goes to are not read.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "decode.h"
#include "mxfp4.h"

namespace {

// `Dot` with packed w: x[i] has the even numbers of each group of 32 first, then the odd ones.
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

// sum[0 : count] += each further part, which are `step` numbers apart.
void AddParts(float* sum, int64_t step, int64_t parts, int64_t count) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < count; ++i) sum[i] += sum[part * step + i];
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
      const Vector g = Least(Fill(limit), one[0]), u = Most(Fill(-limit), Least(Fill(limit), one[1]));
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
  const auto h = Unset(up.parts * rows * 2 * F), z = Unset(down_again.parts * rows * D);

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

// The same with packed matrices, [experts, 2 F, D / 32, 16], where the rows of gate and up take
// turns, and [experts, D, F / 32, 16], with their scales.
ffi::Error FewRowsOfPacked(ffi::ThreadPool pool, Floats x, Ints chosen, Floats weights, Ints first, Bytes gate_up,
                           Bytes gate_up_scales, Floats gate_up_bias, Bytes down, Bytes down_scales, Floats down_bias,
                           ffi::Result<Floats> y, int64_t experts, float alpha, float limit, float offset) {
  const Experts e(x, chosen, first, gate_up_bias, down_bias, experts, gate_up.dimensions()[1] / 2, alpha, limit,
                  offset);
  const int64_t D = e.width, F = e.hidden, x_groups = D / kGroup, h_groups = F / kGroup;
  const auto turned = Unset(e.tokens * D);
  for (int64_t m = 0; m < e.tokens; ++m)
    for (int64_t d = 0; d < D; ++d) turned[m * D + Turned(d)] = e.x[m * D + d];
  const auto a = Unset(e.rows() * F), z = Unset(e.rows() * D);
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

}  // namespace

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
