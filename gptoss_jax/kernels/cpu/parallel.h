// What the kernels share: vectors, and tasks on the threads that XLA has.

#pragma once

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

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

inline Vector Load(const float* from) { return *(const Vector*)from; }
inline void Store(float* to, Vector value) { *(Vector*)to = value; }

inline Vector Fill(float value) { return Vector{} + value; }
// Of these two the second stays where it is not a number.
inline Vector Least(Vector a, Vector b) { return a < b ? a : b; }
inline Vector Most(Vector a, Vector b) { return a > b ? a : b; }

// e^x to within two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Taylor, degree 7).
inline Vector Exp(Vector x) {
  x = Least(Fill(88.0f), Most(Fill(-87.0f), x));
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  const Vector whole = x * 1.44269504f + 12582912.0f, n = whole - 12582912.0f;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = Fill(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  typedef int32_t Bits __attribute__((vector_size(64), may_alias));
  return p * (Vector)(((Bits)whole + 127) << 23);
}

// So many tasks, which may run in any order and at the same time.
struct Phase {
  int64_t tasks;
  std::function<void(int64_t)> run;
};

// Runs the phases one after the other, each on all threads.
inline void Run(std::vector<Phase> phases, ffi::ThreadPool pool) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  struct Work {
    std::vector<Phase> phases;
    std::unique_ptr<Progress[]> progress;
  };
  auto work = std::make_shared<Work>();
  work->progress = std::make_unique<Progress[]>(phases.size());
  int64_t most = 0;
  for (const Phase& phase : phases) most = std::max(most, phase.tasks);
  work->phases = std::move(phases);
  // Helpers may start late, or never where the pool is busy: nobody waits for a task that was not begun, and who comes
  // when all is done touches nothing but `work`.
  auto help = [work] {
    for (size_t i = 0; i < work->phases.size(); ++i) {
      const Phase& phase = work->phases[i];
      Progress& progress = work->progress[i];
      for (int64_t task; (task = progress.next++) < phase.tasks; ++progress.done) phase.run(task);
      while (progress.done < phase.tasks) std::this_thread::yield();
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), most) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(help));
  help();
}
