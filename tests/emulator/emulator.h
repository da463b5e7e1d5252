// CUDA's model of execution on a CPU, so that the kernels' own sources run where there is no GPU:
// which element goes where, what waits for what. No speed, no races of memory, and no floating
// point of the tensor cores: their sums are made in FP32.
//
// A thread is a fiber. The fibers of a CTA run from one wait to the next, warps by turns or by
// priorities, in a random order, and CTAs one after the other. What the hardware does
// asynchronously is done at different times: a wgmma when its warpgroup waits for it, a cp.async at
// once or when its thread waits for it, a bulk copy at once, at random times or when nothing else
// can be done, as each CTA has it. So most waits that are missing give wrong results here too.
// Deadlocks, and PTX's accesses beyond the dynamic shared memory, are errors of the launch. That is
// poisoned before each CTA; shared variables of a fixed size are not.
//
// sources.py makes of each function that is written in PTX a call of its namesake in this
// namespace.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#undef __forceinline__
#define __forceinline__ inline
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __global__
#define __global__
#undef __shared__
#define __shared__ static  // CTAs run one after the other
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kSharedBytes = kMaxSharedBytes + 1024;
constexpr int kMultiprocessors = 3;  // few: a CTA that stays gets several items

alignas(1024) inline uint8_t shared_memory[kSharedBytes];

// So that what is not written shows.
inline void Poison(void* data, size_t bytes, int byte = 0xa5) { std::memset(data, byte, bytes); }

// Ends the launch with an error.
[[noreturn]] void Fail(const std::string& message);

// Of the GPU that is emulated.
int Capability();

// Lets other threads run for a while.
void Sleep();
// Lets other threads run until `ready` is true.
void WaitUntil(bool (*ready)(void*), void* argument);
template <class Ready>
void WaitUntil(Ready ready) {
  WaitUntil([](void* p) { return (*static_cast<Ready*>(p))(); }, &ready);
}

// Threads that meet: a warp, a warpgroup, a CTA.
struct Group {
  int living = 0, arrived = 0;
  unsigned generation = 0;
  int votes[2] = {0, 0};  // by parity of the generation

  // The number of threads that said yes. The last to come does `last` for all.
  template <class Last>
  int Meet(bool vote, Last last) {
    const unsigned mine = generation;
    votes[mine % 2] += vote;
    if (++arrived == living) {
      last();
      Open();
    } else {
      WaitUntil([this, mine] { return generation != mine; });
    }
    return votes[mine % 2];
  }
  int Meet(bool vote = false) {
    return Meet(vote, [] {});
  }
  void Open() {
    arrived = 0;
    votes[++generation % 2] = 0;
  }
};

constexpr int kLanes = 32;
struct Warp : Group {
  // What is exchanged, and of mma.sync; by parity of the generation.
  uint8_t values[2][kLanes][32];
  float products[2][16][8];
};
Warp& ThisWarp();
Warp& WholeWarp();  // of which no lane has ended
Group& ThisWarpgroup();
Group& ThisCta();
inline int Lane() { return threadIdx.x % kLanes; }

// What another lane gives. All lanes call, and so it is for everything of a warp.
class Exchange {
 public:
  template <class X>
  explicit Exchange(X x) : warp_(WholeWarp()), parity_(warp_.generation % 2) {
    static_assert(sizeof(X) <= sizeof(warp_.values[0][0]));
    std::memcpy(warp_.values[parity_][Lane()], &x, sizeof(X));
    warp_.Meet();
  }
  template <class X>
  X Of(int lane) const {
    X x;
    std::memcpy(&x, warp_.values[parity_][lane % kLanes], sizeof(X));
    return x;
  }

 private:
  Warp& warp_;
  unsigned parity_;
};

// Runs a grid; for each thread `run`, with its argument.
void RunGrid(dim3 grid, dim3 block, size_t shared_bytes, void (*run)(void*), void* argument);

template <class... Params, class... Args>
void Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args&&... args) {
  auto call = std::make_pair(kernel, std::tuple<Params...>(std::forward<Args>(args)...));
  RunGrid(
      grid, block, shared_bytes,
      [](void* p) {
        const auto& [kernel, arguments] =
            *static_cast<std::pair<void (*)(Params...), std::tuple<Params...>>*>(p);
        std::apply(kernel, arguments);
      },
      &call);
}

// A piece of shared memory.
uint8_t* Shared(uint32_t address, size_t bytes);

}  // namespace emulator

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  emulator::Launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                   config->stream, std::forward<Args>(args)...);
  return cudaGetLastError();
}

#include "device.h"
#include "ptx.h"
