// Codes of V and their sums, of streams that were started before the wait for the statistics.
#pragma once

#include <cuda_fp8.h>

#include "quantize/codes.cuh"
#include "quantize/quantize.h"
#include "quantize/slots.cuh"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"

namespace jax_sage::quantize {

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
  const int channels = CodeChannels<kHeadDim>(params);
  uint8_t* out = static_cast<uint8_t*>(params.v) +
                 head * static_cast<int64_t>(channels) * params.padded_kv + first;
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
    if (HasCodes<kHeadDim>(params, row) && first + 16 * sixteen < params.padded_kv) {
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
  const int channels = CodeChannels<kHeadDim>(params);
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
      if (HasCodes<kHeadDim>(params, channel) && row < params.padded_kv) {
        StoreCodes(static_cast<__half*>(params.v) + index * channels + channel,
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
      const int channels = CodeChannels<kHeadDim>(params);
      if (HasCodes<kHeadDim>(params, T::Channel())) {
        *reinterpret_cast<uint4*>(static_cast<__half*>(params.v) + index * channels +
                                  T::Channel()) = *reinterpret_cast<const uint4*>(halves);
      }
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
  const int channels = CodeChannels<kHeadDim>(params);
  if (!params.fp8_value) {
    StoreZeros<kHeadDim>(static_cast<__half*>(params.v) + (index + first) * channels,
                         int64_t{count} * channels * static_cast<int>(sizeof(__half)));
    return;
  }
  uint8_t* out = static_cast<uint8_t*>(params.v) + index * channels + first;
  constexpr int kThreadsOfChannel = 16;
#pragma unroll 1
  for (int channel = threadIdx.x / kThreadsOfChannel; channel < channels;
       channel += kThreads<kHeadDim> / kThreadsOfChannel) {
#pragma unroll 1
    for (int i = threadIdx.x % kThreadsOfChannel; i < count / 16; i += kThreadsOfChannel) {
      reinterpret_cast<uint4*>(out + channel * static_cast<int64_t>(params.padded_kv))[i] =
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
  WaitForStatistics(params, head, kValue);
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
