// mbarriers, bulk copies by the tensor memory accelerator (TMA), and wgmma's bookkeeping.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

namespace jax_sage::ptx {

__device__ __forceinline__ void BarrierInit(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void BarrierExpect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits until the phase of that parity has completed.
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Whether it has.
__device__ __forceinline__ bool BarrierTest(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// Makes this thread's barrier initializations and shared stores visible to the async proxy.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A box of a 3-dimensional tensor, first coordinate contiguous; zeros where it is outside.
__device__ __forceinline__ void CopyBox(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                        int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// BarrierArrive, BarrierExpect and CopyBox of a warp as one, all lanes of which give the same: a
// branch to one lane would part it, or wait for the number of the thread, and take longer than the
// rest.
__device__ __forceinline__ void BarrierArriveOfWarp(uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "@elected mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(barrier)
      : "memory");
}
__device__ __forceinline__ void BarrierExpectOfWarp(uint32_t barrier, int bytes) {
  asm volatile(
      "{\n.reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "@elected mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n}\n" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void CopyBoxOfWarp(uint32_t shared, const CUtensorMap* map,
                                              uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "{\n.reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "@elected cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];\n}\n" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// A box from shared memory to a tensor; what would be outside is left out.
__device__ __forceinline__ void StoreBoxOfWarp(const CUtensorMap* map, uint32_t shared, int c0,
                                               int c1, int c2) {
  asm volatile(
      "{\n.reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "@elected cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4}], [%1];\n"
      "@elected cp.async.bulk.commit_group;\n}\n" ::"l"(map),
      "r"(shared), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// Until the boxes that this thread stored have been read from shared memory.
__device__ __forceinline__ void WaitForStores() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Four tiles of 8 x 8 numbers of 16 bits, of which a thread has two neighbours of each, as of C
// fragments. Lane 8i + r gives the address of row r of tile i.
__device__ __forceinline__ void StoreMatrix4(uint32_t shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// `bytes` contiguous bytes, a multiple of 16.
__device__ __forceinline__ void CopyBulk(uint32_t shared, const void* global, int bytes,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of registers that a wgmma in flight reads or writes.
template <class T, int kCount>
__device__ __forceinline__ void Pin(T (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(r[i])::"memory");
    } else {
      asm volatile("" : "+r"(r[i])::"memory");
    }
  }
}

template <int kRegisters>
__device__ __forceinline__ void RegistersUp() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void RegistersDown() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Descriptor of a K-major operand whose rows of kRowBytes are swizzled over kRowBytes, as TMA
// writes them: groups of 8 rows follow each other. Adding 2 moves 32 bytes along the row.
template <int kRowBytes>
__device__ __forceinline__ uint64_t Descriptor(uint32_t shared) {
  static_assert(kRowBytes == 128 || kRowBytes == 64, "swizzles of 128 and of 64 bytes");
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kGroup = 8 * kRowBytes / 16;
  return (kSwizzle << 62) | (kGroup << 32) | (uint64_t{1} << 16) | ((shared & 0x3FFFF) >> 4);
}

// The same descriptor, in uniform registers from here on.
__device__ __forceinline__ uint64_t Uniform(uint64_t descriptor) {
  return descriptor >> 32 << 32 | __shfl_sync(0xffffffffu, static_cast<uint32_t>(descriptor), 0);
}

// Descriptor of an operand that is contiguous along its other dimension, in boxes of 128 bytes
// along that, `box` bytes apart, as TMA writes them. Adding 8 moves along K by one row of a box.
__device__ __forceinline__ uint64_t TransposedDescriptor(uint32_t shared, int box) {
  return (uint64_t{1} << 62) | (uint64_t{8 * 128 / 16} << 32) |
         (static_cast<uint64_t>(box / 16) << 16) | ((shared & 0x3FFFF) >> 4);
}

}  // namespace jax_sage::ptx
