#include "isa.h"

#include <algorithm>
#include <atomic>

namespace sparsebilevel {
namespace {

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{cpu_isa()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa wanted) { chosen().store(std::min(wanted, cpu_isa()), std::memory_order_relaxed); }

}  // namespace sparsebilevel
