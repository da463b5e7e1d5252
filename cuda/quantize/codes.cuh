// Codes and scales of Q, K and V. The first tokens are loaded before the wait for the statistics.
#pragma once

#include <cuda_fp8.h>

#include "quantize/quantize.h"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"

namespace jax_sage::quantize {

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

// One value for each pass, of which each thread of a row has a part: puts the parts together, all
// passes at once, and leaves to a thread the pass PassOfThread alone. By exchanging halves that is
// 5 shuffles in all for rows of 16 threads, and not 4 for each pass.
template <int kThreadsPerRow, class X, class Op>
__device__ __forceinline__ X ReducePasses(X (&x)[kPasses], Op op) {
  int offset = kThreadsPerRow / 2;
#pragma unroll
  for (int kept = kPasses / 2; kept > 0; kept /= 2, offset /= 2) {
    const bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const X sent = upper ? x[i] : x[i + kept];
      const X own = upper ? x[i + kept] : x[i];
      x[i] = op(own, __shfl_xor_sync(kAllLanes, sent, offset));
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2) x[0] = op(x[0], __shfl_xor_sync(kAllLanes, x[0], offset));
  return x[0];
}
template <int kThreadsPerRow>
__device__ __forceinline__ int PassOfThread() {
  return threadIdx.x % kThreadsPerRow / (kThreadsPerRow / kPasses);
}

template <int kWidth>
__device__ __forceinline__ float MaxAcross(float x) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

// Bits of the largest magnitude; at least those of infinity where there is something not finite.
__device__ __forceinline__ int LargestBits(float2 x) {
  return max(__float_as_int(fabsf(x.x)), __float_as_int(fabsf(x.y)));
}
__device__ __forceinline__ int LargestBits(const Vector<float>& vector) {
  int largest = 0;
#pragma unroll
  for (const float2& pair : vector.pairs) largest = max(largest, LargestBits(pair));
  return largest;
}
template <class In>
__device__ __forceinline__ int LargestBits(const Vector<In>& vector) {
  Pair<In> largest = __habs2(vector.pairs[0]);
#pragma unroll
  for (int i = 1; i < kVector / 2; ++i) largest = __hmax2_nan(largest, __habs2(vector.pairs[i]));
  return LargestBits(ToFloats(largest));
}

// A chunk of the rows of Q: codes, scales, and q·k̄ for lse.
template <class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeQueryCodes(const QuantizeParams& params, int head, int first) {
  using T = Tokens<In, kAccess, kHeadDim>;
  constexpr int kInfBits = 0x7f800000;
  const T tokens(params.query, head, params.heads, params.length_q, params.head_dim, nullptr);
  Vector<In> x[kPasses];
  tokens.template Load<kQuery>(x, first);
  const int kv_head = head / (params.heads / params.kv_heads);
  WaitForStatistics(params, kv_head, kKey);
  float k_mean[kVector];
  LoadFloats(k_mean, params.channels + kv_head * static_cast<int64_t>(kChannelRows * kHeadDim) +
                         kKeyMean * kHeadDim + T::Channel());
  float dots[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    dots[pass] = 0;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 pair = ToFloats(x[pass].pairs[i]);
      dots[pass] = fmaf(pair.x, k_mean[2 * i], dots[pass]);
      dots[pass] = fmaf(pair.y, k_mean[2 * i + 1], dots[pass]);
    }
  }
  const float dot = ReducePasses<T::kThreadsPerRow>(dots, [](float a, float b) { return a + b; });

  const auto find_largest = [&] {
    int bits[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) bits[pass] = LargestBits(x[pass]);
    return ReducePasses<T::kThreadsPerRow>(bits, [](int a, int b) { return max(a, b); });
  };
  int largest = find_largest();
  const bool bad = largest >= kInfBits;
  if (__any_sync(kAllLanes, bad)) {
    MakeFinite(x);
    largest = find_largest();
  }
  const float absmax = fmaxf(__int_as_float(largest), kAbsmaxFloor);
  const float inverse = __fdiv_rn(copysignf(kInt8Max, params.scale_log2), absmax);

