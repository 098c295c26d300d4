#include "cpu/pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace codegemm::cpu {
namespace {

// A decode step calls a kernel every few hundred microseconds and waking a sleeping thread takes about 50, so a worker
// looks for work for a while before it sleeps. The limit keeps an idle process off the cores.
constexpr int kSpins = 2000;
constexpr int kMaxThreads = 256;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int64_t count, int workers, const std::function<void(int64_t)>& task) {
    while (static_cast<int>(threads_.size()) < workers) {
      const int index = static_cast<int>(threads_.size());
      threads_.emplace_back([this, index] { work(index); });
      threads_.back().detach();  // they live as long as the process and own nothing but the pool, which is never freed
    }
    task_ = &task;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    running_.store(workers, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      run_.store(((run_.load(std::memory_order_relaxed) >> 16) + 1) << 16 | uint64_t(workers));
    }
    wake_.notify_all();
    drain();
    for (int spin = 0; running_.load(std::memory_order_acquire) != 0; ++spin) {
      if (spin < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  std::mutex busy;  // held by the caller for one run

 private:
  void drain() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i);
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && run_.load() == seen; ++spin) pause();
      if (run_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return run_.load() != seen; });
      }
      seen = run_.load();
      if (index >= static_cast<int>(seen & 0xffffu)) continue;
      drain();
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  // Number of the run and, in the low 16 bits, its workers: read together, so that a thread that takes no part in a run
  // cannot mistake it for the next.
  std::atomic<uint64_t> run_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> running_{0};
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
};

std::atomic<Pool*> process_pool{nullptr};

// A forked child has none of its parent's threads, so it starts with a pool of its own; the parent's is left alone.
Pool& pool() {
  static const bool ready = [] {
    process_pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] { process_pool.store(new Pool); });
    return true;
  }();
  static_cast<void>(ready);
  return *process_pool.load();
}

// The entry of an OpenMP runtime for "run body(data) on a team of `threads`", in GCC's calling convention, which LLVM's
// and Intel's runtimes also offer.
using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct alignas(64) Progress {
  std::atomic<int64_t> next{0}, done{0};
};

struct Work {
  const Phases& phases;
  std::vector<Progress> progress;
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // written by the thread that sets `failed`
};

// An exception must not leave a thread of the team, which would end the process: the caller throws it when all are
// done. What is left to do after it is only counted.
void run_task(Work& work, int64_t phase, int64_t task) {
  if (work.failed.load(std::memory_order_relaxed)) return;
  try {
    work.phases.run(phase, task);
  } catch (...) {
    if (!work.failed.exchange(true)) work.failure = std::current_exception();
  }
}

// What every thread does. One that comes late, or never, holds nobody up: the others take its tasks.
void take_part(Work& work) {
  for (size_t p = 0; p < work.progress.size(); ++p) {
    Progress& progress = work.progress[p];
    const int64_t count = work.phases.tasks(int64_t(p));
    for (int64_t i; (i = progress.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      run_task(work, int64_t(p), i);
      progress.done.fetch_add(1, std::memory_order_release);
    }
    for (int spin = 0; progress.done.load(std::memory_order_acquire) < count; ++spin) {
      if (spin < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }
}

void run_team(int threads, Work& work) {
  // torch's threads keep spinning for a while after each of its operations. A second set of threads would fight them
  // for the cores: with alternating calls that cost a scheduler quantum of 4 ms each (docs/log.md). So where the
  // process has an OpenMP runtime, its threads are used.
  static const auto openmp = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (openmp != nullptr) {
    return openmp([](void* data) { take_part(*static_cast<Work*>(data)); }, &work, unsigned(threads), 0);
  }
  Pool& shared = pool();
  std::unique_lock<std::mutex> turn(shared.busy, std::try_to_lock);
  if (!turn.owns_lock()) return take_part(work);  // another caller holds the pool
  shared.run(threads, threads - 1, [&](int64_t) { take_part(work); });
}

class Loop : public Phases {
 public:
  Loop(int64_t count, const std::function<void(int64_t)>& task) : count_(count), task_(task) {}
  int64_t phases() const override { return 1; }
  int64_t tasks(int64_t) const override { return count_; }
  void run(int64_t, int64_t task) const override { task_(task); }

 private:
  const int64_t count_;
  const std::function<void(int64_t)>& task_;
};

}  // namespace

void parallel_phases(const Phases& phases, int threads) {
  threads = std::min(threads, kMaxThreads);
  if (threads > 1) {
    Work work{phases, std::vector<Progress>(size_t(phases.phases())), {}, {}};
    run_team(threads, work);
    if (work.failed) std::rethrow_exception(work.failure);
    return;
  }
  for (int64_t phase = 0; phase < phases.phases(); ++phase) {
    const int64_t tasks = phases.tasks(phase);
    for (int64_t i = 0; i < tasks; ++i) phases.run(phase, i);
  }
}

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  parallel_phases(Loop(count, task), static_cast<int>(std::min<int64_t>(threads, count)));
}

}  // namespace codegemm::cpu
