// Work is divided into a fixed number of parts, and part i always computes the same share. Results depend on the thread
// count but not on which thread runs which part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace deco::cpu {

using PartFunction = void (*)(void* context, int part);

// Calls function(context, part) for every part in [0, parts) and returns when all are done. Parts run on the OpenMP
// runtime that is already loaded (PyTorch's), to avoid a second thread pool. Without a runtime, in a forked child,
// where the OpenMP threads do not exist, and if compiled with DECO_STD_THREADS, each part runs on a std::thread.
void run_parts(int parts, PartFunction function, void* context);

// At least `bytes` bytes aligned to 64, uninitialized, owned by the calling thread and valid until its next call.
// Memory is retained until the thread ends, which avoids page faults on repeated calls.
void* thread_scratch(size_t bytes);

}  // namespace deco::cpu

#ifdef DECO_CPU_ISA
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deco::cpu::DECO_CPU_ISA {

// Streaming stores are weakly ordered; this fence orders them before the end of the part.
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Calls function(part) for every part, in parallel.
template <class Function>
inline void parallel_for(int parts, Function&& function) {
  using Callable = std::remove_reference_t<Function>;
  run_parts(
      parts,
      [](void* context, int part) {
        (*static_cast<Callable*>(context))(part);
        finish_streaming();
      },
      &function);
}

struct Range {
  int64_t begin, end;
};

// The share of part `part` when `count` items are cut into `parts` contiguous shares.
inline Range share_of(int64_t count, int parts, int part) { return {count * part / parts, count * (part + 1) / parts}; }

// Dynamic schedule: hands out items 0 .. count - 1 in order, each time 1/(2 parts) of the remaining items, to the part
// that asks next. Balances the load between threads of different speed; for results that do not depend on the part.
class SharedWork {
 public:
  SharedWork(int64_t count, int parts) : count_(count), divisor_(2 * parts) {}

  // Calls body(share) for every share that the calling part receives.
  template <class Body>
  void for_each_share(Body&& body) {
    for (Range share = next(); share.begin < share.end; share = next()) body(share);
  }

 private:
  Range next() {
    int64_t begin = __atomic_load_n(&next_, __ATOMIC_RELAXED), end;
    do {
      end = begin + (count_ - begin + divisor_ - 1) / divisor_;
    } while (!__atomic_compare_exchange_n(&next_, &begin, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return {begin, end};
  }

  const int64_t count_, divisor_;
  int64_t next_ = 0;
};

// Number of parts: at least 1, at most `threads`, none of them empty unless count is 0.
inline int part_count(int64_t count, int threads) {
  const int64_t parts = count < threads ? count : threads;
  return parts < 1 ? 1 : static_cast<int>(parts);
}

}  // namespace deco::cpu::DECO_CPU_ISA
#endif