  const int64_t first_index = head * static_cast<int64_t>(params.padded_q) + first;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const float inverse_of_pass =
        __shfl_sync(kAllLanes, inverse, pass * (T::kThreadsPerRow / kPasses), T::kThreadsPerRow);
    const int row = T::template RowOfPass<kQuery>(pass);
    if (first + row >= params.padded_q) continue;
    float values[kVector];
    ToFloats(values, x[pass]);
    *reinterpret_cast<uint2*>(params.q + (first_index + row) * kHeadDim + T::Channel()) =
        make_uint2(PackInt8(values[0], values[1], values[2], values[3], inverse_of_pass),
                   PackInt8(values[4], values[5], values[6], values[7], inverse_of_pass));
  }
  const int row = T::template RowOfPass<kQuery>(PassOfThread<T::kThreadsPerRow>());
  if (first + row < params.padded_q && threadIdx.x % (T::kThreadsPerRow / kPasses) == 0) {
    params.q_scale[first_index + row] = bad ? kNan : absmax * params.q_scale_factor;
    params.q_dot_mean[first_index + row] = dot * params.scale_log2;
  }
}

template <int kHeadDim>
struct SharedKey {
  static constexpr int kRowPairs = kThreads * kVector / kHeadDim / 2;
  static constexpr int kBlocks = kThreads * kVector * kPasses / kHeadDim / kBlockKv;
  float absmax[kBlocks][kRowPairs];
};

// A chunk of K: codes, and four scales for each 64 keys. Synchronizes once.
template <class T, int kHeadDim>
__device__ __forceinline__ void KeyCodesOfChunk(const QuantizeParams& params,
                                                const T& tokens, SharedKey<kHeadDim>& shared,
                                                int head, int first,
                                                const Vector<typename T::Element> (&x)[kPasses],
                                                const float (&mean)[kVector]) {
  constexpr int kPassesPerBlock = kBlockKv / T::kRows;
  // The rows of a pair have a scale in common, and are neighbours in a warp.
  const int pair = T::Row() / 2, scale_class = pair % kKeyScales;
#pragma unroll
  for (int block = 0; block < shared.kBlocks; ++block) {
    float absmax = 0;
#pragma unroll
    for (int i = 0; i < kPassesPerBlock; ++i) {
      const int pass = block * kPassesPerBlock + i;
      float values[kVector], row_absmax = 0;
      ToFloats(values, x[pass]);
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        row_absmax = fmaxf(row_absmax, fabsf(values[c] - mean[c]));
      }
      if (tokens.Counts(first + T::template RowOfPass<kKey>(pass))) {
        absmax = fmaxf(absmax, row_absmax);
      }
    }
    absmax = MaxAcross<2 * T::kThreadsPerRow>(absmax);
    if (threadIdx.x % (2 * T::kThreadsPerRow) == 0) shared.absmax[block][pair] = absmax;
  }
  __syncthreads();
#pragma unroll
  for (int block = 0; block < shared.kBlocks; ++block) {
    const int first_of_block = first + block * kBlockKv;
    if (first_of_block >= params.padded_kv) break;
    float absmax = kAbsmaxFloor;
#pragma unroll
    for (int p = 0; p < shared.kRowPairs; p += kKeyScales) {
      absmax = fmaxf(absmax, shared.absmax[block][p + scale_class]);
    }
    const float inverse = __fdiv_rn(kInt8Max, absmax);
#pragma unroll
    for (int i = 0; i < kPassesPerBlock; ++i) {
      const int pass = block * kPassesPerBlock + i;
      const int row = first + T::template RowOfPass<kKey>(pass);
      const float row_inverse = tokens.Counts(row) ? inverse : 0;
      float values[kVector];
      ToFloats(values, x[pass]);
#pragma unroll
      for (int c = 0; c < kVector; ++c) values[c] -= mean[c];
      const int64_t index = head * static_cast<int64_t>(params.padded_kv) + row;
      *reinterpret_cast<uint2*>(params.k + index * kHeadDim + T::Channel()) =
          make_uint2(PackInt8(values[0], values[1], values[2], values[3], row_inverse),
                     PackInt8(values[4], values[5], values[6], values[7], row_inverse));
    }
    if (T::Channel() == 0 && T::Row() % 2 == 0 && pair < kKeyScales) {
      const int64_t index = (head * static_cast<int64_t>(params.padded_kv) + first_of_block);
      params.k_scale[index / kBlockKv * kKeyScales + scale_class] = absmax * (1.0f / kInt8Max);
    }
  }
}

