// Codes and scales of Q and K, of streams that were started before the wait for the statistics.
#pragma once

#include <type_traits>

#include "quantize/quantize.h"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"

namespace jax_sage::quantize {

// Stores codes so that they leave L2 first: K and V are to stay there.
template <class X>
__device__ __forceinline__ void StoreCodes(void* to, const X& codes) {
  __stcs(static_cast<X*>(to), codes);
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
// Without their signs, numbers of 16 bits are in the order of their bits.
template <class In>
__device__ __forceinline__ int LargestBits(const Vector<In>& vector) {
  static_assert(kVector == 8);
  uint32_t x[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    x[i] = *reinterpret_cast<const uint32_t*>(&vector.pairs[i]) & 0x7fff7fffu;
  }
  const uint32_t largest = __vmaxu2(__vimax3_u16x2(x[0], x[1], x[2]), x[3]);
  return LargestBits(ToFloats(*reinterpret_cast<const Pair<In>*>(&largest)));
}

// K's means of the tokens of a chunk: one of all.
struct OneMean {
  static constexpr bool kBySlot = false;
  float mean[kVector];
  __device__ __forceinline__ void Next(int) {}
  __device__ __forceinline__ void Select(int) {}
  __device__ __forceinline__ float Mean(int i) const { return mean[i]; }
  __device__ __forceinline__ float Center(float x, int i) const { return x - mean[i]; }
};

template <class T>
__device__ __forceinline__ OneMean MeanOf(const QuantizeParams& params, int kv_head) {
  constexpr int kHeadDim = T::kThreadsPerRow * kVector;
  WaitForStatistics(params, kv_head, kKey);
  OneMean result;
  LoadFloats(result.mean, params.channels +
                              kv_head * static_cast<int64_t>(kChannelRows * kHeadDim) +
                              kKeyMean * kHeadDim + T::Channel());
  return result;
}

// A chunk of Q: codes, scales, and q·k̄ for lse.
template <class T, class Means>
__device__ __forceinline__ void QueryCodesOfChunk(const QuantizeParams& params, int head, int first,
                                                  Vector<typename T::Element> (&x)[kPasses],
                                                  Means& means) {
  constexpr int kHeadDim = T::kThreadsPerRow * kVector;
  constexpr int kInfBits = 0x7f800000;
  float dots[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    means.Select(pass);
    dots[pass] = 0;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 pair = ToFloats(x[pass].pairs[i]);
      dots[pass] = fmaf(pair.x, means.Mean(2 * i), dots[pass]);
      dots[pass] = fmaf(pair.y, means.Mean(2 * i + 1), dots[pass]);
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

  static_assert(kBlockQ % T::kTokens == 0);  // no chunk reaches past the end
  const int64_t first_index = head * static_cast<int64_t>(params.padded_q) + first;
  const int channels = CodeChannels<kHeadDim>(params);
  int8_t* out = params.q + (first_index + T::Row()) * channels + T::Channel();
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const float inverse_of_pass =
        __shfl_sync(kAllLanes, inverse, pass * (T::kThreadsPerRow / kPasses), T::kThreadsPerRow);
    float values[kVector];
    ToFloats(values, x[pass]);
    if (!HasCodes<kHeadDim>(params, T::Channel())) continue;
    StoreCodes(out + pass * T::kRows * channels,
               make_uint2(PackInt8(values[0], values[1], values[2], values[3], inverse_of_pass),
                          PackInt8(values[4], values[5], values[6], values[7], inverse_of_pass)));
  }
  const int row = T::template RowOfPass<kQuery>(PassOfThread<T::kThreadsPerRow>());
  if (threadIdx.x % (T::kThreadsPerRow / kPasses) == 0) {
    float scale = absmax * params.q_scale_factor;
    if constexpr (Means::kBySlot) scale *= means.SizeOf(first + row);
    params.q_scale[first_index + row] = bad ? kNan : scale;
    params.q_dot_mean[first_index + row] = dot * params.scale_log2;
  }
}

template <class In, int kHeadDim>
constexpr int kQueriesOfItem = kChunksOfQueries * Tokens<In, 0, kHeadDim>::kTokens;

// An item of Q: queries of one head.
struct QueryItem {
  int head, kv_head, begin, end;
};
template <class In, int kHeadDim>
__device__ __forceinline__ QueryItem QueryItemOf(const QuantizeParams& params, const Plan& plan,
                                                 int item) {
  constexpr int kQueries = kQueriesOfItem<In, kHeadDim>;
  const int head = item / plan.query_items, begin = item % plan.query_items * kQueries;
  return {head, head / plan.group, begin, min(begin + kQueries, params.padded_q)};
}
template <class T>
__device__ __forceinline__ T QueriesOf(const QuantizeParams& params, int head) {
  return {params.query, head, params.heads, params.length_q, params.head_dim, nullptr};
}
template <class T, class Means>
__device__ __forceinline__ void MakeQueryCodes(const QuantizeParams& params,
                                               Stream<kQuery, T>& stream, const QueryItem& item,
                                               Means& means) {
#pragma unroll 1
  for (int first = item.begin; first < item.end; first += T::kTokens) {
    Vector<typename T::Element> x[kPasses];
    stream.Next(x);
    means.Next(first);
    QueryCodesOfChunk<T>(params, item.head, first, x, means);
  }
}

template <int kHeadDim>
struct SharedKey {
  static constexpr int kRows = kThreads<kHeadDim> * kVector / kHeadDim;
  static constexpr int kBlocks = kRows * kPasses / kBlockKv;
  // The rows of a pair have a scale in common: they are neighbours in a warp, or in two.
  static constexpr int kRowsOfWarp = kHeadDim <= 128 ? 2 : 1;
  float absmax[kBlocks][kRows / kRowsOfWarp];
};

// A chunk of K: codes, and four scales for each 64 keys. Synchronizes once.
template <class T, class Means, int kHeadDim>
__device__ __forceinline__ void KeyCodesOfChunk(const QuantizeParams& params, const T& tokens,
                                                SharedKey<kHeadDim>& shared, int head, int first,
                                                const Vector<typename T::Element> (&x)[kPasses],
                                                Means& means) {
  constexpr int kPassesPerBlock = kBlockKv / T::kRows;
  constexpr int kRowsOfWarp = shared.kRowsOfWarp;
  const int pair = T::Row() / 2, scale_class = pair % kKeyScales;
  float values[kPasses][kVector];  // without their means
#pragma unroll
  for (int block = 0; block < shared.kBlocks; ++block) {
    float absmax = 0;  // or NaN
#pragma unroll
    for (int i = 0; i < kPassesPerBlock; ++i) {
      const int pass = block * kPassesPerBlock + i;
      means.Select(pass);
      ToFloats(values[pass], x[pass]);
      const int token = first + T::template RowOfPass<kKey>(pass);
      const bool counts = tokens.Counts(token);
      const auto find_absmax = [&] {
        float row_absmax = 0;
#pragma unroll
        for (float value : values[pass]) row_absmax = ptx::MaxOrNan(row_absmax, fabsf(value));
        return row_absmax;
      };
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        float& value = values[pass][c];
        value = means.Center(value, c);
      }
      float row_absmax = find_absmax();
      if (counts && !(row_absmax < kInf)) {  // rare: as if zeros were there
        atomicMin(params.first_bad + head * static_cast<int64_t>(kBadRows * kHeadDim) +
                      kBadKey * kHeadDim,
                  tokens.Position(token));
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          float& value = values[pass][c];
          if (!isfinite(value)) value = means.Center(0, c);
        }
        row_absmax = find_absmax();
      }
      if (counts) absmax = fmaxf(absmax, row_absmax);
    }
    absmax = MaxAcross<kRowsOfWarp * T::kThreadsPerRow>(absmax);
    if (threadIdx.x % (kRowsOfWarp * T::kThreadsPerRow) == 0) {
      shared.absmax[block][T::Row() / kRowsOfWarp] = absmax;
    }
  }
  __syncthreads();
  const int64_t first_index = head * static_cast<int64_t>(params.padded_kv) + first;
  const int channels = CodeChannels<kHeadDim>(params);
  int8_t* out = params.k + (first_index + T::Row()) * channels + T::Channel();
#pragma unroll
  for (int block = 0; block < shared.kBlocks; ++block) {
    if (first + block * kBlockKv >= params.padded_kv) break;
    float absmax = kAbsmaxFloor;
#pragma unroll
    for (int row = 0; row < shared.kRows; row += 2 * kKeyScales) {
#pragma unroll
      for (int i = 0; i < 2; i += kRowsOfWarp) {
        absmax = fmaxf(absmax, shared.absmax[block][(row + 2 * scale_class + i) / kRowsOfWarp]);
      }
    }
    const float inverse = __fdiv_rn(kInt8Max, absmax);
#pragma unroll
    for (int i = 0; i < kPassesPerBlock; ++i) {
      const int pass = block * kPassesPerBlock + i;
      const bool counts = tokens.Counts(first + T::template RowOfPass<kKey>(pass));
      const float (&v)[kVector] = values[pass];
      if (!HasCodes<kHeadDim>(params, T::Channel())) continue;
      const uint2 codes = make_uint2(PackInt8(v[0], v[1], v[2], v[3], inverse),
                                     PackInt8(v[4], v[5], v[6], v[7], inverse));
      StoreCodes(out + pass * T::kRows * channels, counts ? codes : make_uint2(0, 0));
    }
    if (T::Channel() == 0 && T::Row() % 2 == 0 && pair < kKeyScales) {
      params.k_scale[(first_index / kBlockKv + block) * kKeyScales + scale_class] =
          absmax * (1.0f / kInt8Max);
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void StoreZeros(void* to, int64_t bytes) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < bytes / 16; i += kThreads<kHeadDim>) {
    static_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
  }
}

// The codes and scales of `count` keys of which none counts, a multiple of kBlockKv.
template <int kHeadDim>
__device__ __forceinline__ void ZeroKeyCodes(const QuantizeParams& params, int head, int first,
                                             int count) {
  const int64_t index = head * static_cast<int64_t>(params.padded_kv) + first;
  const int channels = CodeChannels<kHeadDim>(params);
  StoreZeros<kHeadDim>(params.k + index * channels, int64_t{count} * channels);
  for (int i = threadIdx.x; i < count / kBlockKv * kKeyScales; i += kThreads<kHeadDim>) {
    params.k_scale[index / kBlockKv * kKeyScales + i] = kAbsmaxFloor * (1.0f / kInt8Max);
  }
}

// Of a stream of the tokens `begin` to `end` - 1.
template <class T, class Means, int kHeadDim>
__device__ __forceinline__ void MakeKeyCodes(const QuantizeParams& params,
                                             SharedKey<kHeadDim>& shared, const T& tokens,
                                             Stream<kKey, T>& stream, int head, int begin, int end,
                                             Means& means) {
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
    Vector<typename T::Element> x[kPasses];
    stream.Next(x);
    if (ChunkCounts<kKey>(tokens, first)) {  // and all have read `shared`
      means.Next(first);
      KeyCodesOfChunk<T>(params, tokens, shared, head, first, x, means);
    } else {
      ZeroKeyCodes<kHeadDim>(params, head, first, min(end - first, T::kTokens));
    }
  }
}

}  // namespace jax_sage::quantize
