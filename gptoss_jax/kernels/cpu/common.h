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

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;
using Ints = ffi::Buffer<ffi::S32>;
using Values = ffi::AnyBuffer;  // float or bfloat16

// NATIVE_LANES makes vectors fit the registers of AVX2: compilers compare wider ones lane by lane.
#if defined(NATIVE_LANES) && defined(__AVX2__) && !defined(__AVX512F__)
#define VECTOR_LANES 8
#elif !defined(VECTOR_LANES)
#define VECTOR_LANES 16
#endif
constexpr int kLanes = VECTOR_LANES;
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// A bfloat16: the upper half of a float. Only memory has them: they are loaded as floats, and rounded when stored.
struct BFloat16 {
  uint16_t half;
};
// A float that is rounded to bfloat16 when it is loaded.
struct Rounded {
  float value;
};

// Calls f with an element of the type of the values.
template <typename F>
auto VisitType(const Values& values, F f) {
  return values.element_type() == ffi::BF16 ? f(BFloat16{}) : f(0.0f);
}

// Types of the lanes of a vector V in memory. As a template argument, V itself loses its attributes.
template <typename V>
struct LanesOf {
  typedef float Floats __attribute__((vector_size(sizeof(V)), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(sizeof(V)), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(sizeof(V) / 2), aligned(2), may_alias));
};

// Rounds to nearest, ties to even, in the upper halves of the lanes.
template <typename V>
static inline typename LanesOf<V>::Bits RoundBits(V value) {
  typedef typename LanesOf<V>::Bits Bits;
  const Bits bits = (Bits)value, nan = Bits{} + 0x7fc00000u;
  return value == value ? bits + 0x7fffu + (bits >> 16 & 1u) : nan;
}

// Static, because files differ in VECTOR_LANES.
template <typename V = Vector>
static inline V Load(const float* from) {
  return *(const typename LanesOf<V>::Floats*)from;
}
template <typename V = Vector>
static inline V Load(const BFloat16* from) {
#ifdef __AVX2__
  // GCC 12 would convert halves of the vector.
  if constexpr (sizeof(V) == 32)
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#endif
  return (V)(__builtin_convertvector(*(const typename LanesOf<V>::Halves*)from, typename LanesOf<V>::Bits) << 16);
}
template <typename V = Vector>
static inline V Load(const Rounded* from) {
  return (V)(RoundBits(Load<V>(&from->value)) & 0xffff0000u);
}
template <typename T>
static inline float LoadOne(const T* from) {
  typedef float One __attribute__((vector_size(sizeof(float))));
  return Load<One>(from)[0];
}
template <typename V>
static inline void Store(float* to, V value) {
  *(typename LanesOf<V>::Floats*)to = value;
}
template <typename V>
static inline void Store(BFloat16* to, V value) {
  typedef typename LanesOf<V>::Halves Halves;
  *(Halves*)to = __builtin_convertvector(RoundBits(value) >> 16, Halves);
}

// Loads or stores the first `count` lanes, with `count` clamped to the valid range; other lanes are loaded as zero.
template <typename V = Vector, typename T>
static inline V LoadPartial(const T* from, int64_t count) {
  constexpr int lanes = sizeof(V) / sizeof(float);
  if (count >= lanes) return Load<V>(from);
  T values[lanes] = {};
  if (count > 0) std::memcpy(values, from, count * sizeof(T));
  return Load<V>(values);
}
template <typename V, typename T>
static inline void StorePartial(T* to, V value, int64_t count) {
  constexpr int lanes = sizeof(V) / sizeof(float);
  if (count >= lanes) return Store(to, value);
  T values[lanes];
  Store(values, value);
  if (count > 0) std::memcpy(to, values, count * sizeof(T));
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
