// Small kernels that test the emulator: each collective operation against its definition, and deliberate faults.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"
#include "cuda/tile.h"
#include "emulation/machine.h"

namespace py = pybind11;
using namespace deco::cuda;

namespace {

constexpr int kWarps = 4;

struct Params {
  uint32_t* out;
  int64_t words;
  const float* in = nullptr;
  int64_t in_words = 0;
  std::string fault = "";
  int stride = 1;

  template <class V>
  void visit(V& buffers) const {
    buffers.write(out, 4 * words);
    buffers.read(in, 4 * in_words);
  }
};

// Every warp writes its index to shared memory and reads that of the next warp.
DECO_KERNEL(128, 1, neighbor_kernel, const Params p) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  store(shared + thread(), static_cast<uint32_t>(warp()));
  if (p.fault != "missing barrier") block_barrier();
  store(p.out + thread(), load(shared + (thread() + 32) % block_threads()));
}

// Only lane 31 may leave out the wait.
DECO_KERNEL(32, 1, overlapping_kernel, const Params p) {
  if (p.fault != "no wait" || lane() < 31) wait_for_previous_kernel();
  store(p.out + thread(), 0u);
}

// Every lane copies two pairs of words in two groups, and reads the first before the second has to be there.
DECO_KERNEL(32, 1, copy_kernel, const Params p) {
  auto* shared = reinterpret_cast<Words2*>(shared_memory()) + lane();
  const auto* in = reinterpret_cast<const Words2*>(p.in) + lane();
  auto* out = reinterpret_cast<Words2*>(p.out) + lane();
  copy_async(p.fault == "to global memory" ? out : shared, in);
  commit_copies();
  copy_async(shared + 32, in + 32);
  commit_copies();
  if (p.fault != "no wait") wait_for_copies<1>();
  store(out, load(shared));
  if (p.fault == "under way at the end") return;
  wait_for_copies<0>();
  store(out + 32, load(shared + 32));
}

DECO_KERNEL(128, 1, fault_kernel, const Params p) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int words = block_threads();
  if (p.fault == "shuffle under divergence" && lane() < 16) shuffle_xor(1.0f, 1);
  if (p.fault == "different collectives") {
    if (lane() < 16)
      shuffle_xor(1.0f, 1);
    else
      warp_barrier();
  }
  if (p.fault == "barrier under divergence" && warp() == 0) block_barrier();
  if (p.fault == "shared memory, one row outside") {
    uint32_t row[4];
    load_matrices(row, shared + 4 * (lane() == 31 ? words / 4 : lane()));
  }
  if (p.fault == "global memory, one element outside") store(p.out + p.words, 1u);
  if (p.fault == "misaligned") load(reinterpret_cast<const Float2*>(shared + 1));
  if (p.fault == "misaligned row") {
    uint32_t row[4];
    load_matrices(row, shared + 1);
  }
  if (p.fault == "row of global memory") {
    uint32_t row[4];
    load_matrices(row, p.in);
  }
  if (p.fault == "write to what is read") store(const_cast<float*>(p.in), 0.0f);
  if (p.fault == "uninitialized shared memory") store(p.out + thread(), load(shared + thread()));
  store(p.out + thread() % 32, load(p.out + thread() % 32));
}

// Every lane writes a word of shared memory and reads that of the next lane. All lanes meet in between, so that the
// emulator's results are right in every order, but only warp_barrier() makes them so on the device.
DECO_KERNEL(128, 1, next_lane_kernel, const Params p) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  store(shared + thread(), static_cast<uint32_t>(thread()));
  if (p.fault == "shuffle in place of a barrier")
    shuffle_xor(1.0f, 1);
  else
    warp_barrier();
  if (p.fault == "matrices of the next warp") {
    uint32_t row[4];
    load_matrices(row, shared + (thread() / 32 + 1) % 4 * 32 + lane() % 8 * 4);
  }
  store(p.out + thread(), load(shared + (thread() & ~31) + (lane() + 1) % 32));
  if (p.fault == "write after the reader") store(shared + thread(), 0u);
}

// Lane i loads V number i * stride of shared memory; "matrices": 16 bytes, in load_matrices.
template <class V>
DECO_KERNEL(32, 1, strided_kernel, const Params p) {
  const char* address = shared_memory() + p.stride * lane() * static_cast<int>(sizeof(V));
  uint32_t words[4];
  if (p.fault == "matrices")
    load_matrices(words, address);
  else
    load(reinterpret_cast<const V*>(address));
  store(p.out + lane(), load(p.in + p.stride * lane() % p.in_words) != 0.0f ? 1u : 0u);
}

// out = the words of op(in), to check a collective operation against its definition.
DECO_KERNEL(32, 1, collective_kernel, const Params p) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = lane(); i < 256; i += 32) store(shared + i, static_cast<uint16_t>(i));
  warp_barrier();
  uint32_t words[4] = {0, 0, 0, 0};
  if (p.fault == "load_matrices") load_matrices(words, shared + 8 * lane());
  if (p.fault == "load_matrices_transposed") load_matrices_transposed(words, shared + 8 * lane());
  if (p.fault == "transpose") {
    load_matrices(words, shared + 8 * lane());
    for (uint32_t& word : words) word = transpose(word);
  }
  if (p.fault == "store_matrices") {
    load_matrices(words, shared + 8 * lane());
    warp_barrier();
    store_matrices(shared + 8 * (31 - lane()), words);
    warp_barrier();
    for (int i = 0; i < 4; ++i) words[i] = load(reinterpret_cast<const uint32_t*>(shared) + 4 * lane() + i);
  }
  for (int i = 0; i < 4; ++i) store(p.out + 4 * lane() + i, words[i]);
}

