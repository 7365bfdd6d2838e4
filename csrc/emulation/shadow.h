// Shadow of shared memory: the last accesses of every byte, to find two that no barrier orders.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace deco::emulation {

// Two accesses of a byte by different threads, at least one of which writes, must be ordered: by block_barrier(), or
// within a warp by warp_barrier(). Collective operations other than barriers order nothing, as on the device. Two
// readers suffice: of two warps that read a byte, at least one is not the writer's, as of two lanes of one warp.
class SharedShadow {
 public:
  static constexpr int kNoThread = -1;

  void start_launch(size_t bytes, int warps) {
    if (bytes_.size() < bytes) bytes_.resize(bytes);
    warp_epochs_.resize(warps, 0);
  }
  // Epochs never repeat, so that accesses of earlier thread blocks and launches need no reset.
  void start_block() { ++block_epoch_; }
  void block_barrier() { ++block_epoch_; }
  void warp_barrier(int warp) { ++warp_epochs_[warp]; }

  // Notes an access of a byte. The thread of an earlier access that no barrier orders before it, or kNoThread.
  int access(int thread, size_t byte, bool write) {
    Byte& b = bytes_[byte];
    const int writer = unordered(b.writer, thread);
    if (writer != kNoThread) return writer;
    if (!write) {
      note_reader(b, thread);
      return kNoThread;
    }
    for (const Stamp& reader : b.readers) {
      const int other = unordered(reader, thread);
      if (other != kNoThread) return other;
    }
    b.writer = stamp(thread);
    return kNoThread;
  }

 private:
  struct Stamp {
    uint32_t block_epoch = 0, warp_epoch = 0;
    int thread = kNoThread;
  };
  struct Byte {
    Stamp writer;
    Stamp readers[3];  // two lanes of one warp, and a lane of another warp
  };

  static int warp_of(int thread) { return thread / 32; }
  Stamp stamp(int thread) const { return {block_epoch_, warp_epochs_[warp_of(thread)], thread}; }

  bool is_concurrent(const Stamp& s, int warp) const {
    return s.thread != kNoThread && s.block_epoch == block_epoch_ &&
           (warp_of(s.thread) != warp || s.warp_epoch == warp_epochs_[warp]);
  }
  int unordered(const Stamp& s, int thread) const {
    return s.thread != thread && is_concurrent(s, warp_of(thread)) ? s.thread : kNoThread;
  }

  void note_reader(Byte& b, int thread) {
    const int warp = warp_of(thread);
    auto& [first, second, other] = b.readers;
    if (first.thread == kNoThread || first.block_epoch != block_epoch_) {
      first = stamp(thread);
      second = other = Stamp();
    } else if (warp_of(first.thread) != warp) {
      other = stamp(thread);
    } else if (first.warp_epoch != warp_epochs_[warp]) {
      first = stamp(thread);
      second = Stamp();
    } else if (first.thread != thread) {
      second = stamp(thread);
    }
  }

  std::vector<Byte> bytes_;
  std::vector<uint32_t> warp_epochs_;
  uint32_t block_epoch_ = 0;
};

}  // namespace deco::emulation
