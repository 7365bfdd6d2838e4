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

}  // namespace deco::cpu::DECO_CPU_ISA
