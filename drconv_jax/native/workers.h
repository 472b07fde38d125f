// Threads that share the work of a call, and the choice of the instruction set that they do it in.
//
// Work is a task: an object whose `Run<Isa>(number)` does the part of that number, in any order and
// on any thread, and whose `Value` is the type that it computes in.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "drconv_jax/native/vectors.h"

namespace drconv {

// The parts of a task, compiled for an instruction set each: code below is inlined into these.
template <typename Task>
void RunBaseline(const Task& task, int64_t number) {
  task.template Run<Baseline>(number);
}
#if defined(__x86_64__)
template <typename Task>
TARGET_AVX2 void RunAvx2(const Task& task, int64_t number) {
  task.template Run<Avx2>(number);
}
template <typename Task>
TARGET_AVX512 void RunAvx512(const Task& task, int64_t number) {
  task.template Run<Avx512>(number);
}
#endif

// The task compiled for the best instructions that this processor has.
template <typename Task>
auto BestFor(const Task&) -> void (*)(const Task&, int64_t) {
#if defined(__x86_64__)
  // Tests compute in float64, networks do not: one version of it is enough.
  if (std::is_same_v<typename Task::Value, double>) return RunBaseline<Task>;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return RunAvx512<Task>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return RunAvx2<Task>;
#endif
  return RunBaseline<Task>;
}

// `threads` threads: the caller, and those that `schedule` gives jobs to. As the caller works too,
// a pool that is busy can delay but never block.
class Workers {
 public:
  using Job = std::function<void()>;

  Workers(int64_t threads, std::function<void(Job)> schedule)
      : threads_(std::max<int64_t>(1, threads)), schedule_(std::move(schedule)) {}

  int64_t threads() const { return threads_; }

  // Runs task.Run(0), ..., task.Run(count - 1).
  template <typename Task>
  void For(int64_t count, const Task& task) {
    if (count <= 0) return;
    struct State {
      std::atomic<int64_t> next{0};
      int64_t done = 0;
      std::mutex mutex;
      std::condition_variable all_done;
    };
    auto state = std::make_shared<State>();
    // `task` outlives its use: this call returns only when all is done, and a helper that starts
    // later finds nothing left to do.
    auto work = [state, count, task = &task, run = BestFor(task)] {
      int64_t finished = 0;
      for (int64_t number; (number = state->next.fetch_add(1)) < count; ++finished)
        run(*task, number);
      if (finished == 0) return;
      std::lock_guard<std::mutex> lock(state->mutex);
      state->done += finished;
      if (state->done == count) state->all_done.notify_all();
    };
    for (int64_t helper = 1; helper < std::min(count, threads_); ++helper) schedule_(work);
    work();
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_done.wait(lock, [&] { return state->done == count; });
  }

 private:
  int64_t threads_;
  std::function<void(Job)> schedule_;
};

}  // namespace drconv
