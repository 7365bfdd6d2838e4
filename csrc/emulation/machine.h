// Runs CUDA kernels on the host, one thread block after the other, with one fiber per thread.
//
// A thread runs until it reaches a collective operation of its warp or a barrier of its thread block. A seeded
// generator selects the next warp and how far it runs, so that results that depend on the order of warps differ between
// seeds. Shared memory is initialized to NaN (all bits set). Every access is checked. Fault is raised for
//   - lanes of one warp in different collective operations, or lanes that never arrive (divergence, deadlock)
//   - a misaligned access, or one outside the thread block's shared memory and the buffers that the launch declares
//   - a write to a buffer that the launch declares as read
// Not covered: bank conflicts, timing, asynchronous copies, data races that none of the orders reveals.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace deco::emulation {

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Buffers in global memory that a launch may access.
class Buffers {
 public:
  void read(const void* data, int64_t bytes) { add(data, bytes, false); }
  void write(const void* data, int64_t bytes) { add(data, bytes, true); }

 private:
  friend class Machine;
  struct Span {
    uintptr_t begin, end;
    bool writable;
  };
  void add(const void* data, int64_t bytes, bool writable) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (data != nullptr && bytes > 0) spans_.push_back({begin, begin + static_cast<uintptr_t>(bytes), writable});
  }
  std::vector<Span> spans_;
};

struct LaunchSize {
  int blocks = 1;
  int threads = 32;  // a multiple of 32
  int shared_bytes = 0;
};

struct NamedLaunch {
  std::string name;
  LaunchSize size;
};

enum class Operation : int {
  kNone,
  kWarpBarrier,
  kShuffle,
  kMultiply16,
  kMultiply8,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kStoreMatrices,
  kTranspose
};

constexpr int kLanes = 32;

// Inputs and results of a collective operation of a warp.
struct Exchange {
  uint32_t in[kLanes][12];
  uint32_t out[kLanes][4];
};

class Machine {
 public:
  static Machine& instance();

  // Runs body() once per thread. Throws Fault.
  void launch(const LaunchSize& size, Buffers buffers, const std::function<void()>& body);

  void set_seed(uint32_t seed) { random_ = seed; }

  // While `list` is not null, launches are appended to it and not run.
  void list_launches(std::vector<NamedLaunch>* list) { list_ = list; }
  // Appends a launch to the list; returns false if there is no list.
  bool lists(const char* name, const LaunchSize& size) {
    if (list_ != nullptr) list_->push_back({name, size});
    return list_ != nullptr;
  }

  int thread() const { return current_; }
  int block() const { return block_; }
  const LaunchSize& size() const { return size_; }
  char* shared_memory() { return shared_; }

  // Throws Fault unless the current thread may access [address, address + bytes).
  void check(const void* address, size_t bytes, size_t alignment, bool write);

  void block_barrier();

  // Operands of the current lane in a collective operation; throws Fault if its warp is in another one.
  uint32_t* arrive(Operation operation);
  // Waits for all lanes; the last lane to arrive runs execute(exchange). Returns the results of the current lane.
  template <class Execute>
  const uint32_t* meet(Execute&& execute) {
    Warp& warp = warps_[current_ / kLanes];
    if (++warp.arrived == kLanes) {
      execute(warp.exchange);
      warp.arrived = 0;
      ++warp.generation;
    } else {
      wait_for_warp();
    }
    return warp.exchange.out[current_ % kLanes];
  }

  [[noreturn]] void fault(const std::string& what) const;

 private:
  enum class Waiting { kNothing, kWarp, kBlock };
  struct Warp {
    Operation operation = Operation::kNone;
    int arrived = 0;
    uint32_t generation = 0;
    Exchange exchange;
  };
  struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    bool done = false;
    Waiting waiting = Waiting::kNothing;
    uint32_t generation = 0;  // of the barrier or collective operation that it waits for
  };

  static void enter();
  void run_block();
  bool run_warp(int warp);
  bool runnable(int thread) const;
  void wait_for_warp();
  void suspend();
  uint32_t draw(uint32_t limit);

  LaunchSize size_;
  Buffers buffers_;
  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<char> shared_storage_;
  char* shared_ = nullptr;
  void* scheduler_stack_pointer_ = nullptr;
  int current_ = 0, block_ = 0, alive_ = 0;
  int barrier_arrived_ = 0;
  uint32_t barrier_generation_ = 0;
  size_t last_span_ = 0;
  uint32_t random_ = 1;
  std::vector<NamedLaunch>* list_ = nullptr;
  bool failed_ = false;
  std::string failure_;
};

}  // namespace deco::emulation
