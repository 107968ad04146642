// Memory for feature maps that is kept when it is given back. A training step allocates and frees the same large maps
// over and over; malloc returns them to the system each time, and touching fresh pages costs more than many a kernel.
#pragma once

#include <cstdint>

namespace sparsebilevel {

// 64-byte aligned, contents undefined. Throws std::bad_alloc.
void* pool_allocate(int64_t bytes);
void pool_free(void* memory);

// Gives everything that is not in use back to the system.
void pool_release();

// Bytes handed out, and bytes waiting to be used again.
int64_t pool_in_use();
int64_t pool_waiting();

}  // namespace sparsebilevel
