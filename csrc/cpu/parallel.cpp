#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace deco::cpu {
namespace {

// Whether this process was forked and has not called exec since, by the flag PF_FORKNOEXEC of Linux.
bool was_forked() {
  constexpr unsigned kForkedWithoutExec = 0x40;
  std::FILE* file = std::fopen("/proc/self/stat", "r");
  if (file == nullptr) return false;
  char text[512];
  text[std::fread(text, 1, sizeof(text) - 1, file)] = '\0';
  std::fclose(file);
  const char* name_end = std::strrchr(text, ')');  // the flags are the ninth field, the name is the second
  unsigned flags = 0;
  if (name_end == nullptr || std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) return false;
  return (flags & kForkedWithoutExec) != 0;
}

// A child may be the first to load this module, after its parent has used the runtime.
std::atomic<bool> in_forked_child{was_forked()};

// Entry points of the OpenMP runtime; those of GNU, LLVM and Intel all export them.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;

  OpenMP() {
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
    // RTLD_DEFAULT is null in glibc, as is the result of a failed dlopen; the entry points then stay null.
    void* library = RTLD_DEFAULT;
    if (dlsym(library, "GOMP_parallel") == nullptr) library = dlopen("libgomp.so.1", RTLD_LAZY);
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(library, "omp_get_thread_num"));
    num_threads = reinterpret_cast<decltype(num_threads)>(dlsym(library, "omp_get_num_threads"));
  }

#ifdef DECO_STD_THREADS
  bool usable() const { return false; }
#else
  bool usable() const { return parallel && thread_num && num_threads && !in_forked_child; }
#endif
};

const OpenMP openmp;

struct Task {
  int parts;
  PartFunction function;
  void* context;
};

// Body of the parallel region. The team may be smaller than requested (nested regions, thread limits).
void run_team_member(void* data) {
  const Task& task = *static_cast<const Task*>(data);
  const int team = openmp.num_threads();
  for (int part = openmp.thread_num(); part < task.parts; part += team) task.function(task.context, part);
}

struct FreeBlock {
  void operator()(void* block) const { std::free(block); }
};

struct ScratchBlock {
  std::unique_ptr<void, FreeBlock> data;
  size_t bytes = 0;
};

}  // namespace

void run_parts(int parts, PartFunction function, void* context) {
  if (parts <= 1) {
    if (parts == 1) function(context, 0);
    return;
  }
  if (openmp.usable()) {
    Task task{parts, function, context};
    openmp.parallel(run_team_member, &task, static_cast<unsigned>(parts), 0);
    return;
  }
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(parts - 1));
  int next = 1;
  try {
    for (; next < parts; ++next) threads.emplace_back(function, context, next);
  } catch (const std::system_error&) {
    // The system has no more threads: the remaining parts run on this one.
  }
  function(context, 0);
  for (; next < parts; ++next) function(context, next);
  for (std::thread& thread : threads) thread.join();
}

void* thread_scratch(size_t bytes) {
  thread_local ScratchBlock block;
  if (block.bytes < bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    block.data.reset();
    block.bytes = 0;
    block.data.reset(std::aligned_alloc(4096, rounded));
    if (!block.data) throw std::bad_alloc();
    block.bytes = rounded;
  }
  return block.data.get();
}

}  // namespace deco::cpu
