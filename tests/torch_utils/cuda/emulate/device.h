// Emulation of a CUDA device on one CPU thread, for kernels that use torch_utils/ops/cuda_portable.cuh.
//
// Every thread of a block is a fibre (ucontext). Blocks run one after the other. Within a block, a fibre runs until it reaches a barrier or a
// warp shuffle; then the next fibre runs. If some threads of a block or warp never reach a barrier or shuffle, or if there is a deadlock, the
// program ends with a message and the exit status 3. AddressSanitizer, with which the emulation is compiled, detects accesses outside of a
// buffer: dynamic shared memory is a heap block of exactly the size of the launch, which is filled with NaN for every block. A missing barrier
// leads to results that depend on the order of threads. The tests therefore run a kernel with order 0 (ascending) and 1 (descending).
#pragma once
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define EG3D_DEVICE inline
#define EG3D_KERNEL static
#define EG3D_BOTH inline
#define EG3D_BOUNDS(...)
#define EG3D_CONSTANT const
#define EG3D_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulated::shared)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct __nv_bfloat16 { uint16_t bits; };
using Stream = int;

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulated {

constexpr size_t kStack = 256 * 1024;
inline unsigned char* shared = nullptr;
inline int order = 0;          // 0: threads and blocks ascending, 1: descending
inline int processors = 2;     // number of multiprocessors of the emulated device

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated device: %s (block %u %u %u, thread %u)\n", why, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  std::_Exit(3);
}

enum class State { ready, at_block, at_warp, done };
struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  dim3 index;
};

inline std::vector<std::unique_ptr<Fibre>> fibres;
inline std::vector<uint64_t> slots;  // one word for each thread, for shuffles and votes
inline ucontext_t scheduler;
inline unsigned current = 0;
inline std::function<void()> body;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;

inline void leave(State state) {  // switch to the scheduler; returns when this fibre is resumed
  Fibre& self = *fibres[current];
  self.state = state;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fake, scheduler_stack, scheduler_size);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
}

inline void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
  body();
  leave(State::done);
}

inline void resume(unsigned i) {
  current = i;
  threadIdx = fibres[i]->index;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fibres[i]->stack.get(), kStack);
  swapcontext(&scheduler, &fibres[i]->context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

// Release the fibres [first, last) and return true if all of them wait in `state`; otherwise return false. It is an error if only some of them
// wait, but only once no other fibre can run.
inline bool release(unsigned first, unsigned last, State state) {
  for (unsigned i = first; i < last; ++i)
    if (fibres[i]->state != state) return false;
  for (unsigned i = first; i < last; ++i) fibres[i]->state = State::ready;
  return true;
}

inline void run_block(unsigned threads) {
  while (fibres.size() < threads) fibres.push_back(std::make_unique<Fibre>());
  slots.assign(threads, 0);
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& f = *fibres[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
    f.state = State::ready;
    f.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  }
  for (;;) {
    bool moved = false, all_done = true;
    for (unsigned k = 0; k < threads; ++k) {
      const unsigned i = order == 0 ? k : threads - 1 - k;
      if (fibres[i]->state == State::ready) { resume(i); moved = true; }
    }
    for (unsigned i = 0; i < threads; ++i) all_done = all_done && fibres[i]->state == State::done;
    if (all_done) return;
    for (unsigned w = 0; w < threads; w += 32) moved = release(w, std::min(w + 32, threads), State::at_warp) || moved;
    moved = release(0, threads, State::at_block) || moved;
    if (!moved) fail("some threads never reach the barrier or shuffle at which other threads wait");
  }
}

template <typename T> uint64_t to_word(T value) { uint64_t word = 0; std::memcpy(&word, &value, sizeof value); return word; }
template <typename T> T from_word(uint64_t word) { T value; std::memcpy(&value, &word, sizeof value); return value; }

template <typename T> T exchange(unsigned mask, T value, unsigned source_lane) {
  if (mask != 0xFFFFFFFFu || blockDim.x * blockDim.y * blockDim.z % 32 != 0) fail("a shuffle must include all threads of a warp");
  const unsigned self = current, base = self / 32 * 32;
  slots[self] = to_word(value);
  leave(State::at_warp);
  const T result = from_word<T>(slots[base + source_lane]);
  leave(State::at_warp);
  return result;
}

}  // namespace emulated

inline void __syncthreads() { emulated::leave(emulated::State::at_block); }
inline void __syncwarp() { emulated::leave(emulated::State::at_warp); }
inline int __syncthreads_or(int predicate) {
  emulated::slots[emulated::current] = predicate != 0;
  __syncthreads();
  int any = 0;
  for (uint64_t s : emulated::slots) any |= static_cast<int>(s);
  __syncthreads();
  return any;
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int step) {
  return emulated::exchange(mask, value, (emulated::current % 32) ^ static_cast<unsigned>(step));
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned step) {
  const unsigned lane = emulated::current % 32;
  return emulated::exchange(mask, value, lane < step ? lane : lane - step);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned step) {
  const unsigned lane = emulated::current % 32;
  return emulated::exchange(mask, value, lane + step > 31 ? lane : lane + step);
}
template <typename T> T __shfl_sync(unsigned mask, T value, int lane) {
  return emulated::exchange(mask, value, static_cast<unsigned>(lane));
}
template <typename T> T atomicAdd(T* where, T value) { const T old = *where; *where = old + value; return old; }
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline __nv_bfloat16 __float2bfloat16(float v) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (v != v) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __expf(float x) { return std::exp(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }

namespace eg3d {

inline int resident_blocks(int per_processor) { return emulated::processors * per_processor; }

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream, A... args) {
  gridDim = grid;
  blockDim = block;
  const unsigned threads = block.x * block.y * block.z;
  const bool accepted = threads > 0 && threads <= 1024 && grid.y <= 65535 && grid.z <= 65535 && shared <= 160 * 1024;
  if (!accepted) emulated::fail("the launch exceeds the limits of every device (threads, grid, or shared memory)");
  emulated::body = [=] { kernel(static_cast<P>(args)...); };
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned k = 0; k < blocks; ++k) {
    const unsigned i = emulated::order == 0 ? k : blocks - 1 - k;
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
    void* raw = std::aligned_alloc(16, (shared + 15) / 16 * 16 + (shared == 0 ? 16 : 0));
    emulated::shared = static_cast<unsigned char*>(raw);
    std::memset(raw, 0xFF, shared);
    emulated::run_block(threads);
    std::free(raw);
  }
}

}  // namespace eg3d
