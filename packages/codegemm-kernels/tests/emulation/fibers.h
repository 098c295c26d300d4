// Threads of a CUDA cluster as fibers of one CPU thread. A fiber runs until it waits; the scheduler picks the next at
// random, so that a missing barrier shows as a wrong result for some seed, and a wrong count as a deadlock.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

// Counts arrivals; everybody waits for `generation` to move on.
struct Barrier {
  int expected = 0, arrived = 0;
  int64_t bytes = 0;  // announced and not yet here (mbarrier)
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  const char* operation[2] = {};  // what the lanes of a rendezvous do: it must be the same
  uint32_t words[2][32][12];      // what they bring, by parity of the generation
};

struct Block;
struct Thread {
  std::vector<std::function<void()>> group;                // copies that the thread has not committed
  std::vector<std::vector<std::function<void()>>> groups;  // and has not waited for
  std::vector<std::function<void()>> products;             // likewise of the tensor cores
  std::vector<std::vector<std::function<void()>>> product_groups;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  int index = 0;
  bool done = false;
  const uint64_t* waits_for = nullptr;  // blocked while *waits_for == seen
  uint64_t seen = 0;
  uint64_t arrival = 0;  // generation of the cluster's barrier when the thread arrived there
};

constexpr int kStaticBytes = 4096, kRedZone = 4096, kSharedBase = 1024;

struct Block {
  int rank = 0, index = 0, threads = 0, shared_bytes = 0;
  unsigned char* shared = nullptr;  // static variables, dynamic memory, red zone; aligned to 1024
  std::unique_ptr<unsigned char[]> memory;
  std::vector<Warp> warps;
  Barrier named[16];
  std::map<const void*, Barrier> barriers;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  Barrier barrier;
  std::vector<std::function<void()>> copies;  // started, not yet finished
  std::mt19937 random;
  ucontext_t scheduler;
  std::function<void()> kernel;
  int index = 0, size = 1;
};

inline Cluster* cluster = nullptr;
inline Thread* current = nullptr;

inline void wait_while(const uint64_t& word, uint64_t seen) {
  while (word == seen) {
    current->waits_for = &word;
    current->seen = seen;
    swapcontext(&current->context, &cluster->scheduler);
  }
}

inline void complete(Barrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.bytes != 0) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

inline void arrive_and_wait(Barrier& barrier, int expected) {
  const uint64_t seen = barrier.generation;
  barrier.expected = expected;
  ++barrier.arrived;
  complete(barrier);
  wait_while(barrier.generation, seen);
}

inline Warp& warp() { return current->block->warps[current->index / 32]; }

// All 32 lanes meet, each brings up to 12 words; returns what they brought.
inline const uint32_t (*meet(const char* operation, const uint32_t* words, int count))[12] {
  Warp& w = warp();
  const int parity = w.barrier.generation % 2;
  if (w.barrier.arrived == 0) w.operation[parity] = operation;
  if (w.operation[parity] != operation) fail("lanes of a warp meet in different operations");
  std::memcpy(w.words[parity][current->index % 32], words, count * 4);
  arrive_and_wait(w.barrier, 32);
  return w.words[parity];
}

inline void run_thread() {
  cluster->kernel();
  current->done = true;
  swapcontext(&current->context, &cluster->scheduler);
}

inline void finish_copy() {
  const size_t i = cluster->random() % cluster->copies.size();
  const auto copy = cluster->copies[i];
  cluster->copies.erase(cluster->copies.begin() + i);
  copy();
}

[[noreturn]] inline void report_deadlock(const Cluster& c, const std::vector<Thread*>& alive) {
  for (const Block& b : c.blocks) {
    std::fprintf(stderr, "block %d: %d of %d threads at __syncthreads, %d of %d consumers; cluster %d of %zu\n", b.rank,
                 b.named[0].arrived, b.threads, b.named[1].arrived, b.named[1].expected, c.barrier.arrived,
                 c.threads.size());
    for (const auto& [place, barrier] : b.barriers)
      std::fprintf(stderr, "  barrier at %ld: phase %llu, %d of %d arrived, %lld bytes missing\n",
                   long(static_cast<const unsigned char*>(place) - b.shared), (unsigned long long)barrier.generation,
                   barrier.arrived, barrier.expected, (long long)barrier.bytes);
  }
  std::fprintf(stderr, "%zu threads are alive\n", alive.size());
  fail("deadlock");
}

inline void schedule(Cluster& c) {
  std::vector<Thread*> alive;
  for (Thread& t : c.threads) alive.push_back(&t);
  while (!alive.empty()) {
    bool moved = false;
    std::shuffle(alive.begin(), alive.end(), c.random);
    for (Thread*& t : alive) {
      if (t->waits_for && *t->waits_for == t->seen) continue;
      t->waits_for = nullptr;
      current = t;
      moved = true;
      swapcontext(&c.scheduler, &t->context);
      if (t->done) t = nullptr;
      if (t == nullptr) continue;
    }
    alive.erase(std::remove(alive.begin(), alive.end(), nullptr), alive.end());
    if (!moved && c.copies.empty()) report_deadlock(c, alive);
    for (int i = moved ? c.random() % 4 : 1; i > 0 && !c.copies.empty(); --i) finish_copy();
  }
  if (!c.copies.empty()) fail("a copy outlives its block");
}

// Runs `kernel` (a call without arguments) on blocks x threads, cluster by cluster.
inline void launch(int blocks, int threads, int cluster_size, int shared_bytes, unsigned seed,
                   const std::function<void()>& kernel) {
  for (int index = 0; index < blocks / cluster_size; ++index) {
    Cluster c;
    c.random.seed(seed + index);
    c.kernel = kernel;
    c.index = index;
    c.size = cluster_size;
    c.blocks.resize(cluster_size);
    c.threads.resize(size_t(threads) * cluster_size);
    for (int rank = 0; rank < cluster_size; ++rank) {
      Block& block = c.blocks[rank];
      block.rank = rank;
      block.index = index * cluster_size + rank;
      block.threads = threads;
      block.shared_bytes = shared_bytes;
      const size_t bytes = kStaticBytes + shared_bytes + kRedZone + 1024;
      block.memory.reset(new unsigned char[bytes]);
      std::memset(block.memory.get(), 0xff, bytes);  // NaN in every type
      block.shared =
          reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.memory.get()) + 1023) / 1024 * 1024);
      block.warps.resize((threads + 31) / 32);
      for (int t = 0; t < threads; ++t) {
        Thread& thread = c.threads[size_t(rank) * threads + t];
        thread.block = &block;
        thread.index = t;
        thread.stack.reset(new char[64 * 1024]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = 64 * 1024;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, reinterpret_cast<void (*)()>(run_thread), 0);
      }
    }
    cluster = &c;
    schedule(c);
    for (const Block& block : c.blocks)
      for (int i = 0; i < kRedZone; ++i)
        if (block.shared[kStaticBytes + shared_bytes + i] != 0xff) fail("a write beyond dynamic shared memory");
  }
}

}  // namespace emulation
