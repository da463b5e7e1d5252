// Codes and scales of Q, K and V, of streams that were started before the wait for the statistics.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "quantize/quantize.h"
#include "quantize/slots.cuh"
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
  __device__ __forceinline__ float Center(float x, int i) const { return x - mean[i]; }
};

template <class T, Tensor kTensor>
__device__ __forceinline__ OneMean MeansOf(const QuantizeParams& params, int kv_head) {
  constexpr int kHeadDim = T::kThreadsPerRow * kVector;
  WaitForStatistics(params, kv_head, kKey);
  OneMean result;
  LoadFloats(result.mean, params.channels +
                              kv_head * static_cast<int64_t>(kChannelRows * kHeadDim) +
                              kKeyMean * kHeadDim + T::Channel());
  return result;
}
template <class T, Tensor kTensor>
__device__ __forceinline__ SlotMeans<T, kTensor> MeansOf(const SegmentedParams& params,
                                                         int kv_head) {
  return {params, kv_head};
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
      dots[pass] = fmaf(pair.x, means.mean[2 * i], dots[pass]);
      dots[pass] = fmaf(pair.y, means.mean[2 * i + 1], dots[pass]);
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
  int8_t* out = params.q + (first_index + T::Row()) * kHeadDim + T::Channel();
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const float inverse_of_pass =
        __shfl_sync(kAllLanes, inverse, pass * (T::kThreadsPerRow / kPasses), T::kThreadsPerRow);
    float values[kVector];
    ToFloats(values, x[pass]);
    StoreCodes(out + pass * T::kRows * kHeadDim,
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
constexpr int kQueriesOfItem = 4 * Tokens<In, 0, kHeadDim>::kTokens;

template <class In, int kAccess, int kHeadDim, class Params>
__device__ __forceinline__ void MakeQueryCodes(const Params& params, Ring<In, kHeadDim>& ring,
                                               int item) {
  using T = Tokens<In, kAccess, kHeadDim>;
  constexpr int kQueries = kQueriesOfItem<In, kHeadDim>;
  const int items_of_head = (params.padded_q + kQueries - 1) / kQueries;
  const int head = item / items_of_head, begin = item % items_of_head * kQueries;
  const int end = min(begin + kQueries, params.padded_q);
  const T tokens(params.query, head, params.heads, params.length_q, params.head_dim, nullptr);
  Stream<kQuery, T> stream(tokens, ring, begin, end, true);
  auto means = MeansOf<T, kQuery>(params, head / (params.heads / params.kv_heads));
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
    Vector<In> x[kPasses];
    stream.Next(x);
    means.Next(first);
    QueryCodesOfChunk<T>(params, head, first, x, means);
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
    float absmax = 0;
#pragma unroll
    for (int i = 0; i < kPassesPerBlock; ++i) {
      const int pass = block * kPassesPerBlock + i;
      means.Select(pass);
      ToFloats(values[pass], x[pass]);
      const bool counts = tokens.Counts(first + T::template RowOfPass<kKey>(pass));
      float row_absmax = 0;
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        float& value = values[pass][c];
        value = means.Center(value, c);
        // By the size of a segment that it does not count in it may have become infinite.
        if (Means::kBySlot && !counts) value = 0;
        row_absmax = fmaxf(row_absmax, fabsf(value));
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
  int8_t* out = params.k + (first_index + T::Row()) * kHeadDim + T::Channel();
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
      const float row_inverse = counts ? inverse : 0;
      const float (&v)[kVector] = values[pass];
      StoreCodes(out + pass * T::kRows * kHeadDim,
                 make_uint2(PackInt8(v[0], v[1], v[2], v[3], row_inverse),
                            PackInt8(v[4], v[5], v[6], v[7], row_inverse)));
    }
    if (T::Channel() == 0 && T::Row() % 2 == 0 && pair < kKeyScales) {
      params.k_scale[(first_index / kBlockKv + block) * kKeyScales + scale_class] =
          absmax * (1.0f / kInt8Max);
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void StoreZeros(void* to, int bytes) {
#pragma unroll 1
  for (int i = threadIdx.x; i < bytes / 16; i += kThreads<kHeadDim>) {
    static_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
  }
}

// The codes and scales of `count` keys of which none counts, a multiple of kBlockKv.
template <int kHeadDim>
__device__ __forceinline__ void ZeroKeyCodes(const QuantizeParams& params, int head, int first,
                                             int count) {
  const int64_t index = head * static_cast<int64_t>(params.padded_kv) + first;
  StoreZeros<kHeadDim>(params.k + index * kHeadDim, count * kHeadDim);
  if (threadIdx.x < count / kBlockKv * kKeyScales) {
    params.k_scale[index / kBlockKv * kKeyScales + threadIdx.x] = kAbsmaxFloor * (1.0f / kInt8Max);
  }
}

// Of a stream of the tokens `begin` to `end` - 1.
template <class T, class Params, int kHeadDim>
__device__ __forceinline__ void MakeKeyCodes(const Params& params, SharedKey<kHeadDim>& shared,
                                             const T& tokens, Stream<kKey, T>& stream, int head,
                                             int begin, int end) {
  auto means = MeansOf<T, kKey>(params, head);
  const bool is_bad = __ldcg(params.first_bad + head * static_cast<int64_t>(kBadRows * kHeadDim) +
                             kBadKey * kHeadDim) != kNever;
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
    Vector<typename T::Element> x[kPasses];
    stream.Next(x);
    if (ChunkCounts<kKey>(tokens, first)) {  // and all have read `shared`
      if (is_bad) MakeFinite(x);
      means.Next(first);
      KeyCodesOfChunk<T>(params, tokens, shared, head, first, x, means);
    } else {
      ZeroKeyCodes<kHeadDim>(params, head, first, min(end - first, T::kTokens));
    }
  }
}

template <int kHeadDim>
struct SharedValue {
  static constexpr int kQuads = kThreads<kHeadDim> * kVector / kHeadDim;  // one a row of threads
  union {
    alignas(16) uint32_t transposed[(kHeadDim + 1) * kQuads];  // FP8
    int2 sums[kWarps<kHeadDim>][kHeadDim / 2];                 // FP16
  };
  float2 mean[kHeadDim / 2];
  float2 inverse[kHeadDim / 2];
};

// Where a thread's four codes of one of its channels are in SharedValue::transposed. Words of a
// channel are exchanged by its group's number: a warp writes to, and reads from, all banks at once.
// Where a channel has 16 words, those of the upper half of the channels move by 16 more, into the
// next row: hence one row more.
template <class T>
constexpr int kExchange = 32 / T::kThreadsPerRow;
template <class T>
__device__ __forceinline__ int WordOf(int channel) {
  return channel * T::kRows + (T::Row() ^ T::Channel() / kVector * kExchange<T>);
}

// Where codes are stored a thread has two channels, and a group of threads the same.
constexpr int kChannelsOfStore = kVector / 4;
template <int kHeadDim>
constexpr int kThreadsOfChannel = SharedValue<kHeadDim>::kQuads / 4;
template <int kHeadDim>
__device__ __forceinline__ int ChannelOfStore(int i) {
  return (i * kThreads<kHeadDim> + threadIdx.x) / kThreadsOfChannel<kHeadDim>;
}

// 1 / kCodeUnit times the sum of sixteen E4M3 codes up to kVMax: multiples of 2^-9.
__device__ __forceinline__ int SumOfCodes(const uint4& words) {
  const auto sum = [](uint32_t word) {
    const auto halves = [](uint32_t pair) {
      return __half2(
          __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
    };
    // The sum of two is exact in FP16, of more in FP32.
    const float2 x = __half22float2(__hadd2(halves(word & 0xffff), halves(word >> 16)));
    return x.x + x.y;
  };
  const float sum_of_all = (sum(words.x) + sum(words.y)) + (sum(words.z) + sum(words.w));
  return __float2int_rn(sum_of_all * (1 / kCodeUnit));
}

// The codes of a chunk of V in FP8. Calls add(i, sum) for a thread's sixteen codes of the channel
// ChannelOfStore(i).
template <class T, int kHeadDim, class Add>
__device__ __forceinline__ void StoreTransposed(const QuantizeParams& params,
                                                const SharedValue<kHeadDim>& shared, int head,
                                                int first, Add add) {
  constexpr int kQuads = SharedValue<kHeadDim>::kQuads;
  uint8_t* out = static_cast<uint8_t*>(params.v) +
                 head * static_cast<int64_t>(kHeadDim) * params.padded_kv + first;
  const int sixteen = threadIdx.x % kThreadsOfChannel<kHeadDim>;
#pragma unroll
  for (int i = 0; i < kChannelsOfStore; ++i) {
    const int row = ChannelOfStore<kHeadDim>(i);
    const int row_exchange = row / kVector * kExchange<T>;
    uint4 words = *reinterpret_cast<const uint4*>(
        &shared.transposed[row * kQuads + (4 * sixteen ^ (row_exchange & ~3))]);
    static_assert(kQuads >= 16);
    if (row_exchange & 2) words = make_uint4(words.z, words.w, words.x, words.y);
    if (kExchange<T> % 2 != 0 && row_exchange & 1) {
      words = make_uint4(words.y, words.x, words.w, words.z);
    }
    add(i, SumOfCodes(words));
    if (first + 16 * sixteen < params.padded_kv) {
      StoreCodes(out + row * static_cast<int64_t>(params.padded_kv) + 16 * sixteen, words);
    }
  }
}

// The sums of the codes that a thread has seen, of one of its channels each.
template <bool kFp8, int kHeadDim>
class CodeSums {
 public:
  __device__ __forceinline__ void Add(int i, int sum) { sums_[i] += sum; }
  // Calls add(channel, sum) for all of the CTA, and begins again.
  template <class AddTo>
  __device__ __forceinline__ void Flush(AddTo add) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      long long sum = sums_[i];
      sums_[i] = 0;
      if constexpr (kFp8) {
        constexpr int kGroup = kThreadsOfChannel<kHeadDim>;
#pragma unroll
        for (int offset = 1; offset < kGroup; offset *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        }
        if (threadIdx.x % kGroup == 0) add(ChannelOfStore<kHeadDim>(i), sum);
      } else if (threadIdx.x < kHeadDim) {
        add(threadIdx.x, sum);
      }
    }
  }

 private:
  static constexpr int kCount = kFp8 ? kChannelsOfStore : 1;
  long long sums_[kCount] = {};
};

// A chunk of V: codes and their sums. Synchronizes once.
template <bool kFp8, class T, int kHeadDim>
__device__ __forceinline__ void ValueCodesOfChunk(const QuantizeParams& params, const T& tokens,
                                                  SharedValue<kHeadDim>& shared, int head,
                                                  int first,
                                                  const Vector<typename T::Element> (&x)[kPasses],
                                                  CodeSums<kFp8, kHeadDim>& sums) {
  const int channel = T::Channel(), lane = threadIdx.x % 32;
  alignas(16) __half2 halves[kPasses][kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const int pair = channel / 2 + i;
    const float2 mean = shared.mean[pair], inverse = shared.inverse[pair];
    const auto scaled = [&](int pass) {
      const float2 value = ToFloats(x[pass].pairs[i]);
      return make_float2((value.x - mean.x) * inverse.x, (value.y - mean.y) * inverse.y);
    };
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
        shared.transposed[WordOf<T>(c)] = codes.__x;
      };
      put(2 * pair, make_float4(x0.x, x1.x, x2.x, x3.x));
      put(2 * pair + 1, make_float4(x0.y, x1.y, x2.y, x3.y));
    } else {
      int2 sum = make_int2(0, 0);  // with other threads', of 16 codes up to 1.875 * 2^24: fits
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const bool is_key = tokens.Counts(first + T::template RowOfPass<kValue>(pass));
        const float2 value = scaled(pass);
        halves[pass][i] = __floats2half2_rn(is_key ? value.x : 0, is_key ? value.y : 0);
        const float2 rounded = __half22float2(halves[pass][i]);
        sum.x += __float2int_rn(rounded.x * (1 / kCodeUnit));
        sum.y += __float2int_rn(rounded.y * (1 / kCodeUnit));
      }
#pragma unroll
      for (int offset = T::kThreadsPerRow; offset < 32; offset *= 2) {
        sum.x += __shfl_xor_sync(kAllLanes, sum.x, offset);
        sum.y += __shfl_xor_sync(kAllLanes, sum.y, offset);
      }
      if (lane < T::kThreadsPerRow) shared.sums[threadIdx.x / 32][pair] = sum;
    }
  }
  if constexpr (!kFp8) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = first + T::template RowOfPass<kValue>(pass);
      const int64_t index = head * static_cast<int64_t>(params.padded_kv) + row;
      if (row < params.padded_kv) {
        StoreCodes(static_cast<__half*>(params.v) + index * kHeadDim + channel,
                   *reinterpret_cast<const uint4*>(halves[pass]));
      }
    }
  }
  __syncthreads();
  if constexpr (kFp8) {
    StoreTransposed<T>(params, shared, head, first, [&](int i, int sum) { sums.Add(i, sum); });
  } else if (threadIdx.x < kHeadDim) {
#pragma unroll
    for (int warp = 0; warp < kWarps<kHeadDim>; ++warp) {
      sums.Add(0, (&shared.sums[warp][0].x)[threadIdx.x]);
    }
  }
}

