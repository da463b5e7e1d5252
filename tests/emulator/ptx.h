// What the kernels' functions of PTX do: namesakes of those in cuda/common/ptx.cuh,
// cuda/sm90/barrier.cuh and cuda/sm90/wgmma.cuh.
#pragma once

#include "emulator.h"

namespace emulator {

inline unsigned BlockIndex() { return blockIdx.x; }
inline unsigned ThreadIndex() { return threadIdx.x; }

// Shared memory.
template <class X>
X LoadSharedAs(uint32_t shared) {
  X x;
  std::memcpy(&x, Shared(shared, sizeof(X)), sizeof(X));
  return x;
}
template <class X>
void StoreSharedAs(uint32_t shared, const X& x) {
  std::memcpy(Shared(shared, sizeof(X)), &x, sizeof(X));
}
// Lane l gets of matrix i two elements of row l / 4, or transposed of its column.
template <bool kTransposed>
void LoadMatrices(uint32_t (&r)[4], uint32_t shared) {
  const Exchange rows(shared);
  const int lane = Lane();
  for (int i = 0; i < 4; ++i) {
    uint32_t elements[2];
    for (int e = 0; e < 2; ++e) {
      const int row = kTransposed ? 2 * (lane % 4) + e : lane / 4;
      const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + e;
      elements[e] = LoadSharedAs<uint16_t>(rows.Of<uint32_t>(8 * i + row) + 2 * column);
    }
    r[i] = elements[0] | elements[1] << 16;
  }
}
inline void LoadMatrix4(uint32_t (&r)[4], uint32_t shared) { LoadMatrices<false>(r, shared); }
inline void LoadMatrix4Transposed(uint32_t (&r)[4], uint32_t shared) {
  LoadMatrices<true>(r, shared);
}

// Asynchronous copies of a thread.
void CopyAsync(uint32_t shared, const void* global, int bytes);
void CopyAsyncCommit();
void WaitForCopies(int pending);
inline void CopyAsync16(uint32_t shared, const void* global) { CopyAsync(shared, global, 16); }
inline uint64_t CachePolicy(bool leaves_first) { return leaves_first; }
template <bool kThroughL1>
void CopyAsync16OrZeros(uint32_t shared, const void* global, bool is_given, uint64_t) {
  CopyAsync(shared, global, is_given ? 16 : 0);
}
template <int kPending>
void CopyAsyncWait() {
  WaitForCopies(kPending);
}

// Barriers in shared memory, and bulk copies.
void BarrierInit(uint32_t barrier, int arrivals);
void BarrierArrive(uint32_t barrier);
void BarrierExpect(uint32_t barrier, int bytes);
bool BarrierTest(uint32_t barrier, uint32_t parity);
void BarrierWait(uint32_t barrier, uint32_t parity);
void CopyBox(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2);
void CopyBulk(uint32_t shared, const void* global, int bytes, uint32_t barrier);
inline void FenceBarrierInit() {}
inline void FenceAsyncProxy() {}
inline void BarrierArriveOfWarp(uint32_t barrier) {
  ThisWarp().Meet();
  if (Lane() == 0) BarrierArrive(barrier);
}
inline void BarrierExpectOfWarp(uint32_t barrier, int bytes) {
  ThisWarp().Meet();
  if (Lane() == 0) BarrierExpect(barrier, bytes);
}
inline void CopyBoxOfWarp(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
                          int c2) {
  ThisWarp().Meet();
  if (Lane() == 0) CopyBox(shared, map, barrier, c0, c1, c2);
}
void StoreBox(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2);
inline void StoreBoxOfWarp(const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2) {
  ThisWarp().Meet();
  if (Lane() == 0) StoreBox(map, shared, c0, c1, c2);
}
void WaitForStores();
inline void StoreMatrix4(uint32_t shared, const uint32_t (&r)[4]) {
  const Exchange rows(shared);
  for (int i = 0; i < 4; ++i) {
    StoreSharedAs(rows.Of<uint32_t>(8 * i + Lane() / 4) + Lane() % 4 * 4, r[i]);
  }
}
template <int kRegisters>
void RegistersUp() {}
template <int kRegisters>
void RegistersDown() {}

// Matrix instructions. kS8: INT8 to INT32; kE4m3, kF16: to FP16, or to FP32.
enum class Type { kS8, kE4m3, kF16 };

// mma.sync, of a warp: C[16 x 8] += A[16 x 32 bytes] B[32 bytes x 8].
void Mma(Type type, bool to_f16, uint32_t* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
inline void MmaS8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma(Type::kS8, false, reinterpret_cast<uint32_t*>(c), a, b0, b1);
}
inline void MmaE4m3(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma(Type::kE4m3, true, c, a, b0, b1);
}
inline void MmaE4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma(Type::kE4m3, false, reinterpret_cast<uint32_t*>(c), a, b0, b1);
}
inline void MmaF16(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma(Type::kF16, true, c, a, b0, b1);
}
inline void MmaF16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma(Type::kF16, false, reinterpret_cast<uint32_t*>(c), a, b0, b1);
}

// wgmma, of a warpgroup: D[64 x columns] (+)= A[64 x 32 bytes] B[32 bytes x columns]. A comes from
// `a`, or where that is null from shared memory.
struct Wgmma {
  Type type;
  bool to_f16;
  int columns;
  uint32_t* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};
void Issue(const Wgmma& wgmma);
void WgmmaCommit();
void WaitForWgmmas(int pending);
inline void WgmmaFence() {}
template <int kPending>
void WgmmaWait() {
  WaitForWgmmas(kPending);
}
inline void WgmmaS8(int32_t (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  Issue({Type::kS8, false, 64, reinterpret_cast<uint32_t*>(d), nullptr, a, b, accumulate});
}
inline void WgmmaS8(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Issue({Type::kS8, false, 64, reinterpret_cast<uint32_t*>(d), a, 0, b, accumulate});
}
template <int kRegisters>
void WgmmaE4m3(uint32_t (&d)[kRegisters], const uint32_t* a, uint64_t b, bool accumulate) {
  Issue({Type::kE4m3, true, 4 * kRegisters, d, a, 0, b, accumulate});
}
template <int kRegisters>
void WgmmaF16(float (&d)[kRegisters], const uint32_t* a, uint64_t b, bool accumulate) {
  Issue({Type::kF16, false, 2 * kRegisters, reinterpret_cast<uint32_t*>(d), a, 0, b, accumulate});
}

// Conversions.
inline float Exp2(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 0x1p-126f ? 0 : y;
}

inline float MaxOrNan(float x, float y) {
  return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y);
}
inline uint32_t PackE4m3(float x0, float x1, float x2, float x3) {
  const auto pair = [](float low, float high) -> uint32_t {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
  };
  return pair(x0, x1) | pair(x2, x3) << 16;
}
inline uint32_t PackF16(float x0, float x1) {
  return EmulatorBits<uint32_t>(__float22half2_rn(make_float2(x0, x1)));
}
inline int32_t SpreadSign(uint32_t x, int byte) {
  return static_cast<int32_t>(__byte_perm(x, x, 0x8888 | byte * 0x1111));
}
template <int k0, int k1, int k2, int k3>
uint32_t SpreadSigns(uint32_t x) {
  return __byte_perm(x, x, 0x8888 | k0 | k1 << 4 | k2 << 8 | k3 << 12);
}

}  // namespace emulator
