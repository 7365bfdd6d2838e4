// Kernel launches: on the device by the CUDA runtime, on the host by csrc/emulation.
//
// Kernels take one struct by value. Its member `template <class V> void visit(V& buffers) const` declares the memory
// that the kernel may access, with buffers.read(data, bytes) and buffers.write(data, bytes); the emulator checks every
// access.
#pragma once

#include <string>
#include <utility>

#include "deco/cuda/call.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulation/machine.h"
#endif

namespace deco::cuda {

struct LaunchSize {
  int blocks = 1;
  int threads = 32;
  int shared_bytes = 0;
  // The kernel calls wait_for_previous_kernel() first: where the device can, it starts while the kernel before it ends.
  bool overlapping = false;
};

// Shared memory that a thread block may use without a request; cudaFuncSetAttribute requests more.
constexpr int kSharedWithoutRequest = 48 << 10;

#ifdef __CUDACC__

// `stage` names the kernel or query.
inline Status status_of(cudaError_t error, const char* stage) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // clears the error, so that later calls do not return it
  return {static_cast<int>(error), stage};
}

template <class Params>
Status request_shared(const char* name, void (*kernel)(Params), int bytes) {
  return status_of(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      name);
}

// True if wait_for_previous_kernel() waits in the code of a kernel for the current device, and CUDA graphs can capture
// the launch.
template <class Params>
bool can_overlap(void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  int driver = 0;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
         attributes.ptxVersion >= 90 && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
}

template <class Params>
Status start(const char* name, void (*kernel)(Params), const LaunchSize& size, void* stream, Params params) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(size.blocks);
  launch.blockDim = dim3(size.threads);
  launch.dynamicSmemBytes = size.shared_bytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &overlap;
  launch.numAttrs = size.overlapping && can_overlap(kernel) ? 1 : 0;
  void* arguments[] = {&params};
  return status_of(cudaLaunchKernelExC(&launch, reinterpret_cast<const void*>(kernel), arguments), name);
}

// Ok if this build contains the kernel for the current device.
template <class Params>
Status check(const char* name, void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  return status_of(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), name);
}

#else

// Calls run(), one thread at a time, and adds the kernel's name to a fault.
template <class Run>
void with_kernel_name(const char* name, Run&& run) {
  const auto turn = emulation::Machine::instance().turn();
  try {
    run();
  } catch (const emulation::Fault& fault) {
    throw emulation::Fault(std::string(name) + ": " + fault.what());
  }
}

template <class Params, int MaxThreads>
using Kernel = void (*)(Params, emulation::LaunchBounds<MaxThreads>);

template <class Params, int MaxThreads>
Status request_shared(const char* name, Kernel<Params, MaxThreads> kernel, int bytes) {
  with_kernel_name(
      name, [&] { emulation::Machine::instance().request_shared(reinterpret_cast<const void*>(kernel), bytes); });
  return {};
}

template <class Params, int MaxThreads>
Status start(const char* name, Kernel<Params, MaxThreads> kernel, const LaunchSize& size, void*, Params params) {
  emulation::Machine& machine = emulation::Machine::instance();
  const emulation::LaunchSize emulated_size = {size.blocks, size.threads, size.shared_bytes, size.overlapping};
  with_kernel_name(name, [&] {
    machine.check_launch(emulated_size, MaxThreads, reinterpret_cast<const void*>(kernel), kSharedWithoutRequest);
    if (machine.lists(name, emulated_size)) return;
    emulation::Buffers buffers;
    params.visit(buffers);
    machine.launch(name, emulated_size, std::move(buffers), [&] { kernel(params, {}); });
  });
  return {};
}

template <class Params, int MaxThreads>
Status check(const char*, Kernel<Params, MaxThreads>) {
  return {};
}

#endif

// Enqueues a kernel; `name` is its name in errors.
template <class Params, class... Bounds>
Status launch(const char* name, void (*kernel)(Params, Bounds...), const LaunchSize& size, void* stream,
              const Params& params) {
  if (size.shared_bytes > kSharedWithoutRequest) {
    const Status status = request_shared(name, kernel, size.shared_bytes);
    if (!status.ok()) return status;
  }
  return start(name, kernel, size, stream, params);
}

// Bump allocator over a workspace; every part is aligned to 256 bytes. Without memory it only counts bytes.
class WorkspaceParts {
 public:
  explicit WorkspaceParts(void* workspace = nullptr) : data_(static_cast<char*>(workspace)) {}

  template <class V>
  V* take(int64_t count) {
    V* part = data_ == nullptr ? nullptr : reinterpret_cast<V*>(data_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(V)) + 255) / 256 * 256;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_;
  int64_t bytes_ = 0;
};

}  // namespace deco::cuda
