// Counts the accesses of a launch: bytes of global memory per buffer, and bank conflicts in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace deco::emulation {

// Accesses of one buffer in one direction, in bytes.
struct Traffic {
  int64_t requested = 0;  // summed over threads
  int64_t sectors = 0;    // of whole 32-byte sectors, each once per access of a warp
  int64_t distinct = 0;   // each byte once
};

struct BufferTraffic {
  uintptr_t address = 0;
  int64_t bytes = 0;
  bool writable = false;
  Traffic read, written;
};

// Shared memory has 32 banks of 4 bytes. An access of a warp has at least one wavefront per 128 bytes of its lanes'
// width: lanes of 8 bytes form two phases of 16 lanes, lanes of 16 bytes four of 8. A phase takes as many wavefronts as
// the bank with the most distinct words.
struct SharedTraffic {
  int64_t accesses = 0;    // of warps
  int64_t wavefronts = 0;  // of all accesses
  int64_t conflicts = 0;   // wavefronts beyond one per phase
};

struct RecordedLaunch {
  std::string name;
  int blocks = 0, threads = 0, shared_bytes = 0;
  std::vector<BufferTraffic> buffers;
  SharedTraffic shared;
};

// An emulated thread runs ahead of its warp. The accesses of a warp between two barriers or collective operations are
// therefore grouped: the nth access of every lane at one place of the code is one access of the warp.
class Recorder {
 public:
  static constexpr int kShared = -1;

  void start_launch(RecordedLaunch launch);

  // `place` identifies the code, `buffer` is an index in the launch's buffers or kShared, `offset` counts from its start.
  void access(int thread, const void* place, int buffer, uintptr_t offset, size_t bytes, bool write);
  // One access of a warp to four 8x8 matrices in shared memory: 16 bytes at each of 32 offsets.
  void access_matrices(const uintptr_t (&offsets)[32]);

  // All lanes of the warp have arrived at a barrier or a collective operation.
  void finish_warp(int warp);
  void finish_block();

  std::vector<RecordedLaunch> take() { return std::move(launches_); }

 private:
  struct Group {
    size_t bytes = 0;
    std::vector<uintptr_t> offsets;  // of the lanes that take part
    std::vector<int> lanes;
  };
  struct Key {
    const void* place;
    int buffer;
    bool write;
    int occurrence;
    bool operator<(const Key& other) const;
  };
  struct Warp {
    std::map<Key, Group> groups;
    std::map<Key, int> occurrences[32];
  };
  struct Touched {
    std::vector<bool> read, written;
  };

  void count_shared(const Group& group);

  std::vector<RecordedLaunch> launches_;
  std::vector<Warp> warps_;
  std::vector<Touched> touched_;
};

}  // namespace deco::emulation
