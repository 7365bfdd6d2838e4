// The instruction set that the CPU kernels run on.
#pragma once

#include <string>
#include <vector>

namespace deco::cpu {

// Names of the instruction sets that this build holds and this processor can run, the fastest first.
std::vector<std::string> usable_isas();

// The one in use: the fastest usable one unless select_isa was called.
std::string current_isa();

// Makes every later call run on `name`. Throws std::invalid_argument if the name is unknown or cannot be run here.
void select_isa(const std::string& name);

// Floats per vector of the instruction set in use.
int vector_lanes();

}  // namespace deco::cpu
