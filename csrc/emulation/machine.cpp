#include "emulation/machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches fibers with x86-64 Linux assembly"
#endif

// Saves the callee-saved registers and the stack pointer to *from and resumes the fiber whose stack pointer is `to`.
extern "C" void deco_switch_fiber(void** from, void* to);
asm(R"(
.text
.type deco_switch_fiber,@function
deco_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size deco_switch_fiber,.-deco_switch_fiber
)");

namespace deco::emulation {

namespace {
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedAlignment = 128;
constexpr int kSavedRegisters = 6;
}  // namespace

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

uint32_t Machine::draw(uint32_t limit) {
  random_ = random_ * 1664525u + 1013904223u;
  return (random_ >> 8) % limit;
}

void Machine::fault(const std::string& what) const {
  throw Fault(what + " (thread block " + std::to_string(block_) + ", thread " + std::to_string(current_) + ")");
}

void Machine::check_launch(const LaunchSize& size, int max_threads, const void* kernel,
                           int shared_without_request) const {
  const auto refuse = [](const std::string& expected, int given) {
    throw Fault("launch: expected " + expected + ", got " + std::to_string(given));
  };
  if (size.blocks < 1) refuse("at least 1 thread block", size.blocks);
  if (size.threads <= 0 || size.threads % kLanes != 0)
    refuse("a multiple of 32 threads per thread block", size.threads);
  if (size.threads > max_threads)
    refuse("at most " + std::to_string(max_threads) + " threads per thread block (the kernel's launch bounds)",
           size.threads);
  const auto requested = requested_shared_.find(kernel);
  const int allowed = requested == requested_shared_.end() ? shared_without_request : requested->second;
  if (size.shared_bytes > std::min(allowed, limits_.shared_bytes))
    refuse("at most " + std::to_string(std::min(allowed, limits_.shared_bytes)) +
               " bytes of shared memory per thread block (as requested for the kernel)",
           size.shared_bytes);
}

void Machine::request_shared(const void* kernel, int bytes) {
  if (bytes > limits_.shared_bytes)
    throw Fault("request of shared memory: expected at most " + std::to_string(limits_.shared_bytes) +
                " bytes per thread block (the device's limit), got " + std::to_string(bytes));
  requested_shared_[kernel] = bytes;
}

std::vector<RecordedLaunch> Machine::stop_recording() {
  std::vector<RecordedLaunch> launches = recorder_->take();
  recorder_.reset();
  return launches;
}

void Machine::launch(const char* name, const LaunchSize& size, Buffers buffers, const std::function<void()>& body) {
  size_ = size;
  buffers_ = std::move(buffers);
  body_ = body;
  last_span_ = 0;
  if (fibers_.size() < static_cast<size_t>(size.threads)) fibers_.resize(size.threads);
  for (Fiber& fiber : fibers_)
    if (fiber.stack.memory == nullptr)
      fiber.stack = {nullptr, std::aligned_alloc(64, kStackBytes), kStackBytes, nullptr};
  shared_storage_.resize(size.shared_bytes + kSharedAlignment);
  const auto begin = reinterpret_cast<uintptr_t>(shared_storage_.data());
  shared_ = reinterpret_cast<char*>((begin + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment);
  start_notes(name);
  for (block_ = 0; block_ < size.blocks; ++block_) run_block();
}

void Machine::run_block() {
  std::memset(shared_, 0xff, size_.shared_bytes);
  warps_.assign(size_.threads / kLanes, Warp());
  alive_ = size_.threads;
  barrier_arrived_ = 0;
  failed_ = false;
  for (int i = 0; i < size_.threads; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.done = false;
    fiber.waited = false;
    fiber.copies.clear();
    fiber.copy_group = 0;
    fiber.waiting = Waiting::kNothing;
    // A new stack has the layout that deco_switch_fiber saves, with `enter` as the return address.
    auto** top = static_cast<void**>(const_cast<void*>(fiber.stack.memory)) + kStackBytes / sizeof(void*);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack.memory, kStackBytes);
#endif
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Machine::enter);
    for (int r = 0; r < kSavedRegisters; ++r) *--top = nullptr;
    fiber.stack.pointer = top;
  }
  shadow_.start_block();
  std::vector<int> order(warps_.size());
  std::iota(order.begin(), order.end(), 0);
  while (alive_ > 0) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(static_cast<uint32_t>(i))]);
    bool progress = false;
    for (int warp : order) progress |= run_warp(warp);
    if (!progress) fault("deadlock: not all threads reach a barrier or a collective operation");
  }
  if (recorder_) recorder_->finish_block();
}