template <class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeKeyCodes(const QuantizeParams& params, const Plan& plan,
                                             SharedKey<kHeadDim>& shared, int head, int part) {
  using T = Tokens<In, kAccess, kHeadDim>;
  const int64_t begin = static_cast<int64_t>(part) * plan.tokens_per_part;
  const int64_t end = min(begin + plan.tokens_per_part, static_cast<int64_t>(params.padded_kv));
  if (begin >= end) return;
  const T tokens(params.key, head, params.kv_heads, params.length_kv, params.head_dim,
                 SeenBy(params, head));
  int first = static_cast<int>(begin);
  Vector<In> x[kPasses];
  tokens.template Load<kKey>(x, first);
  WaitForStatistics(params, head, kKey);
  float mean[kVector];
  LoadFloats(mean, params.channels + head * static_cast<int64_t>(kChannelRows * kHeadDim) +
                       kKeyMean * kHeadDim + T::Channel());
  const bool is_bad = __ldcg(params.first_bad + head * static_cast<int64_t>(kBadRows * kHeadDim) +
                             kBadKey * kHeadDim) != kNever;
#pragma unroll 1
  while (true) {
    if (is_bad) MakeFinite(x);
    KeyCodesOfChunk<T>(params, tokens, shared, head, first, x, mean);
    if (end - first <= T::kTokens) return;
    first += T::kTokens;
    tokens.template Load<kKey>(x, first);
    __syncthreads();  // all have read `shared`
  }
}

template <int kHeadDim>
struct SharedValue {
  static constexpr int kQuads = kThreads * kVector / kHeadDim;  // one for each row of threads
  alignas(16) uint32_t transposed[(kHeadDim + 1) * kQuads];
  int2 sums[kWarps][kHeadDim / 2];
  float2 mean[kHeadDim / 2];
  float2 down[kHeadDim / 2];
  float2 inverse[kHeadDim / 2];
};

// A chunk of V: codes, and of channel threadIdx.x their sum. Synchronizes once.
template <bool kFp8, class T, int kHeadDim>
__device__ __forceinline__ long long ValueCodesOfChunk(
    const QuantizeParams& params, const T& tokens, SharedValue<kHeadDim>& shared, int head,
    int first,
    const Vector<typename T::Element> (&x)[kPasses]) {
  constexpr int kQuads = SharedValue<kHeadDim>::kQuads;
  const int channel = T::Channel(), lane = threadIdx.x % 32;
  // Words of a channel are exchanged by its group's number: a warp writes to, and reads from, all
  // banks at once. Where a channel has 16 words, those of the upper half of the channels move by 16
  // more, into the next row: hence one row more.
  constexpr int kExchange = 32 / T::kThreadsPerRow;
  const int exchange = channel / kVector * kExchange;
  alignas(16) __half2 halves[kPasses][kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const int pair = channel / 2 + i;
    const float2 mean = shared.mean[pair], down = shared.down[pair];
    const float2 inverse = shared.inverse[pair];
    const auto scaled = [&](int pass) {
      const float2 value = ToFloats(x[pass].pairs[i]);
      return make_float2((value.x - mean.x) * down.x * inverse.x,
                         (value.y - mean.y) * down.y * inverse.y);
    };
    int2 sum = make_int2(0, 0);  // with other threads', of 16 codes up to 1.875 * 2^24: fits
    if constexpr (kFp8) {
      uint32_t is_key = 0;  // bytes of keys that exist
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        if (tokens.Counts(first + T::template RowOfPass<kValue>(pass))) is_key |= 0xffu << 8 * pass;
      }
      const float2 x0 = scaled(0), x1 = scaled(1), x2 = scaled(2), x3 = scaled(3);
      const auto put = [&](int c, float4 values) {
        __nv_fp8x4_e4m3 codes(values);
        codes.__x &= is_key;
        shared.transposed[c * kQuads + (T::Row() ^ exchange)] = codes.__x;
        const float4 rounded = static_cast<float4>(codes);
        // Multiples of 2^-9 up to 7.5: exact.
        return __float2int_rn((rounded.x + rounded.y + rounded.z + rounded.w) * (1 / kCodeUnit));
      };
      sum.x = put(2 * pair, make_float4(x0.x, x1.x, x2.x, x3.x));
      sum.y = put(2 * pair + 1, make_float4(x0.y, x1.y, x2.y, x3.y));
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const bool is_key = tokens.Counts(first + T::template RowOfPass<kValue>(pass));
        const float2 value = scaled(pass);
        halves[pass][i] = __floats2half2_rn(is_key ? value.x : 0, is_key ? value.y : 0);
        const float2 rounded = __half22float2(halves[pass][i]);
        sum.x += __float2int_rn(rounded.x * (1 / kCodeUnit));
        sum.y += __float2int_rn(rounded.y * (1 / kCodeUnit));
      }
    }