// A chunk of V with tokens of several segments: codes, and their sums. Rare where segments are
// contiguous, and so a token of each thread at a time. Synchronizes once.
template <bool kFp8, class T, int kHeadDim>
__device__ __forceinline__ void MixedValueCodesOfChunk(const QuantizeParams& params,
                                                       const T& tokens,
                                                       SharedValue<kHeadDim>& shared, int head,
                                                       int first, const SlotValues<T>& values) {
  const auto integer = [](float code) { return __float2int_rn(code * (1 / kCodeUnit)); };
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int token = first + T::template RowOfPass<kValue>(pass);
    if (token >= params.padded_kv) continue;
    const bool is_key = tokens.Counts(token);
    const int slot = values.SlotOf(token);
    Vector<typename T::Element> x = tokens.Load(token);
    MakeFinite(x);
    alignas(16) __half2 halves[kVector / 2];
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const int channel = T::Channel() + 2 * i;
      float2 rounded = values.Load(slot, channel / 2).Scale(ToFloats(x.pairs[i]));
      if (!is_key) rounded = make_float2(0, 0);
      if constexpr (kFp8) {
        const __nv_fp8x2_e4m3 codes(rounded);
        rounded = static_cast<float2>(codes);
        uint8_t* words = reinterpret_cast<uint8_t*>(shared.transposed) + pass;
        words[4 * WordOf<T>(channel)] = codes.__x & 0xff;
        words[4 * WordOf<T>(channel + 1)] = codes.__x >> 8;
      } else {
        halves[i] = __float22half2_rn(rounded);
        rounded = __half22float2(halves[i]);
      }
      values.AddSum(slot, channel, integer(rounded.x));
      values.AddSum(slot, channel + 1, integer(rounded.y));
    }
    if constexpr (!kFp8) {
      const int64_t index = head * static_cast<int64_t>(params.padded_kv) + token;
      *reinterpret_cast<uint4*>(static_cast<__half*>(params.v) + index * kHeadDim + T::Channel()) =
          *reinterpret_cast<const uint4*>(halves);
    }
  }
  __syncthreads();
  if constexpr (kFp8) StoreTransposed<T>(params, shared, head, first, [](int, int) {});
}

