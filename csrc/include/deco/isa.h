// Instruction set of the CPU kernels.
#pragma once

#include <string>
#include <vector>

namespace deco::cpu {

// Instruction sets that this build contains and this processor supports, fastest first.
std::vector<std::string> usable_isas();

// The current instruction set: the fastest usable one unless select_isa was called.
std::string current_isa();

// Selects the instruction set of all later calls. Throws std::invalid_argument if `name` is unknown or not usable here.
void select_isa(const std::string& name);

// Floats per vector of the current instruction set.
int vector_lanes();

// Whether this process may use AMX with bfloat16; asks Linux for its tile registers. The kernels of the instruction set
// amx use it, and PyTorch's matmuls.
bool has_amx_bf16();

}  // namespace deco::cpu
