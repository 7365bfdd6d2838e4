#include "emulation/machine.h"

#include <cstdlib>
#include <cstring>
#include <numeric>

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

void Machine::launch(const LaunchSize& size, Buffers buffers, const std::function<void()>& body) {
  if (size.threads <= 0 || size.threads % kLanes != 0)
    throw Fault("expected a multiple of 32 threads per thread block, got " + std::to_string(size.threads));
  size_ = size;
  buffers_ = std::move(buffers);
  body_ = body;
  last_span_ = 0;
  if (fibers_.size() < static_cast<size_t>(size.threads)) fibers_.resize(size.threads);
  for (Fiber& fiber : fibers_)
    if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(std::aligned_alloc(64, kStackBytes));
  shared_storage_.resize(size.shared_bytes + kSharedAlignment);
  const auto begin = reinterpret_cast<uintptr_t>(shared_storage_.data());
  shared_ = reinterpret_cast<char*>((begin + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment);
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
    fiber.waiting = Waiting::kNothing;
    // A new stack has the layout that deco_switch_fiber saves, with `enter` as the return address.
    auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Machine::enter);
    for (int r = 0; r < kSavedRegisters; ++r) *--top = nullptr;
    fiber.stack_pointer = top;
  }
  std::vector<int> order(warps_.size());
  std::iota(order.begin(), order.end(), 0);
  while (alive_ > 0) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(static_cast<uint32_t>(i))]);
    bool progress = false;
    for (int warp : order) progress |= run_warp(warp);
    if (!progress) fault("deadlock: not all threads reach a barrier or a collective operation");
  }
}

// Runs the lanes of a warp until all of them wait or, with probability 1/16, until one collective operation is done.
bool Machine::run_warp(int warp) {
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int thread = warp * kLanes + lane;
      if (!runnable(thread)) continue;
      current_ = thread;
      deco_switch_fiber(&scheduler_stack_pointer_, fibers_[thread].stack_pointer);
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
  try {
    machine.body_();
    if (machine.warps_[machine.current_ / kLanes].arrived != 0)
      machine.fault("divergence: a thread ends while its warp is in a collective operation");
  } catch (const std::exception& error) {
    machine.failed_ = true;
    machine.failure_ = error.what();
  }
  machine.fibers_[machine.current_].done = true;
  --machine.alive_;
  machine.suspend();
  std::abort();
}

void Machine::suspend() { deco_switch_fiber(&fibers_[current_].stack_pointer, scheduler_stack_pointer_); }

void Machine::wait_for_warp() {
  Fiber& fiber = fibers_[current_];
  fiber.waiting = Waiting::kWarp;
  fiber.generation = warps_[current_ / kLanes].generation;
  suspend();
  fiber.waiting = Waiting::kNothing;
}

void Machine::block_barrier() {
  if (++barrier_arrived_ == size_.threads) {
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
  const auto shared = reinterpret_cast<uintptr_t>(shared_);
  if (begin >= shared && end <= shared + static_cast<uintptr_t>(size_.shared_bytes)) return;
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

}  // namespace deco::emulation