// Whether V, or K, has something that is not finite in a channel of V.
template <int kHeadDim>
__device__ __forceinline__ bool IsBad(const QuantizeParams& params, int head, int channel) {
  return __ldcg(params.first_bad + head * static_cast<int64_t>(kBadRows * kHeadDim) +
                kBadValue * kHeadDim + channel) != kNever;
}

// The codes of V of such keys.
template <int kHeadDim>
__device__ __forceinline__ void ZeroValueCodes(const QuantizeParams& params, int head, int first,
                                               int count) {
  const int64_t index = head * static_cast<int64_t>(params.padded_kv);
  if (!params.fp8_value) {
    StoreZeros<kHeadDim>(static_cast<__half*>(params.v) + (index + first) * kHeadDim,
                         count * (kHeadDim * static_cast<int>(sizeof(__half))));
    return;
  }
  constexpr int kWords = kBlockKv / 16;  // of a channel
#pragma unroll 1
  for (; count > 0; count -= kBlockKv, first += kBlockKv) {
    uint8_t* out = static_cast<uint8_t*>(params.v) + index * kHeadDim + first;
#pragma unroll 1
    for (int i = threadIdx.x; i < kHeadDim * kWords; i += kThreads<kHeadDim>) {
      const int64_t channel = i / kWords;
      reinterpret_cast<uint4*>(out + channel * params.padded_kv)[i % kWords] =
          make_uint4(0, 0, 0, 0);
    }
  }
}