#pragma unroll
    for (int offset = T::kThreadsPerRow; offset < 32; offset *= 2) {
      sum.x += __shfl_xor_sync(kAllLanes, sum.x, offset);
      sum.y += __shfl_xor_sync(kAllLanes, sum.y, offset);
    }
    if (lane < T::kThreadsPerRow) shared.sums[threadIdx.x / 32][pair] = sum;
  }
  if constexpr (!kFp8) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = first + T::template RowOfPass<kValue>(pass);
      const int64_t index = head * static_cast<int64_t>(params.padded_kv) + row;
      if (row < params.padded_kv) {
        *reinterpret_cast<uint4*>(static_cast<__half*>(params.v) + index * kHeadDim + channel) =
            *reinterpret_cast<const uint4*>(halves[pass]);
      }
    }
  }
  __syncthreads();
  if constexpr (kFp8) {
    uint8_t* out = static_cast<uint8_t*>(params.v) +
                   head * static_cast<int64_t>(kHeadDim) * params.padded_kv + first;
#pragma unroll
    for (int i = threadIdx.x; i < kHeadDim * (kQuads / 4); i += kThreads) {
      const int row = i / (kQuads / 4), sixteen = i % (kQuads / 4);
      const int row_exchange = row / kVector * kExchange;
      uint4 words = *reinterpret_cast<const uint4*>(
          &shared.transposed[row * kQuads + (4 * sixteen ^ (row_exchange & ~3))]);
      static_assert(kExchange % 2 == 0 && kQuads >= 16);
      if (row_exchange & 2) words = make_uint4(words.z, words.w, words.x, words.y);
      if (first + 16 * sixteen < params.padded_kv) {
        *reinterpret_cast<uint4*>(out + row * static_cast<int64_t>(params.padded_kv) +
                                  16 * sixteen) = words;
      }
    }
  }
  long long total = 0;
  if (threadIdx.x < kHeadDim) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += (&shared.sums[warp][0].x)[threadIdx.x];
  }
  return total;
}

template <class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeValueCodes(const QuantizeParams& params, const Plan& plan,
                                               SharedValue<kHeadDim>& shared, int head, int part) {
  using T = Tokens<In, kAccess, kHeadDim>;
  const int64_t begin = static_cast<int64_t>(part) * plan.tokens_per_part;
  const int64_t end = min(begin + plan.tokens_per_part, static_cast<int64_t>(params.padded_kv));
  if (begin >= end) return;
  const T tokens(params.value, head, params.kv_heads, params.length_kv, params.head_dim,
                 SeenBy(params, head));
  int first = static_cast<int>(begin);
  Vector<In> x[kPasses];
  tokens.template Load<kValue>(x, first);
  WaitForStatistics(params, head, kValue);
  const int c = threadIdx.x;
  bool is_bad = false;
  if (c < kHeadDim) {
    const float* channels =
        params.channels + head * static_cast<int64_t>(kChannelRows * kHeadDim) + c;
    (&shared.mean[0].x)[c] = __ldcg(channels + kValueMean * kHeadDim);
    (&shared.down[0].x)[c] = __ldcg(channels + kValueDown * kHeadDim);
    (&shared.inverse[0].x)[c] = __ldcg(channels + kValueInverse * kHeadDim);
    is_bad = __ldcg(params.first_bad + head * static_cast<int64_t>(kBadRows * kHeadDim) +
                    kBadValue * kHeadDim + c) != kNever;
  }
  is_bad = __syncthreads_or(is_bad);
  long long total = 0;
#pragma unroll 1
  while (true) {
    if (is_bad) MakeFinite(x);
    total += params.fp8_value ? ValueCodesOfChunk<true, T>(params, tokens, shared, head, first, x)
                              : ValueCodesOfChunk<false, T>(params, tokens, shared, head, first, x);
    if (end - first <= T::kTokens) break;
    first += T::kTokens;
    tokens.template Load<kValue>(x, first);
    __syncthreads();  // all have read `shared`
  }
  if (params.smooth_v && c < kHeadDim) {
    // Integers: the order of the additions does not show.
    atomicAdd(reinterpret_cast<unsigned long long*>(params.value_code_sum) +
                  head * static_cast<int64_t>(kHeadDim) + c,
              static_cast<unsigned long long>(total));
  }
}

}  // namespace jax_sage::quantize