// Runs the lanes of a warp until all of them wait or, with probability 1/16, until one collective operation is done.
// Of the orders of lanes, those of the form i -> i * step + first with an odd step are drawn.
bool Machine::run_warp(int warp) {
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    const int drawn = static_cast<int>(draw(kLanes * kLanes / 2));
    const int first = drawn % kLanes, step = 2 * (drawn / kLanes) + 1;
    for (int i = 0; i < kLanes; ++i) {
      const int thread = warp * kLanes + (i * step + first) % kLanes;
      if (!runnable(thread)) continue;
      current_ = thread;
      switch_stack(scheduler_, fibers_[thread].stack);
      if (failed_) throw Fault(failure_);
      progress = again = true;
    }
    if (draw(16) == 0) again = false;
  }
  return progress;
}

bool Machine::runnable(int thread) const {
  const Fiber& fiber = fibers_[thread];
  if (fiber.done) return false;
  if (fiber.waiting == Waiting::kWarp) return warps_[thread / kLanes].generation != fiber.generation;
  if (fiber.waiting == Waiting::kBlock) return barrier_generation_ != fiber.generation;
  return true;
}

// First function on the stack of every fiber; no exception may leave it.
void Machine::enter() {
  Machine& machine = instance();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_.memory, &machine.scheduler_.bytes);
#endif
  try {
    machine.body_();
    if (machine.warps_[machine.current_ / kLanes].arrived != 0)
      machine.fault("divergence: a thread ends while its warp is in a collective operation");
    if (!machine.fibers_[machine.current_].copies.empty())
      machine.fault("a thread ends while an asynchronous copy is under way");
  } catch (const std::exception& error) {
    machine.failed_ = true;
    machine.failure_ = error.what();
  }
  machine.fibers_[machine.current_].done = true;
  --machine.alive_;
  switch_stack(machine.fibers_[machine.current_].stack, machine.scheduler_, true);
  std::abort();
}

// Suspends `from` and resumes `to`. AddressSanitizer is told, so that it knows the bounds of the stack in use.
void Machine::switch_stack(Stack& from, const Stack& to, bool ends) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.memory, to.bytes);
#endif
  deco_switch_fiber(&from.pointer, to.pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  static_cast<void>(ends);
}

void Machine::suspend() { switch_stack(fibers_[current_].stack, scheduler_); }

void Machine::wait_for_warp() {
  Fiber& fiber = fibers_[current_];
  fiber.waiting = Waiting::kWarp;
  fiber.generation = warps_[current_ / kLanes].generation;
  suspend();
  fiber.waiting = Waiting::kNothing;
}

void Machine::block_barrier() {
  if (++barrier_arrived_ == size_.threads) {
    shadow_.block_barrier();
    if (recorder_) recorder_->finish_block();
    barrier_arrived_ = 0;
    ++barrier_generation_;
    return;
  }
  Fiber& fiber = fibers_[current_];
  fiber.waiting = Waiting::kBlock;
  fiber.generation = barrier_generation_;
  suspend();
  fiber.waiting = Waiting::kNothing;
}

void Machine::start_copy(void* shared, const void* global, size_t bytes) {
  if (!is_shared(reinterpret_cast<uintptr_t>(shared), bytes)) fault("asynchronous copy to memory that is not shared");
  Fiber& fiber = fibers_[current_];
  const bool at_once = draw(2) == 0;
  if (at_once) std::memcpy(shared, global, bytes);
  fiber.copies.push_back({shared, global, at_once ? 0 : bytes, fiber.copy_group});
}

void Machine::wait_for_copies(int groups_under_way) {
  Fiber& fiber = fibers_[current_];
  const auto under_way = [&](const Copy& copy) { return copy.group >= fiber.copy_group - groups_under_way; };
  for (const Copy& copy : fiber.copies)
    if (!under_way(copy)) std::memcpy(copy.to, copy.from, copy.bytes);
  fiber.copies.erase(
      std::remove_if(fiber.copies.begin(), fiber.copies.end(), [&](const Copy& copy) { return !under_way(copy); }),
      fiber.copies.end());
}