// Of a stream of the tokens `begin` to `end` - 1.
template <bool kFp8, class T, int kHeadDim>
__device__ __forceinline__ void MakeValueCodes(const QuantizeParams& params,
                                               SharedValue<kHeadDim>& shared, const T& tokens,
                                               Stream<kValue, T>& stream, int head, int begin,
                                               int end) {
  const int c = threadIdx.x;
  WaitForStatistics(params, head, kValue);
  bool is_bad = false;
  if (c < kHeadDim) {
    const float* channels =
        params.channels + head * static_cast<int64_t>(kChannelRows * kHeadDim) + c;
    (&shared.mean[0].x)[c] = __ldcg(channels + kValueMean * kHeadDim);
    (&shared.inverse[0].x)[c] = __ldcg(channels + kValueInverse * kHeadDim);
    is_bad = IsBad<kHeadDim>(params, head, c);
  }
  is_bad = __syncthreads_or(is_bad);
  CodeSums<kFp8, kHeadDim> sums;
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
    Vector<typename T::Element> x[kPasses];
    stream.Next(x);
    if (ChunkCounts<kValue>(tokens, first)) {  // and all have read `shared`
      if (is_bad) MakeFinite(x);
      ValueCodesOfChunk<kFp8, T>(params, tokens, shared, head, first, x, sums);
    } else {
      ZeroValueCodes<kHeadDim>(params, head, first, min(end - first, T::kTokens));
    }
  }
  if (!params.smooth_v) return;
  sums.Flush([&](int channel, long long sum) {
    // Integers: the order of the additions does not show.
    atomicAdd(reinterpret_cast<unsigned long long*>(params.value_code_sum) +
                  head * static_cast<int64_t>(kHeadDim) + channel,
              static_cast<unsigned long long>(sum));
  });
}

