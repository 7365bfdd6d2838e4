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
};

#ifdef __CUDACC__

constexpr int kSharedWithoutRequest = 48 << 10;

template <class Params>
Status launch(const char* name, void (*kernel)(Params), const LaunchSize& size, void* stream, Params params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (size.shared_bytes > kSharedWithoutRequest)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, size.shared_bytes);
  if (error == cudaSuccess) {
    void* arguments[] = {&params};
    error = cudaLaunchKernel(function, dim3(size.blocks), dim3(size.threads), arguments, size.shared_bytes,
                             static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // clears the error, so that later calls do not return it
  return {static_cast<int>(error), name};
}

// Ok if this build contains the kernel for the current device.
template <class Params>
Status check(const char* name, void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {static_cast<int>(error), name};
}

#else

template <class Params>
Status launch(const char* name, void (*kernel)(Params), const LaunchSize& size, void*, Params params) {
  emulation::Machine& machine = emulation::Machine::instance();
  const emulation::LaunchSize emulated_size = {size.blocks, size.threads, size.shared_bytes};
  if (machine.lists(name, emulated_size)) return {};
  emulation::Buffers buffers;
  params.visit(buffers);
  try {
    machine.launch(emulated_size, std::move(buffers), [&] { kernel(params); });
  } catch (const emulation::Fault& fault) {
    throw emulation::Fault(std::string(name) + ": " + fault.what());
  }
  return {};
}

template <class Params>
Status check(const char*, void (*)(Params)) {
  return {};
}

#endif

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