uint32_t* Machine::arrive(Operation operation) {
  Warp& warp = warps_[current_ / kLanes];
  if (warp.arrived == 0)
    warp.operation = operation;
  else if (warp.operation != operation)
    fault("divergence: the lanes of a warp are in different collective operations");
  return warp.exchange.in[current_ % kLanes];
}

void Machine::check(const void* address, size_t bytes, size_t alignment, bool write) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  if (begin % alignment != 0) fault("misaligned access of " + std::to_string(bytes) + " bytes");
  if (is_shared(begin, bytes)) return;
  if (size_.overlapping && !fibers_[current_].waited) fault("access to global memory before wait_for_previous_kernel");
  const auto& spans = buffers_.spans_;
  const auto holds = [&](const Buffers::Span& s) { return begin >= s.begin && end <= s.end && (s.writable || !write); };
  if (last_span_ < spans.size() && holds(spans[last_span_])) return;
  for (size_t i = 0; i < spans.size(); ++i)
    if (holds(spans[i])) {
      last_span_ = i;
      return;
    }
  for (const Buffers::Span& s : spans)
    if (begin >= s.begin && end <= s.end) fault("write to a buffer that is only read");
  fault(std::string(write ? "write" : "read") + " outside shared memory and the buffers of the launch");
}

void Machine::start_notes(const char* name) {
  if (check_races_) shadow_.start_launch(size_.shared_bytes, size_.threads / kLanes);
  if (!recorder_) return;
  RecordedLaunch launch = {name, size_.blocks, size_.threads, size_.shared_bytes, {}, {}};
  for (const Buffers::Span& s : buffers_.spans_)
    launch.buffers.push_back({s.begin, static_cast<int64_t>(s.end - s.begin), s.writable, {}, {}});
  recorder_->start_launch(std::move(launch));
}

void Machine::access(const void* address, size_t bytes, size_t alignment, bool write) {
  check(address, bytes, alignment, write);
  if (!check_races_ && !recorder_) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const bool shared = is_shared(begin, bytes);
  if (shared) note_shared(current_, begin - shared_begin(), bytes, write);
  if (!recorder_) return;
  const void* place = __builtin_return_address(0);
  if (shared) return recorder_->access(current_, place, Recorder::kShared, begin - shared_begin(), bytes, write);
  const auto& spans = buffers_.spans_;
  const auto span = std::find_if(spans.begin(), spans.end(), [&](const Buffers::Span& s) {
    return begin >= s.begin && begin + bytes <= s.end && (s.writable || !write);
  });
  recorder_->access(current_, place, static_cast<int>(span - spans.begin()), begin - span->begin, bytes, write);
}

void Machine::note_shared(int thread, size_t offset, size_t bytes, bool write) {
  if (!check_races_) return;
  for (size_t byte = offset; byte < offset + bytes; ++byte) {
    const int other = shadow_.access(thread, byte, write);
    if (other == SharedShadow::kNoThread) continue;
    const bool same_warp = other / kLanes == thread / kLanes;
    fault("race: thread " + std::to_string(thread) + (write ? " writes" : " reads") + " byte " + std::to_string(byte) +
          " of shared memory after thread " + std::to_string(other) + ", without a " +
          (same_warp ? "barrier of the warp" : "barrier of the thread block") + " between");
  }
}

void Machine::note_matrices(const uintptr_t (&offsets)[kLanes], bool write) {
  const int first = current_ / kLanes * kLanes;
  for (int row = 0; row < kLanes; ++row) {
    for (int word = 0; word < 4; ++word) note_shared(first + row % 8 * 4 + word, offsets[row] + 4 * word, 4, write);
    if (!write) note_shared(first + row, offsets[row], 16, write);
  }
  if (recorder_) recorder_->access_matrices(offsets);
}

void Machine::note_collective(Operation operation) {
  const int warp = current_ / kLanes;
  if (check_races_ && operation == Operation::kWarpBarrier) shadow_.warp_barrier(warp);
  if (recorder_) recorder_->finish_warp(warp);
}

}  // namespace deco::emulation
