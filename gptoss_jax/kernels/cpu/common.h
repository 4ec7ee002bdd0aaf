// Shared by all kernels: vectors of 16 floats, or of VECTOR_LANES, and tasks that run on XLA's thread pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;
using Ints = ffi::Buffer<ffi::S32>;

// NATIVE_LANES makes vectors fit the registers of AVX2: compilers compare wider ones lane by lane.
#if defined(NATIVE_LANES) && defined(__AVX2__) && !defined(__AVX512F__)
#define VECTOR_LANES 8
#elif !defined(VECTOR_LANES)
#define VECTOR_LANES 16
#endif
constexpr int kLanes = VECTOR_LANES;
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Static, because files differ in VECTOR_LANES.
static inline Vector Load(const float* from) { return *(const Vector*)from; }
static inline void Store(float* to, Vector value) { *(Vector*)to = value; }

// Loads the first `count` lanes, with `count` clamped to the valid range; the others are zero.
static inline Vector LoadPartial(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  Vector value = {};
  if (count > 0) std::memcpy(&value, from, count * sizeof(float));
  return value;
}
static inline void StorePartial(float* to, Vector value, int64_t count) {
  if (count >= kLanes) return Store(to, value);
  if (count > 0) std::memcpy(to, &value, count * sizeof(float));
}

static inline Vector Broadcast(float value) { return Vector{} + value; }
// NaN stays NaN in the second argument.
static inline Vector Min(Vector a, Vector b) { return a < b ? a : b; }
static inline Vector Max(Vector a, Vector b) { return a > b ? a : b; }

static inline float HorizontalSum(Vector v) {
  float sum = 0;
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return sum + v[0];
}

// e^x to within two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Taylor, degree 7).
static inline Vector Exp(Vector x) {
  x = Min(Broadcast(88.0f), Max(Broadcast(-87.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
  const Vector rounded = x * 1.44269504f + 12582912.0f, n = rounded - 12582912.0f;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = Broadcast(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  typedef int32_t Bits __attribute__((vector_size(4 * kLanes), may_alias));
  return p * (Vector)(((Bits)rounded + 127) << 23);
}

inline std::unique_ptr<float[]> Uninitialized(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Independent tasks, which run in any order and in parallel.
struct Phase {
  int64_t num_tasks;
  std::function<void(int64_t)> run;
};

// Runs the phases one after another, each on all threads.
inline void RunPhases(std::vector<Phase> phases, ffi::ThreadPool pool) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  struct Work {
    std::vector<Phase> phases;
    std::unique_ptr<Progress[]> progress;
  };
  auto work = std::make_shared<Work>();
  work->progress = std::make_unique<Progress[]>(phases.size());
  int64_t max_tasks = 0;
  for (const Phase& phase : phases) max_tasks = std::max(max_tasks, phase.num_tasks);
  work->phases = std::move(phases);
  // If the pool is busy, helpers may start late or never: no thread waits for a task that has not started, and late
  // helpers only access `work`, which they own.
  auto help = [work] {
    for (size_t i = 0; i < work->phases.size(); ++i) {
      const Phase& phase = work->phases[i];
      Progress& progress = work->progress[i];
      for (int64_t task; (task = progress.next++) < phase.num_tasks; ++progress.done) phase.run(task);
      while (progress.done < phase.num_tasks) std::this_thread::yield();
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), max_tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(help));
  help();
}
