// Wrappers of the PTX instructions that the kernels use. No algorithm here.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace jax_sage::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, asynchronously, past L1.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared), "l"(global));
}
// What L2 is to do with what is read: keep it as ever, or let it leave first.
__device__ __forceinline__ uint64_t CachePolicy(bool leaves_first) {
  uint64_t normal, first;
  asm("createpolicy.fractional.L2::evict_unchanged.b64 %0;" : "=l"(normal));
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(first));
  return leaves_first ? first : normal;
}
// The same, or zeros where nothing is given: then nothing is read.
template <bool kThroughL1>
__device__ __forceinline__ void CopyAsync16OrZeros(uint32_t shared, const void* global,
                                                   bool is_given, uint64_t policy) {
  if constexpr (kThroughL1) {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(shared),
                 "l"(global), "r"(is_given ? 16 : 0), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(shared),
                 "l"(global), "r"(is_given ? 16 : 0), "l"(policy)
                 : "memory");
  }
}
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;\n"); }
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// A value of 2, 4, 8 or 16 bytes, aligned to its size.
template <class X>
__device__ __forceinline__ X LoadSharedAs(uint32_t shared) {
  alignas(16) X x;
  if constexpr (sizeof(X) == 2) {
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=h"(*reinterpret_cast<uint16_t*>(&x))
                 : "r"(shared)
                 : "memory");
  } else if constexpr (sizeof(X) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];"
                 : "=r"(*reinterpret_cast<uint32_t*>(&x))
                 : "r"(shared)
                 : "memory");
  } else if constexpr (sizeof(X) == 8) {
    uint32_t (&words)[2] = *reinterpret_cast<uint32_t (*)[2]>(&x);
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(shared)
                 : "memory");
  } else {
    static_assert(sizeof(X) == 16);
    uint32_t (&words)[4] = *reinterpret_cast<uint32_t (*)[4]>(&x);
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared)
                 : "memory");
  }
  return x;
}
template <class X>
__device__ __forceinline__ void StoreSharedAs(uint32_t shared, const X& x) {
  if constexpr (sizeof(X) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared),
                 "r"(*reinterpret_cast<const uint32_t*>(&x))
                 : "memory");
  } else if constexpr (sizeof(X) == 8) {
    const uint32_t (&words)[2] = *reinterpret_cast<const uint32_t (*)[2]>(&x);
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(shared), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
    static_assert(sizeof(X) == 16);
    const uint32_t (&words)[4] = *reinterpret_cast<const uint32_t (*)[4]>(&x);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}

// INT8: C[16x8] += A[16x32] B[32x8], exact.
__device__ __forceinline__ void MmaS8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// E4M3, FP16 accumulator (two packed halves a register).
__device__ __forceinline__ void MmaE4m3(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 "
      "{%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};\n"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// E4M3, FP32 accumulator.
__device__ __forceinline__ void MmaE4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// FP16, FP16 accumulator.
__device__ __forceinline__ void MmaF16(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
      "{%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};\n"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// FP16, FP32 accumulator.
__device__ __forceinline__ void MmaF16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// threadIdx.x, read anew each time: what is computed from it need not stay in registers.
__device__ __forceinline__ unsigned ThreadIndex() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The greater, or NaN if one of them is.
__device__ __forceinline__ float MaxOrNan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Four floats to E4M3, x0 in the lowest byte. Round to nearest even; NaN stays NaN.
__device__ __forceinline__ uint32_t PackE4m3(float x0, float x1, float x2, float x3) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(packed)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return packed;
}
// The sign of a byte of x, 32 times.
__device__ __forceinline__ int32_t SpreadSign(uint32_t x, int byte) {
  int32_t result;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(result) : "r"(x), "r"(0x8888 | byte * 0x1111));
  return result;
}
// Byte b of the result is the sign of byte kB of x, eight times.
template <int k0, int k1, int k2, int k3>
__device__ __forceinline__ uint32_t SpreadSigns(uint32_t x) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %1, %2;"
      : "=r"(result)
      : "r"(x), "n"(0x8888 | k0 | k1 << 4 | k2 << 8 | k3 << 12));
  return result;
}
// Two floats to FP16, x0 in the lower half.
__device__ __forceinline__ uint32_t PackF16(float x0, float x1) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(x0), "f"(x1));
  return packed;
}
__device__ __forceinline__ float2 UnpackF16(uint32_t packed) {
  return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}
__device__ __forceinline__ uint32_t ScaleF16(uint32_t packed, float scale) {
  const __half2 x = __hmul2(*reinterpret_cast<const __half2*>(&packed), __float2half2_rn(scale));
  return *reinterpret_cast<const uint32_t*>(&x);
}

}  // namespace jax_sage::ptx
