// Running independent tasks on several threads: the OpenMP runtime's where the process has one, else a small pool's.
#pragma once
#include <cstdint>
#include <functional>

namespace codegemm::cpu {

// Calls task(i) once for each i in [0, count), on up to `threads` threads, the caller's included, and waits for all.
// Which thread runs which i is not fixed, so a task may write only what belongs to its i.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// The same for several phases, one after the other: task(phase, i) for each i in [0, count(phase)). A phase starts when
// all tasks of the one before are done. Threads are started once for all phases.
void parallel_phases(int64_t phases, int threads, const std::function<int64_t(int64_t)>& count,
                     const std::function<void(int64_t, int64_t)>& task);

}  // namespace codegemm::cpu
