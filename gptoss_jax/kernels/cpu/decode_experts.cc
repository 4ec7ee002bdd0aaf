// Experts for a few tokens, dense and in MXFP4, as XLA FFI calls. Only experts with tokens are read.
// Letters: M tokens, X experts per token, E experts of a layer, D hidden size, F expert width.

#include "decode.h"
#include "mxfp4.h"

namespace {

struct SwiGLU {
  float alpha, limit, up_offset;

  // gate[0 : count] = gate * sigmoid(alpha * gate) * (up + up_offset), both clamped.
  void Apply(float* gate, const float* up, int64_t count) const {
    for (int64_t c = 0; c < count; c += kLanes) {
      const Vector g = Min(Broadcast(limit), LoadPartial(gate + c, count - c));
      const Vector u = Max(Broadcast(-limit), Min(Broadcast(limit), LoadPartial(up + c, count - c)));
      StorePartial(gate + c, g / (1.0f + Exp(-alpha * g)) * (u + up_offset), count - c);
    }
  }
};

// The tokens of each expert. A row is a (token, expert) pair: token * X + index of the expert in the token's choices.
struct Routing {
  int64_t M, X, D, num_experts;
  const float* weights;  // [M, X]
  std::vector<int64_t> group_of_row;  // -1 if there is none

  struct Group {
    int64_t expert;  // index in its layer
    int64_t matrix;  // index in the stack of all layers
    std::vector<int64_t> rows;
  };
  std::vector<Group> groups;

  Routing(Floats x, Ints experts, Floats weights, Ints layer, int64_t num_experts)
      : M(x.dimensions()[0]), X(experts.dimensions()[1]), D(x.dimensions()[1]), num_experts(num_experts),
        weights(weights.typed_data()), group_of_row(M * X, -1) {
    std::vector<int64_t> group_of(num_experts, -1);
    for (int64_t r = 0; r < M * X; ++r) {
      const int32_t e = experts.typed_data()[r];
      if (e < 0 || e >= num_experts) continue;
      if (group_of[e] < 0) {
        group_of[e] = groups.size();
        groups.push_back({e, layer.typed_data()[0] * num_experts + e, {}});
      }
      groups[group_of_row[r] = group_of[e]].rows.push_back(r);
    }
  }

  int64_t num_rows() const { return M * X; }

  // y [M, D] = the weighted sum of the rows of each token in z [M X, D].
  void Combine(const float* z, float* y) const {
    std::memset(y, 0, M * D * sizeof(float));
    for (int64_t r = 0; r < num_rows(); ++r) {
      if (group_of_row[r] < 0) continue;
      for (int64_t d = 0; d < D; ++d) y[r / X * D + d] += weights[r] * z[r * D + d];
    }
  }
};

const float* DataOrNull(Floats& bias) { return bias.element_count() ? bias.typed_data() : nullptr; }

// y [M, D] = the weighted sum of the outputs of each token's experts. gate_up [layers, E, D, 2, F] and down [layers, E,
// F, D] have all layers; the biases [E, 2, F] and [E, D], which may be empty, have one.
ffi::Error Experts(ffi::ThreadPool pool, Floats x, Ints experts, Floats weights, Ints layer, Floats gate_up,
                   Floats gate_up_bias, Floats down, Floats down_bias, ffi::Result<Floats> y, float alpha, float limit,
                   float up_offset) {
  const Routing routing(x, experts, weights, layer, down.dimensions()[1]);
  const SwiGLU swiglu{alpha, limit, up_offset};
  const int64_t D = routing.D, F = down.dimensions()[2], rows = routing.num_rows(), groups = routing.groups.size();
  const auto h = Uninitialized(rows * 2 * F), z = Uninitialized(rows * D);
  const SplitMatmul up_matmul(WorkSplit(groups, D, 2 * F), rows, h.get());
  const SplitMatmul down_matmul(WorkSplit(groups, F, D), rows, z.get());

  auto multiply = [&](const SplitMatmul& matmul, int64_t index, const float* w, const float* bias, auto input) {
    const auto task = matmul.split.task(index);
    const auto& group = routing.groups[task.group];
    const int64_t columns = matmul.split.columns;
    matmul.Multiply(task, w + group.matrix * matmul.split.inner * columns, bias ? bias + group.expert * columns : bias,
                    group.rows, input);
  };
  auto multiply_up = [&](int64_t index) {
    multiply(up_matmul, index, gate_up.typed_data(), DataOrNull(gate_up_bias),
             [&](int64_t r) { return x.typed_data() + r / routing.X * D; });
  };
  auto activate = [&](int64_t index) {
    for (int64_t r : routing.groups[index].rows) {
      up_matmul.AddPartialSums(r);
      swiglu.Apply(h.get() + r * 2 * F, h.get() + r * 2 * F + F, F);
    }
  };
  auto multiply_down = [&](int64_t index) {
    multiply(down_matmul, index, down.typed_data(), DataOrNull(down_bias),
             [&](int64_t r) { return h.get() + r * 2 * F; });
  };
  RunPhases({{up_matmul.split.num_tasks(), multiply_up}, {groups, activate},
             {down_matmul.split.num_tasks(), multiply_down}}, pool);
  for (const auto& group : routing.groups)
    for (int64_t r : group.rows) down_matmul.AddPartialSums(r);
  routing.Combine(z.get(), y->typed_data());
  return ffi::Error::Success();
}

// A matrix [rows, inner] in MXFP4.
struct Mxfp4Rows {
  const uint8_t* blocks;
  const uint8_t* scales;
  int64_t inner;

  Mxfp4Rows(Bytes& blocks, Bytes& scales, int64_t row, int64_t inner)
      : blocks(blocks.typed_data() + row * inner / kBlockSize * kBlockBytes),
        scales(scales.typed_data() + row * inner / kBlockSize), inner(inner) {}

