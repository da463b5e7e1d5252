// CUDA's functions of device code, as far as the kernels use them.
#pragma once

#include <algorithm>
#include <limits>

#include "emulator.h"

using std::isfinite;
using std::isnan;

// As CUDA has them: without templates, so that arguments of different types convert.
#define EMULATOR_MIN_MAX(X)                            \
  inline X min(X x, X y) { return std::min<X>(x, y); } \
  inline X max(X x, X y) { return std::max<X>(x, y); }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(float)
#undef EMULATOR_MIN_MAX

inline void __syncthreads() { emulator::ThisCta().Meet(); }
inline int __syncthreads_count(int x) { return emulator::ThisCta().Meet(x != 0); }
inline int __syncthreads_or(int x) { return __syncthreads_count(x) != 0; }
inline int __syncthreads_and(int x) { return __syncthreads_count(x == 0) == 0; }
inline void __syncwarp(unsigned = ~0u) { emulator::ThisWarp().Meet(); }

template <class X>
X __shfl_sync(unsigned, X x, int lane, int width = emulator::kLanes) {
  const int first = emulator::Lane() / width * width;
  return emulator::Exchange(x).template Of<X>(first + lane % width);
}
template <class X>
X __shfl_xor_sync(unsigned, X x, int mask) {
  return emulator::Exchange(x).template Of<X>(emulator::Lane() ^ mask);
}
template <class X>
X __shfl_up_sync(unsigned, X x, unsigned lanes) {
  return emulator::Exchange(x).template Of<X>(std::max<int>(emulator::Lane() - lanes, 0));
}
inline unsigned __ballot_sync(unsigned, int x) {
  const emulator::Exchange exchange(x != 0);
  unsigned result = 0;
  for (int lane = 0; lane < emulator::kLanes; ++lane) {
    result |= static_cast<unsigned>(exchange.Of<bool>(lane)) << lane;
  }
  return result;
}
inline int __any_sync(unsigned lanes, int x) { return __ballot_sync(lanes, x) != 0; }
inline int __all_sync(unsigned lanes, int x) { return __ballot_sync(lanes, x == 0) == 0; }
inline int __reduce_min_sync(unsigned, int x) {
  const emulator::Exchange exchange(x);
  for (int lane = 0; lane < emulator::kLanes; ++lane) x = std::min(x, exchange.Of<int>(lane));
  return x;
}

template <class X>
X __ldg(const X* from) {
  return *from;
}
template <class X>
X __ldcg(const X* from) {
  return *from;
}
template <class X>
void __stcs(X* to, X x) {
  *to = x;
}
// Threads run one at a time: everything is atomic.
template <class X>
X atomicAdd(X* to, X x) {
  return std::exchange(*to, *to + x);
}
inline int atomicMin(int* to, int x) { return std::exchange(*to, std::min(*to, x)); }
inline int atomicMax(int* to, int x) { return std::exchange(*to, std::max(*to, x)); }
inline void __nanosleep(unsigned) { emulator::Sleep(); }
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const uint8_t*>(pointer) - emulator::shared_memory;
}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() {}

template <class To, class From>
To EmulatorBits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __int_as_float(int x) { return EmulatorBits<float>(x); }
inline float __uint_as_float(unsigned x) { return EmulatorBits<float>(x); }
inline int __float_as_int(float x) { return EmulatorBits<int>(x); }
inline unsigned __float_as_uint(float x) { return EmulatorBits<unsigned>(x); }
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  return static_cast<int>(std::clamp(std::nearbyint(x), -0x1p31f, 0x1.fffffep30f));
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float EmulatorRoundUp(long double x) {
  const float nearest = static_cast<float>(x);
  return nearest < x ? std::nextafter(nearest, std::numeric_limits<float>::infinity()) : nearest;
}
inline float __fmul_ru(float x, float y) {
  return EmulatorRoundUp(static_cast<long double>(x) * y);
}
inline float __fmaf_ru(float x, float y, float z) {
  return EmulatorRoundUp(static_cast<long double>(x) * y + z);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1) << (31 - bit);
  return result;
}
// With the sign of a byte spread where the selector has its fourth bit.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned byte = bytes >> (selector >> (4 * i) & 7) * 8 & 0xff;
    if (selector >> (4 * i) & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __vmaxu2(unsigned x, unsigned y) {
  return std::max(x >> 16, y >> 16) << 16 | std::max(x & 0xffff, y & 0xffff);
}
inline unsigned __vimax3_u16x2(unsigned x, unsigned y, unsigned z) {
  return __vmaxu2(__vmaxu2(x, y), z);
}
