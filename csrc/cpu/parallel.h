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
// The block is kept until the thread ends, so that repeated calls do not fault its pages in again.
void* thread_scratch(size_t bytes);

}  // namespace deco::cpu

#ifdef DECO_CPU_ISA
namespace deco::cpu::DECO_CPU_ISA {

template <class Function>
inline void parallel_for(int parts, Function&& function) {
  using Callable = std::remove_reference_t<Function>;
  run_parts(parts, [](void* context, int part) { (*static_cast<Callable*>(context))(part); }, &function);
}

struct Range {
  int64_t begin, end;
};

// The share of part `part` when `count` items are cut into `parts` contiguous shares.
inline Range share_of(int64_t count, int parts, int part) {
  return {count * part / parts, count * (part + 1) / parts};
}

// How many parts are worth having: no more than threads, none of them empty.
inline int part_count(int64_t count, int threads) {
  const int64_t parts = count < threads ? count : threads;
  return parts < 1 ? 1 : static_cast<int>(parts);
}

}  // namespace deco::cpu::DECO_CPU_ISA
#endif
