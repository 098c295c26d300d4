// Running independent tasks on several threads: the OpenMP runtime's where the process has one, else a small pool's.
#pragma once
#include <cstdint>
#include <functional>

namespace codegemm::cpu {

// Calls task(i) once for each i in [0, count), on up to `threads` threads, the caller's included, and waits for all.
// Which thread runs which i is not fixed, so a task may write only what belongs to its i.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// Work in phases, one after the other: run(phase, i) for each i in [0, tasks(phase)). A phase starts when all tasks of
// the one before are done; tasks(phase) is asked for then, by every thread, and must be the same for all.
class Phases {
 public:
  virtual ~Phases() = default;
  virtual int64_t phases() const = 0;
  virtual int64_t tasks(int64_t phase) const = 0;
  virtual void run(int64_t phase, int64_t task) const = 0;
};

// Does all phases on up to `threads` threads, which are started once. If a task throws, tasks that have not begun are
// left out, and the exception reaches the caller when no thread is at work any more.
void parallel_phases(const Phases& work, int threads);

}  // namespace codegemm::cpu
