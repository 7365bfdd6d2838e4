#include "emulation/recorder.h"

#include <algorithm>
#include <set>
#include <tuple>

namespace deco::emulation {

namespace {

constexpr int kLanes = 32;
constexpr uintptr_t kSectorBytes = 32;
constexpr uintptr_t kBanks = 32, kBankBytes = 4;

// Wavefronts of the lanes of one phase: the largest number of distinct words in one bank.
int64_t wavefronts_of(const std::vector<uintptr_t>& offsets, size_t bytes) {
  std::set<uintptr_t> words;
  for (const uintptr_t offset : offsets)
    for (uintptr_t word = offset / kBankBytes; word <= (offset + bytes - 1) / kBankBytes; ++word) words.insert(word);
  int64_t per_bank[kBanks] = {};
  for (const uintptr_t word : words) ++per_bank[word % kBanks];
  return *std::max_element(per_bank, per_bank + kBanks);
}

}  // namespace

bool Recorder::Key::operator<(const Key& other) const {
  return std::tie(place, buffer, write, occurrence) <
         std::tie(other.place, other.buffer, other.write, other.occurrence);
}

void Recorder::start_launch(RecordedLaunch launch) {
  warps_.clear();
  warps_.resize(launch.threads / kLanes);
  touched_.clear();
  for (const BufferTraffic& buffer : launch.buffers)
    touched_.push_back({std::vector<bool>(buffer.bytes), std::vector<bool>(buffer.bytes)});
  launches_.push_back(std::move(launch));
}

void Recorder::access(int thread, const void* place, int buffer, uintptr_t offset, size_t bytes, bool write) {
  Warp& warp = warps_[thread / kLanes];
  const int lane = thread % kLanes;
  Key key = {place, buffer, write, 0};
  key.occurrence = warp.occurrences[lane][key]++;
  Group& group = warp.groups[key];
  group.bytes = bytes;
  group.offsets.push_back(offset);
  group.lanes.push_back(lane);
  if (buffer == kShared) return;
  BufferTraffic& counted = launches_.back().buffers[buffer];
  Traffic& traffic = write ? counted.written : counted.read;
  std::vector<bool>& touched = write ? touched_[buffer].written : touched_[buffer].read;
  traffic.requested += static_cast<int64_t>(bytes);
  for (size_t byte = offset; byte < offset + bytes; ++byte) {
    traffic.distinct += !touched[byte];
    touched[byte] = true;
  }
}

void Recorder::access_matrices(const uintptr_t (&offsets)[32]) {
  Group group;
  group.bytes = 16;
  for (int lane = 0; lane < kLanes; ++lane) {
    group.offsets.push_back(offsets[lane]);
    group.lanes.push_back(lane);
  }
  count_shared(group);
}

void Recorder::count_shared(const Group& group) {
  const int lanes_per_phase = group.bytes <= kBankBytes ? kLanes : static_cast<int>(kLanes * kBankBytes / group.bytes);
  SharedTraffic& shared = launches_.back().shared;
  ++shared.accesses;
  for (int first = 0; first < kLanes; first += lanes_per_phase) {
    std::vector<uintptr_t> phase;
    for (size_t i = 0; i < group.lanes.size(); ++i)
      if (group.lanes[i] >= first && group.lanes[i] < first + lanes_per_phase) phase.push_back(group.offsets[i]);
    if (phase.empty()) continue;
    const int64_t wavefronts = wavefronts_of(phase, group.bytes);
    shared.wavefronts += wavefronts;
    shared.conflicts += wavefronts - 1;
  }
}

void Recorder::finish_warp(int index) {
  Warp& warp = warps_[index];
  for (const auto& [key, group] : warp.groups) {
    if (key.buffer == kShared) {
      count_shared(group);
      continue;
    }
    BufferTraffic& buffer = launches_.back().buffers[key.buffer];
    std::set<uintptr_t> sectors;
    for (const uintptr_t offset : group.offsets) {
      const uintptr_t begin = buffer.address + offset;
      for (uintptr_t s = begin / kSectorBytes; s <= (begin + group.bytes - 1) / kSectorBytes; ++s) sectors.insert(s);
    }
    (key.write ? buffer.written : buffer.read).sectors += static_cast<int64_t>(sectors.size() * kSectorBytes);
  }
  warp.groups.clear();
  for (auto& occurrences : warp.occurrences) occurrences.clear();
}

void Recorder::finish_block() {
  for (size_t warp = 0; warp < warps_.size(); ++warp) finish_warp(static_cast<int>(warp));
}

}  // namespace deco::emulation