  // DotRows for rows 0 … columns - 1, with x in the order given by Deinterleaved.
  template <int tokens>
  void Dot(const TokenBlock& t, int64_t columns) const {
    const int64_t num_blocks = inner / kBlockSize;
    const uint8_t *block = blocks, *scale = scales;
    for (int64_t c = 0; c < columns; ++c) {
      Vector sum[tokens] = {};
      for (int64_t b = 0; b < num_blocks; ++b, block += kBlockBytes, ++scale) {
        Vector low, high;
        LoadCodes(block, *scale, &low, &high);
        const float power = ScaleOf(*scale);
        for (int i = 0; i < tokens; ++i) {
          const float* x = t.x[i] + b * kBlockSize;
          sum[i] += power * (low * Load(x) + high * Load(x + kLanes));
        }
      }
      for (int i = 0; i < tokens; ++i) t.y[i][c] = HorizontalSum(sum[i]);
    }
  }
};

// The index of value i of a row if, in each block, the even values come before the odd ones, as in LoadCodes.
int64_t Deinterleaved(int64_t i) { return i / kBlockSize * kBlockSize + i % 2 * kLanes + i % kBlockSize / 2; }

// Experts in MXFP4: blocks [layers, E, 2 F, D / 32, 16], with interleaved rows of gate and up, and [layers, E, D,
// F / 32, 16], and their scales.
ffi::Error ExpertsMxfp4(ffi::ThreadPool pool, Floats x, Ints experts, Floats weights, Ints layer, Bytes gate_up,
                        Bytes gate_up_scales, Floats gate_up_bias, Bytes down, Bytes down_scales, Floats down_bias,
                        ffi::Result<Floats> y, float alpha, float limit, float up_offset) {
  const Routing routing(x, experts, weights, layer, gate_up.dimensions()[1]);
  const SwiGLU swiglu{alpha, limit, up_offset};
  const int64_t D = routing.D, F = gate_up.dimensions()[2] / 2, groups = routing.groups.size();
  const float *up_bias = DataOrNull(gate_up_bias), *bias = DataOrNull(down_bias);
  const auto inputs = Uninitialized(routing.M * D);
  for (int64_t m = 0; m < routing.M; ++m)
    for (int64_t d = 0; d < D; ++d) inputs[m * D + Deinterleaved(d)] = x.typed_data()[m * D + d];
  const auto a = Uninitialized(routing.num_rows() * F), z = Uninitialized(routing.num_rows() * D);
  const int64_t up_cols = TaskColumns(groups * F, F, pool), down_cols = TaskColumns(groups * D, D, pool);
  const int64_t up_tasks = CeilDiv(F, up_cols), down_tasks = CeilDiv(D, down_cols);

  auto multiply_up = [&](int64_t index) {
    const auto& group = routing.groups[index / up_tasks];
    const int64_t f = index % up_tasks * up_cols, columns = std::min(up_cols, F - f);
    const Mxfp4Rows w(gate_up, gate_up_scales, (group.matrix * F + f) * 2, D);
    ForEachRowBlock(group.rows.size(), [&](int64_t first, auto n) {
      float h[kTokenBlock][2 * kMaxCols];  // gate and up are interleaved
      TokenBlock t;
      for (int i = 0; i < n; ++i)
        t.x[i] = inputs.get() + group.rows[first + i] / routing.X * D, t.y[i] = h[i];
      w.Dot<n()>(t, 2 * columns);
      for (int i = 0; i < n; ++i) {
        float halves[2][kMaxCols];
        for (int half = 0; half < 2; ++half)
          for (int64_t c = 0; c < columns; ++c)
            halves[half][c] = h[i][2 * c + half] + (up_bias ? up_bias[(group.expert * 2 + half) * F + f + c] : 0);
        swiglu.Apply(halves[0], halves[1], columns);
        for (int64_t c = 0; c < columns; ++c) a[group.rows[first + i] * F + Deinterleaved(f + c)] = halves[0][c];
      }
    });
  };
  auto multiply_down = [&](int64_t index) {
    const auto& group = routing.groups[index / down_tasks];
    const int64_t d = index % down_tasks * down_cols, columns = std::min(down_cols, D - d);
    const Mxfp4Rows w(down, down_scales, group.matrix * D + d, F);
    ForEachRowBlock(group.rows.size(), [&](int64_t first, auto n) {
      TokenBlock t;
      for (int i = 0; i < n; ++i)
        t.x[i] = a.get() + group.rows[first + i] * F, t.y[i] = z.get() + group.rows[first + i] * D + d;
      w.Dot<n()>(t, columns);
      for (int i = 0; bias && i < n; ++i)
        for (int64_t c = 0; c < columns; ++c) t.y[i][c] += bias[group.expert * D + d + c];
    });
  };
  RunPhases({{groups * up_tasks, multiply_up}, {groups * down_tasks, multiply_down}}, pool);
  routing.Combine(z.get(), y->typed_data());
  return ffi::Error::Success();
}

// The operands before the matrices: x, expert ids and weights of each token, and the layer.
auto BindRouting() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Ints>().Arg<Floats>().Arg<Ints>();
}

template <typename Binding>
auto BindSwiGLU(Binding binding) {
  return std::move(binding).template Ret<Floats>().template Attr<float>("alpha").template Attr<float>("limit")
      .template Attr<float>("up_offset");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeExperts, Experts,
                              BindSwiGLU(BindRouting().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeExpertsMxfp4, ExpertsMxfp4,
                              BindSwiGLU(BindRouting().Arg<Bytes>().Arg<Bytes>().Arg<Floats>().Arg<Bytes>()
                                             .Arg<Bytes>().Arg<Floats>()));
