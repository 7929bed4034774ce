// Tensors that the glue makes live in the simulated device's memory: while it is in use, torch's CPU allocator asks
// Python for addresses there, and tells it when they are given back.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>

namespace {

using AllocateCallback = void* (*)(size_t bytes);
using FreeCallback = void (*)(void* address);

AllocateCallback on_allocate = nullptr;
FreeCallback on_free = nullptr;

void give_back(void* address) {
  if (address) on_free(address);
}

struct Arena final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* address = bytes ? on_allocate(bytes) : nullptr;
    return {address, address, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Arena arena;

}  // namespace

extern "C" {

void ptxsim_connect_arena(AllocateCallback allocate, FreeCallback free) {
  on_allocate = allocate;
  on_free = free;
}

void ptxsim_use_arena(int on) { c10::SetCPUAllocator(on ? &arena : c10::GetDefaultCPUAllocator(), 255); }
}
