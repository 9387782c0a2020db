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
  reserved_ = (bytes + kHugePage) / kHugePage * kHugePage;
  void* data = mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(data);
#if defined(MADV_HUGEPAGE)
  if (huge_pages) madvise(data, reserved_, MADV_HUGEPAGE);
#endif
}

void Arena::borrow(uint8_t* data, int64_t bytes) {
  assert(data_ == nullptr);
  data_ = data;
  reserved_ = bytes;
  used_ = 0;
  borrowed_ = true;
}

uint8_t* Arena::take(int64_t bytes) {
  const int64_t begin = used_;
  used_ += piece(bytes);
  if (data_ == nullptr) return nullptr;
  assert(used_ <= reserved_);
  return data_ + begin;
}

Arena::~Arena() {
  if (data_ != nullptr && !borrowed_) munmap(data_, reserved_);
}

}  // namespace optlm
