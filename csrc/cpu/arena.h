// Bump allocator over one piece of scratch memory; every array is aligned to 64 bytes. An Arena without memory only
// counts bytes: the same layout function runs twice, first to compute the size, then to assign addresses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/parallel.h"

namespace deco::cpu::DECO_CPU_ISA {

class Arena {
 public:
  Arena() = default;
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* array = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return array;
  }

  bool counts_only() const { return memory_ == nullptr; }
  size_t used() const { return used_; }

 private:
  char* memory_ = nullptr;
  size_t used_ = 0;
};

// Calls lay_out(arena) twice, to compute the size and to assign addresses in the scratch memory of this thread, whose
// arrays are valid until its next call.
template <class LayOut>
void with_scratch(LayOut&& lay_out) {
  Arena counter;
  lay_out(counter);
  Arena arena(thread_scratch(counter.used()));
  lay_out(arena);
}

}  // namespace deco::cpu::DECO_CPU_ISA
