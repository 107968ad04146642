#include "pool.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sparsebilevel {
namespace {

constexpr int64_t kHugePage = 2 << 20;

class Pool {
 public:
  void* allocate(int64_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    std::lock_guard<std::mutex> lock(mutex_);
    auto& same = by_size_[bytes];
    void* memory;
    if (!same.empty()) {  // the last that came back: it is the likeliest to be in a cache
      memory = same.back()->memory;
      waiting_.erase(same.back());
      same.pop_back();
      waiting_bytes_ -= bytes;
    } else {
      // What has waited longest was for other shapes; no more may wait than is in use.
      while (!waiting_.empty() && waiting_bytes_ > used_bytes_) release_oldest();
      memory = std::aligned_alloc(64, bytes);
      if (!memory) {
        while (!waiting_.empty()) release_oldest();
        memory = std::aligned_alloc(64, bytes);
      }
      if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (bytes >= 2 * kHugePage) {
        const auto begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
        const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
      }
#endif
    }
    used_[memory] = bytes;
    used_bytes_ += bytes;
    return memory;
  }

  void free(void* memory) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = used_.find(memory);
    const int64_t bytes = entry->second;
    used_.erase(entry);
    used_bytes_ -= bytes;
    waiting_.push_back({memory, bytes});
    by_size_[bytes].push_back(std::prev(waiting_.end()));
    waiting_bytes_ += bytes;
  }

  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    while (!waiting_.empty()) release_oldest();
  }

  int64_t used() {
    std::lock_guard<std::mutex> lock(mutex_);
    return used_bytes_;
  }

  int64_t waiting() {
    std::lock_guard<std::mutex> lock(mutex_);
    return waiting_bytes_;
  }

 private:
  struct Block {
    void* memory;
    int64_t bytes;
  };

  void release_oldest() {
    const Block block = waiting_.front();
    auto& same = by_size_[block.bytes];
    same.erase(same.begin());  // in the order in which they came back
    waiting_.pop_front();
    waiting_bytes_ -= block.bytes;
    std::free(block.memory);
  }

  std::mutex mutex_;
  std::unordered_map<void*, int64_t> used_;
  std::list<Block> waiting_;  // oldest first
  std::unordered_map<int64_t, std::vector<std::list<Block>::iterator>> by_size_;
  int64_t used_bytes_ = 0, waiting_bytes_ = 0;
};

// Never destroyed: tensors may outlive every static object of this library.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

void* pool_allocate(int64_t bytes) { return pool().allocate(bytes); }
void pool_free(void* memory) { pool().free(memory); }
void pool_release() { pool().release(); }
int64_t pool_in_use() { return pool().used(); }
int64_t pool_waiting() { return pool().waiting(); }

}  // namespace sparsebilevel
