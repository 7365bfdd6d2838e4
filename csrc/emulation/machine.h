// Runs CUDA kernels on the host, one thread block after the other, with one fiber per thread.
//
// A thread runs until it reaches a collective operation of its warp or a barrier of its thread block. A seeded
// generator selects the next warp, the order of its lanes, and how far it runs, so that results that depend on the order
// of threads differ between seeds. Shared memory is initialized to NaN (all bits set). Every access is checked. Fault is
// raised for
//   - a launch that the device would refuse: no thread blocks, too many threads, too much shared memory
//   - lanes of one warp in different collective operations, or lanes that never arrive (divergence, deadlock)
//   - a misaligned access, or one outside the thread block's shared memory and the buffers that the launch declares
//   - a write to a buffer that the launch declares as read
//   - an access to global memory before wait_for_previous_kernel() in a launch that may overlap the previous one
//   - an asynchronous copy whose destination is not shared memory, or that its thread does not wait for
//   - while races are checked: accesses of shared memory that no barrier orders, whether or not an order reveals them
// An asynchronous copy takes place when it starts or when its thread waits for it, drawn per copy.
// Not covered: timing, races in global memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "deco/cuda/call.h"
#include "emulation/recorder.h"
#include "emulation/shadow.h"

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
  bool overlapping = false;  // may start before the previous launch has ended
};

// Type of the last parameter of an emulated kernel, which carries the size of its largest thread block.
template <int MaxThreads>
struct LaunchBounds {
  static_assert(MaxThreads % 32 == 0 && MaxThreads <= 1024, "launch bounds: expected a multiple of 32, at most 1024");
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
  // Held by the thread that uses the machine: several threads may call ops at once.
  std::unique_lock<std::mutex> turn() { return std::unique_lock(mutex_); }

  // Throws Fault unless the device accepts the launch of a kernel with these launch bounds. Without a request, a thread
  // block may use shared_without_request bytes of shared memory.
  void check_launch(const LaunchSize& size, int max_threads, const void* kernel, int shared_without_request) const;

  // Lets a kernel use this much shared memory; throws Fault if the device has less.
  void request_shared(const void* kernel, int bytes);

  // Runs body() once per thread. Throws Fault.
  void launch(const char* name, const LaunchSize& size, Buffers buffers, const std::function<void()>& body);

  void set_seed(uint32_t seed) { random_ = seed; }
  const cuda::DeviceLimits& limits() const { return limits_; }
  void set_limits(const cuda::DeviceLimits& limits) { limits_ = limits; }

  // Checks all launches for races in shared memory from now on, or no longer.
  void check_races(bool on) { check_races_ = on; }

  // Between these two calls, the accesses of all launches are counted.
  void start_recording() { recorder_.emplace(); }
  std::vector<RecordedLaunch> stop_recording();

  // Truncates as tensor cores and tanh.approx may, instead of rounding to nearest.
  void set_truncating(bool on) { truncating_ = on; }
  bool truncating() const { return truncating_; }

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

  // The same for an address that must be in shared memory.
  void check_shared(const void* address, size_t bytes, size_t alignment) {
    check(address, bytes, alignment, false);
    if (!is_shared(reinterpret_cast<uintptr_t>(address), bytes)) fault("matrix row outside shared memory");
  }

  // Checks an access of the current thread and notes it for the checks that are on.
  void access(const void* address, size_t bytes, size_t alignment, bool write);

  // Notes an access of the current warp to four 8x8 matrices of 16-bit elements, whose 32 rows of 16 bytes start at
  // row(i). Lane 4r + w of the warp owns word w of row r of each matrix. PTX does not say which lane reads a row: a race
  // with the owners or with the lane that gives the address is reported.
  template <class Row>
  void access_matrices(Row&& row, bool write) {
    if (!check_races_ && !recorder_) return;
    uintptr_t offsets[kLanes];
    for (int i = 0; i < kLanes; ++i) offsets[i] = reinterpret_cast<uintptr_t>(row(i)) - shared_begin();
    note_matrices(offsets, write);
  }

  void wait_for_previous_kernel() { fibers_[current_].waited = true; }
  // Asynchronous copies of the current thread, in groups.
  void start_copy(void* shared, const void* global, size_t bytes);
  void commit_copies() { ++fibers_[current_].copy_group; }
  void wait_for_copies(int groups_under_way);
  void block_barrier();

  // Operands of the current lane in a collective operation; throws Fault if its warp is in another one.
  uint32_t* arrive(Operation operation);
  // Waits for all lanes; the last lane to arrive runs execute(exchange). Returns the results of the current lane.
  template <class Execute>
  const uint32_t* meet(Execute&& execute) {
    Warp& warp = warps_[current_ / kLanes];
    if (++warp.arrived == kLanes) {
      execute(warp.exchange);
      if (check_races_ || recorder_) note_collective(warp.operation);
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
  struct Stack {
    void* pointer = nullptr;  // of a fiber that does not run
    const void* memory = nullptr;
    size_t bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's, while the fiber does not run
  };
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;  // that are still to be copied
    int group;
  };
  struct Fiber {
    Stack stack;
    std::vector<Copy> copies;  // under way
    int copy_group = 0;        // of the next copy
    bool done = false;
    bool waited = false;  // for the previous kernel
    Waiting waiting = Waiting::kNothing;
    uint32_t generation = 0;  // of the barrier or collective operation that it waits for
  };

  static void enter();
  static void switch_stack(Stack& from, const Stack& to, bool ends = false);
  void run_block();
  bool run_warp(int warp);
  bool runnable(int thread) const;
  void wait_for_warp();
  void suspend();
  uint32_t draw(uint32_t limit);

  uintptr_t shared_begin() const { return reinterpret_cast<uintptr_t>(shared_); }
  bool is_shared(uintptr_t begin, size_t bytes) const {
    return begin >= shared_begin() && begin + bytes <= shared_begin() + static_cast<uintptr_t>(size_.shared_bytes);
  }
  void note_shared(int thread, size_t offset, size_t bytes, bool write);
  void note_matrices(const uintptr_t (&offsets)[kLanes], bool write);
  void note_collective(Operation operation);
  void start_notes(const char* name);

  std::mutex mutex_;
  cuda::DeviceLimits limits_{2, 227 << 10};
  std::map<const void*, int> requested_shared_;  // by kernel
  LaunchSize size_;
  Buffers buffers_;
  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<char> shared_storage_;
  char* shared_ = nullptr;
  Stack scheduler_;
  int current_ = 0, block_ = 0, alive_ = 0;
  int barrier_arrived_ = 0;
  uint32_t barrier_generation_ = 0;
  size_t last_span_ = 0;
  uint32_t random_ = 1;
  std::vector<NamedLaunch>* list_ = nullptr;
  bool failed_ = false;
  std::string failure_;

  bool check_races_ = false, truncating_ = false;
  SharedShadow shadow_;
  std::optional<Recorder> recorder_;
};

}  // namespace deco::emulation
