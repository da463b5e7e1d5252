// Q, K and V as they are given, and INT8 codes of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_sage {

// Two neighbouring channels, as they are stored.
template <class In>
struct PairOf;
template <>
struct PairOf<float> {
  using Type = float2;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

__device__ __forceinline__ float2 ToFloats(float2 x) { return x; }
__device__ __forceinline__ float2 ToFloats(__half2 x) { return __half22float2(x); }
// One instruction each; the library's takes two for the upper.
__device__ __forceinline__ float2 ToFloats(__nv_bfloat162 x) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(&x);
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// Bits of the largest magnitude; at least those of infinity where there is something not finite.
__device__ __forceinline__ int LargestBits(float2 x) {
  return max(__float_as_int(fabsf(x.x)), __float_as_int(fabsf(x.y)));
}

// Codes of x * inverse, at most 127 in magnitude. Adding 1.5 * 2^23 rounds to an integer, to
// nearest even, in the lowest bits: a byte permutation is cheaper than conversions.
__device__ __forceinline__ uint32_t PackInt8(float x0, float x1, float x2, float x3,
                                             float inverse) {
  const auto code = [&](float x) {
    return __float_as_uint(__fadd_rn(__fmul_rn(x, inverse), 0x1.8p23f));
  };
  const uint32_t low = __byte_perm(code(x0), code(x1), 0x0040);
  const uint32_t high = __byte_perm(code(x2), code(x3), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

}  // namespace jax_sage
