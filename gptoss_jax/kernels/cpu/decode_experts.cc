// Experts for a few tokens, dense and in MXFP4, as XLA FFI calls. Only experts with tokens are read.
// Letters: M tokens, X experts per token, E experts of a layer, D hidden size, F expert width.

#include "decode.h"
#include "mxfp4_dot.h"

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
// F, D], float or bfloat16, have all layers; the biases [E, 2, F] and [E, D], which may be empty, have one.
ffi::Error Experts(ffi::ThreadPool pool, Floats x, Ints experts, Floats weights, Ints layer, Values gate_up,
                   Floats gate_up_bias, Values down, Floats down_bias, ffi::Result<Floats> y, float alpha, float limit,
                   float up_offset, bool rounded) {
  const Routing routing(x, experts, weights, layer, down.dimensions()[1]);
  const SwiGLU swiglu{alpha, limit, up_offset};
  const int64_t D = routing.D, F = down.dimensions()[2], rows = routing.num_rows(), groups = routing.groups.size();
  const auto h = Uninitialized(rows * 2 * F), z = Uninitialized(rows * D);
  const SplitMatmul up_matmul(WorkSplit(groups, D, 2 * F), rows, h.get());
  const SplitMatmul down_matmul(WorkSplit(groups, F, D), rows, z.get());

  auto multiply = [&](const SplitMatmul& matmul, int64_t index, const Values& weights, const float* bias, auto input) {
    const auto task = matmul.split.task(index);
    const auto& group = routing.groups[task.group];
    const int64_t columns = matmul.split.columns;
    VisitWeights(weights, rounded, group.matrix * matmul.split.inner * columns, [&](auto* w) {
      matmul.Multiply(task, w, bias ? bias + group.expert * columns : bias, group.rows, input);
    });
  };
  auto multiply_up = [&](int64_t index) {
    multiply(up_matmul, index, gate_up, DataOrNull(gate_up_bias),
             [&](int64_t r) { return x.typed_data() + r / routing.X * D; });
  };
  auto activate = [&](int64_t index) {
    for (int64_t r : routing.groups[index].rows) {
      up_matmul.AddPartialSums(r);
      swiglu.Apply(h.get() + r * 2 * F, h.get() + r * 2 * F + F, F);
    }
  };
  auto multiply_down = [&](int64_t index) {
    multiply(down_matmul, index, down, DataOrNull(down_bias),
             [&](int64_t r) { return h.get() + r * 2 * F; });
  };
  RunPhases({{up_matmul.split.num_tasks(), multiply_up}, {groups, activate},
             {down_matmul.split.num_tasks(), multiply_down}}, pool);
  for (const auto& group : routing.groups)
    for (int64_t r : group.rows) down_matmul.AddPartialSums(r);
  routing.Combine(z.get(), y->typed_data());
  return ffi::Error::Success();
}

// Experts in MXFP4: blocks [layers, E, 2 F, D / 32, 16], with interleaved rows of gate and up, and [layers, E, D,
// F / 32, 16], and their scales.
ffi::Error ExpertsMxfp4(ffi::ThreadPool pool, Floats x, Ints experts, Floats weights, Ints layer, Bytes gate_up,
                        Bytes gate_up_scales, Floats gate_up_bias, Bytes down, Bytes down_scales, Floats down_bias,
                        ffi::Result<Floats> y, float alpha, float limit, float up_offset) {
  const Routing routing(x, experts, weights, layer, gate_up.dimensions()[1]);
  const SwiGLU swiglu{alpha, limit, up_offset};
  const int64_t D = routing.D, F = gate_up.dimensions()[2] / 2, groups = routing.groups.size();
  const float *up_bias = DataOrNull(gate_up_bias), *bias = DataOrNull(down_bias);
  const ChunkRows inputs(routing.M, D), a(routing.num_rows(), F);
  const auto z = Uninitialized(routing.num_rows() * D);
  // Whole chunks of F, which the next matmul reads.
  const int64_t up_cols = std::min(CeilDiv(TaskColumns(groups * F, F, pool), kChunkSize) * kChunkSize, kMaxCols);
  const int64_t down_cols = TaskColumns(groups * D, D, pool);
  const int64_t up_tasks = CeilDiv(F, up_cols), down_tasks = CeilDiv(D, down_cols);

  auto set_inputs = [&](int64_t m) { inputs.Set(m, 0, D, x.typed_data() + m * D); };
  auto multiply_up = [&](int64_t index) {
    const auto& group = routing.groups[index / up_tasks];
    const int64_t f = index % up_tasks * up_cols, columns = std::min(up_cols, F - f);
    const Mxfp4Rows w(gate_up.typed_data(), gate_up_scales.typed_data(), (group.matrix * F + f) * 2, D);
    ForEachRowBlock(group.rows.size(), [&](int64_t first, auto n) {
      float h[kTokenBlock][2 * kMaxCols];  // gate and up are interleaved
      Mxfp4Tokens t;
      for (int i = 0; i < n; ++i) t.x[i] = inputs.row(group.rows[first + i] / routing.X), t.y[i] = h[i];
      w.Dot<n()>(t, 2 * columns);
      for (int i = 0; i < n; ++i) {
        float halves[2][kMaxCols];
        for (int half = 0; half < 2; ++half)
          for (int64_t c = 0; c < columns; ++c)
            halves[half][c] = h[i][2 * c + half] + (up_bias ? up_bias[(group.expert * 2 + half) * F + f + c] : 0);
        swiglu.Apply(halves[0], halves[1], columns);
        a.Set(group.rows[first + i], f, columns, halves[0]);
      }
    });
  };
  auto multiply_down = [&](int64_t index) {
    const auto& group = routing.groups[index / down_tasks];
    const int64_t d = index % down_tasks * down_cols, columns = std::min(down_cols, D - d);
    const Mxfp4Rows w(down.typed_data(), down_scales.typed_data(), group.matrix * D + d, F);
    ForEachRowBlock(group.rows.size(), [&](int64_t first, auto n) {
      Mxfp4Tokens t;
      for (int i = 0; i < n; ++i)
        t.x[i] = a.row(group.rows[first + i]), t.y[i] = z.get() + group.rows[first + i] * D + d;
      w.Dot<n()>(t, columns);
      for (int i = 0; bias && i < n; ++i)
        for (int64_t c = 0; c < columns; ++c) t.y[i][c] += bias[group.expert * D + d + c];
    });
  };
  RunPhases({{routing.M, set_inputs}, {groups * up_tasks, multiply_up}, {groups * down_tasks, multiply_down}}, pool);
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
                              BindSwiGLU(BindRouting().Arg<Values>().Arg<Floats>().Arg<Values>().Arg<Floats>())
                                  .Attr<bool>("rounded"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeExpertsMxfp4, ExpertsMxfp4,
                              BindSwiGLU(BindRouting().Arg<Bytes>().Arg<Bytes>().Arg<Floats>().Arg<Bytes>()
                                             .Arg<Bytes>().Arg<Floats>()));
