#include "memory.h"

#include <sys/mman.h>

#include <cassert>
#include <new>

namespace optlm {
namespace {
constexpr int64_t kHugePage = int64_t{2} << 20;
}

void Arena::reserve(int64_t bytes, bool huge_pages) {
  assert(data_ == nullptr);
  used_ = 0;
  mapped_ = bytes + kHugePage;  // room to begin at a multiple of a huge page
  void* start = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<uint8_t*>(start);
  data_ = mapping_ + (kHugePage - reinterpret_cast<uintptr_t>(mapping_) % kHugePage) % kHugePage;
  reserved_ = bytes;
#if defined(MADV_HUGEPAGE)
  // Not the last, partial page: it would count as resident in full.
  if (huge_pages) madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

void Arena::borrow(uint8_t* data, int64_t bytes) {
  assert(data_ == nullptr);
  data_ = data;
  reserved_ = bytes;
  used_ = 0;
}

uint8_t* Arena::take(int64_t bytes) {
  const int64_t begin = used_;
  used_ += piece(bytes);
  if (data_ == nullptr) return nullptr;
  assert(used_ <= reserved_);
  return data_ + begin;
}

Arena::~Arena() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

}  // namespace optlm