// The same with segments.
template <bool kFp8, class T, int kHeadDim>
__device__ __forceinline__ void MakeValueCodes(const SegmentedParams& params,
                                               SharedValue<kHeadDim>& shared, const T& tokens,
                                               Stream<kValue, T>& stream, int head, int begin,
                                               int end) {
  const int c = threadIdx.x;
  const bool is_bad = __syncthreads_or(c < kHeadDim && IsBad<kHeadDim>(params, head, c));
  const SlotValues<T> values(params, head);
  CodeSums<kFp8, kHeadDim> sums;
  int shared_slot = -1;  // of what is in `shared`, and of the sums
  const auto flush = [&] {
    if (shared_slot < 0) return;
    sums.Flush([&](int channel, long long sum) { values.AddSum(shared_slot, channel, sum); });
  };
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
    Vector<typename T::Element> x[kPasses];
    stream.Next(x);
    const int slot = values.SlotOfChunk(first);  // all have read `shared`
    if (slot < 0) {
      MixedValueCodesOfChunk<kFp8, T>(params, tokens, shared, head, first, values);
      continue;
    }
    if (slot != shared_slot) {
      flush();
      shared_slot = slot;
      if (c < kHeadDim / 2) {
        const ValuePair pair = values.Load(slot, c);
        shared.mean[c] = pair.mean;
        shared.inverse[c] = pair.inverse;
      }
      __syncthreads();
    }
    if (is_bad) MakeFinite(x);
    ValueCodesOfChunk<kFp8, T>(params, tokens, shared, head, first, x, sums);
  }
  flush();
}

}  // namespace jax_sage::quantize
