// Work is cut into a fixed number of parts and part i always does the same share, so that the same thread count
// gives the same bits whichever thread runs which part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace deco::cpu {

using PartFunction = void (*)(void* context, int part);

// Calls function(context, part) for every part in [0, parts) and returns when all are done. It runs on the OpenMP
// runtime that the process already holds (PyTorch's), so that no second pool of threads comes to life. In a forked
// child, whose OpenMP threads did not survive the fork, and where there is no runtime, every part gets a std::thread.
void run_parts(int parts, PartFunction function, void* context);

// At least `bytes` bytes aligned to 64, uninitialised, owned by the calling thread and valid until its next call.
// The memory is kept until the thread ends, so that repeated calls do not fault its pages in again.
void* thread_scratch(size_t bytes);

}  // namespace deco::cpu

#ifdef DECO_CPU_ISA
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deco::cpu::DECO_CPU_ISA {

// Streaming stores may pass later ones; after this, another thread that sees this one finish sees them too.
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

// Hands out items 0 .. count - 1 in order to whichever part asks next, a good share of what is left each time: for work
// whose results do not depend on who does it. A thread that is slow or was held up then leaves its work to the others.
class SharedWork {
 public:
  SharedWork(int64_t count, int parts) : count_(count), divisor_(2 * parts) {}

  // Calls body(share) for every share that falls to the part that calls.
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

// How many parts are worth having: no more than threads, none of them empty.
inline int part_count(int64_t count, int threads) {
  const int64_t parts = count < threads ? count : threads;
  return parts < 1 ? 1 : static_cast<int>(parts);
}

}  // namespace deco::cpu::DECO_CPU_ISA
#endif