// out [16][8] = a [16][K]·b [K][8] + c [16][8], K = 16 or 8, values rounded to T.
template <class T, int K>
DECO_KERNEL(32, 1, multiply_kernel, const Params p) {
  const int g = lane() / 4, t = 2 * (lane() % 4);
  const auto a = [&](int row, int k) { return load(p.in + row * K + k); };
  const auto b = [&](int k, int n) { return load(p.in + 16 * K + k * 8 + n); };
  const auto c = [&](int row, int n) { return load(p.in + 24 * K + row * 8 + n); };
  const float sum[4] = {c(g, t), c(g, t + 1), c(g + 8, t), c(g + 8, t + 1)};
  float d[4];
  if constexpr (K == 16) {
    const uint32_t left[4] = {pack<T>(a(g, t), a(g, t + 1)), pack<T>(a(g + 8, t), a(g + 8, t + 1)),
                              pack<T>(a(g, t + 8), a(g, t + 9)), pack<T>(a(g + 8, t + 8), a(g + 8, t + 9))};
    const uint32_t right[2] = {pack<T>(b(t, g), b(t + 1, g)), pack<T>(b(t + 8, g), b(t + 9, g))};
    multiply<T>(d, left, right, sum);
  } else {
    const uint32_t left[2] = {pack<T>(a(g, t), a(g, t + 1)), pack<T>(a(g + 8, t), a(g + 8, t + 1))};
    multiply<T>(d, left, pack<T>(b(t, g), b(t + 1, g)), sum);
  }
  auto* out = reinterpret_cast<float*>(p.out);
  for (int i = 0; i < 4; ++i) store(out + (g + 8 * (i / 2)) * 8 + t + i % 2, d[i]);
}

template <int MaxThreads>
py::array_t<uint32_t> run(Kernel<Params, MaxThreads> kernel, int threads, const std::string& fault, uint32_t seed,
                          const py::array_t<float>& in) {
  py::array_t<uint32_t> out(128);
  Params p{out.mutable_data(), 128, in.data(), in.size(), fault};
  deco::emulation::Machine::instance().set_seed(seed);
  launch("test", kernel, {1, threads, threads * 4 < 512 ? 512 : threads * 4}, nullptr, p);
  return out;
}

// Launches a kernel whose launch bounds are 128 threads. `requested`: bytes of shared memory; 0: without a request, which
// no launch of this kernel makes.
void launch_sizes(int blocks, int threads, int shared_bytes, int requested) {
  uint32_t out[128];
  const Params p{out, 128};
  const auto kernel = requested > 0 ? neighbor_kernel : next_lane_kernel;
  if (requested > 0) request_shared("test", kernel, requested);
  start("test", kernel, {blocks, threads, shared_bytes}, nullptr, p);
}

// (accesses, wavefronts, conflicts) of shared memory, and (requested, sectors, distinct) bytes read from `in`.
py::tuple strided(const std::string& type, int stride) {
  alignas(32) const float in[64] = {};
  uint32_t out[32];
  const Params p{out, 32, in, 64, type, stride};
  const auto kernel = type == "2 bytes"   ? strided_kernel<uint16_t>
                      : type == "4 bytes" ? strided_kernel<uint32_t>
                      : type == "8 bytes" ? strided_kernel<Words2>
                                          : strided_kernel<Words4>;
  auto& machine = deco::emulation::Machine::instance();
  machine.start_recording();
  launch("test", kernel, {1, 32, 32 << 10}, nullptr, p);
  const auto launch = machine.stop_recording().at(0);
  const auto& read = launch.buffers.at(1).read;
  return py::make_tuple(py::make_tuple(launch.shared.accesses, launch.shared.wavefronts, launch.shared.conflicts),
                        py::make_tuple(read.requested, read.sectors, read.distinct));
}

void overlap(bool waits) {
  uint32_t out[32];
  launch("test", overlapping_kernel, {1, 32, 0, true}, nullptr,
         Params{out, 32, nullptr, 0, waits ? "none" : "no wait"});
}

}  // namespace

PYBIND11_MODULE(emulator_kernels, m) {
  auto& machine = deco::emulation::Machine::instance();
  py::register_exception<deco::emulation::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("check_races", [&](bool on) { machine.check_races(on); });
  m.def("set_truncating", [&](bool on) { machine.set_truncating(on); });
  m.def("launch_sizes", &launch_sizes);
  m.def("strided", &strided);
  m.def("overlap", &overlap);
  m.def("tanh", [](float x) { return tanh_approximate(x); });
  m.def("neighbor", [](const std::string& f, uint32_t seed) { return run(neighbor_kernel, 32 * kWarps, f, seed, {}); });
  m.def("next_lane", [](const std::string& f, uint32_t seed) { return run(next_lane_kernel, 128, f, seed, {}); });
  m.def("fault", [](const std::string& f) { return run(fault_kernel, 32 * kWarps, f, 1, py::array_t<float>(32)); });
  m.def("copy", [](const std::string& f, uint32_t seed, const py::array_t<float>& in) {
    return run(copy_kernel, 32, f, seed, in);
  });
  m.def("collective", [](const std::string& op) { return run(collective_kernel, 32, op, 1, {}); });
  m.def("multiply", [](const std::string& type, int k, const py::array_t<float>& in) {
    const bool bf16 = type == "bfloat16";
    auto* kernel = k == 16 ? (bf16 ? multiply_kernel<BFloat16, 16> : multiply_kernel<Float16, 16>)
                           : (bf16 ? multiply_kernel<BFloat16, 8> : multiply_kernel<Float16, 8>);
    return run(kernel, 32, "", 1, in);
  });
}
