// Statistics of the channels of K and V: of a part of the keys, and of all of them by the CTA that
// is the last to finish a part. Those that need them wait here.
#pragma once

#include <cuda/atomic>

#include "quantize/quantize.h"
#include "quantize/tokens.cuh"

namespace jax_sage::quantize {

enum PartialRow : int {
  kSumK,
  kCountK,
  kSumV,
  kBadV,
  kMaxV,
  kMinV,
  // With segments:
  kMaxK = kCountK,
  kMinK = kBadV,
};

template <int kHeadDim>
struct SharedStatistics {
  static constexpr int kRows = kThreads<kHeadDim> * kVector / kHeadDim;
  alignas(16) float x[kRows][kHeadDim];  // sums, maxima, minima by turns
  int bad[kHeadDim];                     // first positions of V that are not finite
  int count;                             // samples of K that count
  bool is_last;
};

using Arrivals = cuda::atomic_ref<int32_t, cuda::thread_scope_device>;

// For so many of a unit.
__device__ __forceinline__ void WaitForArrivals(const QuantizeParams& params, int head,
                                                Tensor tensor, int count) {
  if (threadIdx.x == 0) {
    const Arrivals arrivals(params.arrivals[2 * static_cast<int64_t>(head) + tensor]);
    while (arrivals.load(cuda::memory_order_acquire) != count) __nanosleep(100);
  }
  __syncthreads();
}
// The parts of a unit arrive, and then the CTA that put them together.
__device__ __forceinline__ void WaitForStatistics(const QuantizeParams& params, int head,
                                                  Tensor tensor) {
  WaitForArrivals(params, head, tensor, params.parts + 1);
}
// Each part puts together what it is the last of.
__device__ __forceinline__ void WaitForStatistics(const SegmentedParams& params, int head,
                                                  Tensor tensor) {
  WaitForArrivals(params, head, tensor, params.parts);
}

// Which keys of a head are seen, or null.
__device__ __forceinline__ const uint8_t* SeenBy(const QuantizeParams& params, int head) {
  if (params.seen == nullptr) return nullptr;
  return params.seen + head / params.kv_heads * params.seen_batch_stride +
         head % params.kv_heads * params.seen_head_stride;
}

// K or V of a head.
template <Tensor kTensor, class T>
__device__ __forceinline__ T TokensOf(const QuantizeParams& params, int head) {
  return T(kTensor == kKey ? params.key : params.value, head, params.kv_heads, params.length_kv,
           params.head_dim, T::kHasUnseen ? SeenBy(params, head) : nullptr);
}

// Of kVector channels of the tokens, or parts, that a thread has seen.
struct Statistics {
  float sum[kVector];
  float max[kVector];
  float min[kVector];
  __device__ Statistics() {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sum[i] = 0;
      max[i] = -kInf;
      min[i] = kInf;
    }
  }
  __device__ __forceinline__ void AddSums(const float (&x)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += x[i];
  }
  __device__ __forceinline__ void AddExtrema(const float (&high)[kVector],
                                             const float (&low)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      max[i] = fmaxf(max[i], high[i]);
      min[i] = fminf(min[i], low[i]);
    }
  }
};

// Which tokens need their extrema too: V's for its scales, K's of a segment for its size.
template <Tensor kTensor, class T>
constexpr bool kWithExtrema = kTensor == kValue || T::kHasExtrema;

// The same while tokens are added: maxima and minima stay in the type of the input.
template <bool kExtrema, class In>
class RunningStatistics {
 public:
  __device__ __forceinline__ RunningStatistics() {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      max_[i] = FromFloats<Pair<In>>(make_float2(-kInf, -kInf));
      min_[i] = FromFloats<Pair<In>>(make_float2(kInf, kInf));
    }
  }
  __device__ __forceinline__ void Add(const Vector<In>& vector) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 pair = ToFloats(vector.pairs[i]);
      sum_[2 * i] += pair.x;
      sum_[2 * i + 1] += pair.y;
      if (kExtrema) {
        max_[i] = Max(max_[i], vector.pairs[i]);
        min_[i] = Min(min_[i], vector.pairs[i]);
      }
    }
  }
  // Whether all that was added is finite, and the sums too.
  __device__ __forceinline__ bool IsFinite() const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += fabsf(sum_[i]);
    return isfinite(total);
  }
  __device__ __forceinline__ Statistics Get() const {
    Statistics result;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 high = ToFloats(max_[i]), low = ToFloats(min_[i]);
      result.sum[2 * i] = sum_[2 * i], result.sum[2 * i + 1] = sum_[2 * i + 1];
      result.max[2 * i] = high.x, result.max[2 * i + 1] = high.y;
      result.min[2 * i] = low.x, result.min[2 * i + 1] = low.y;
    }
    return result;
  }

 private:
  float sum_[kVector] = {};
  Pair<In> max_[kVector / 2];
  Pair<In> min_[kVector / 2];
};

// What is not finite shows in the sums. Rare: then again, with care.
template <Tensor kTensor, bool kExtrema, class T, class In>
__device__ __forceinline__ void Mend(RunningStatistics<kExtrema, In>& statistics, const T& tokens,
                                     int begin, int end, int* bad) {
  if (statistics.IsFinite()) return;
  statistics = RunningStatistics<kExtrema, In>();
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int token = first + T::template RowOfPass<kTensor>(pass);
      if (token >= end || !tokens.Counts(token)) continue;
      Vector<In> vector = tokens.Load(token);
      float x[kVector];
      ToFloats(x, vector);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (kTensor == kKey || isfinite(x[i])) continue;  // K's are found when codes are made
        atomicMin(&bad[T::Channel() + i], tokens.Position(token));
      }
      MakeFinite(vector);
      statistics.Add(vector);
    }
  }
}

// Of the tokens of a stream, `begin` to `end` - 1.
template <Tensor kTensor, class T>
__device__ __forceinline__ Statistics StatisticsOf(const T& tokens, Stream<kTensor, T>& stream,
                                                   int begin, int end, int* bad) {
  using In = typename T::Element;
  RunningStatistics<kWithExtrema<kTensor, T>, In> statistics;
#pragma unroll 1
  for (int first = begin; first < end; first += T::kTokens) {
    Vector<In> x[kPasses];
    stream.Next(x);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (tokens.Counts(first + T::template RowOfPass<kTensor>(pass))) statistics.Add(x[pass]);
    }
  }
  Mend<kTensor>(statistics, tokens, begin, end, bad);
  return statistics.Get();
}

// Of one channel in all that the CTA has seen: thread c gets channel c.
struct ChannelStatistics {
  float sum = 0;
  float max = -kInf;
  float min = kInf;
};

// Always adds in the same order.
template <bool kExtrema, int kHeadDim>
__device__ __forceinline__ ChannelStatistics Combine(SharedStatistics<kHeadDim>& shared,
                                                     const Statistics& of_thread) {
  constexpr int kThreadsPerRow = kHeadDim / kVector;
  const int row = threadIdx.x / kThreadsPerRow, channel = threadIdx.x % kThreadsPerRow * kVector;
  ChannelStatistics result;
  const int c = threadIdx.x;
#pragma unroll
  for (int kind = 0; kind < (kExtrema ? 3 : 1); ++kind) {
    if (kind > 0) __syncthreads();  // all have read
    StoreFloats(&shared.x[row][channel], kind == 0   ? of_thread.sum
                                         : kind == 1 ? of_thread.max
                                                     : of_thread.min);
    __syncthreads();
    if (c >= kHeadDim) continue;
#pragma unroll 8
    for (int r = 0; r < shared.kRows; ++r) {
      const float x = shared.x[r][c];
      if (kind == 0) result.sum += x;
      if (kind == 1) result.max = fmaxf(result.max, x);
      if (kind == 2) result.min = fminf(result.min, x);
    }
  }
  return result;
}

// Reads rows of the partial statistics of the parts `begin` to `end` - 1, which begin at
// `partials(part)`: all rows of a part at once, as each is a way to L2. Each thread calls add(x)
// with kVector channels of these rows for some of the parts.
template <int kHeadDim, class Partials, int kCount, class Add>
__device__ __forceinline__ void Gather(Partials partials, int begin, int end,
                                       const PartialRow (&rows)[kCount], Add add) {
  constexpr int kThreadsPerRow = kHeadDim / kVector;
  const int channel = threadIdx.x % kThreadsPerRow * kVector;
#pragma unroll 1
  for (int part = begin + threadIdx.x / kThreadsPerRow; part < end;
       part += SharedStatistics<kHeadDim>::kRows) {
    const float* of_part = partials(part) + channel;
    float x[kCount][kVector];
#pragma unroll
    for (int row = 0; row < kCount; ++row) LoadFloats(x[row], of_part + rows[row] * kHeadDim);
    add(x);
  }
}

// 0 where the mean is too large to be subtracted without overflow.
__device__ __forceinline__ float UsableMean(float sum, float per_token) {
  const float mean = sum * per_token;
  return fabsf(mean) <= kMeanMax ? mean : 0.0f;
}

__device__ __forceinline__ float KeyMean(const QuantizeParams& params, float per_token,
                                         const ChannelStatistics& all) {
  const float mean = params.smooth_k ? UsableMean(all.sum, per_token) : 0;
  return __bfloat162float(__float2bfloat16_rn(mean));
}

// The largest magnitude after a mean was taken off, exactly: subtraction rounds monotonously.
__device__ __forceinline__ float AbsmaxFrom(float mean, const ChannelStatistics& all) {
  return fmaxf(fmaxf(all.max - mean, mean - all.min), kAbsmaxFloor);
}

struct ValueChannel {
  float average, mean, absmax, scale, inverse;
  __device__ __forceinline__ ValueChannel(const QuantizeParams& params, float per_token,
                                          const ChannelStatistics& all) {
    average = params.smooth_v ? UsableMean(all.sum, per_token) : 0;
    mean = Round(average);
    absmax = AbsmaxFrom(mean, all);
    Scale();
  }
  __device__ __forceinline__ ValueChannel(float average, float absmax)
      : average(average), mean(Round(average)), absmax(absmax) {
    Scale();
  }
  __device__ __forceinline__ static float Round(float average) {
    return __bfloat162float(__float2bfloat16_rn(average));
  }
  __device__ __forceinline__ void Scale() {
    scale = absmax * (1.0f / kVMax);
    // Portable scales large V down first: XLA has no subnormal numbers. Here the inverse of an
    // absmax beyond 2^126 is one, and its last bits may be others.
    inverse = __fdiv_rn(kVMax, absmax);
  }
  template <int kHeadDim>
  __device__ __forceinline__ void Store(float* channels) const {
    channels[kValueAverage * kHeadDim] = average;
    channels[kValueMean * kHeadDim] = mean;
    channels[kValueScale * kHeadDim] = scale;
    channels[kValueInverse * kHeadDim] = inverse;
  }
};

// The parts of a unit put together: means, scales and first positions that are not finite.
template <Tensor kTensor, int kHeadDim>
__device__ __forceinline__ void FinishStatistics(const QuantizeParams& params, const Plan& plan,
                                                 SharedStatistics<kHeadDim>& shared, int head) {
  constexpr int kThreadsPerRow = kHeadDim / kVector;
  const int channel = threadIdx.x % kThreadsPerRow * kVector;
  const auto partials = [&](int part) {
    const int64_t index = head * static_cast<int64_t>(params.parts) + part;
    return params.partials + index * (kPartialRows * kHeadDim);
  };
  Statistics of_thread;
  if constexpr (kTensor == kKey) {
    Gather<kHeadDim>(partials, 0, params.parts, {kSumK, kCountK}, [&](float (&x)[2][kVector]) {
      of_thread.AddSums(x[0]);
      if (channel == 0) atomicAdd(&shared.count, __float_as_int(x[1][0]));
    });
  } else {
    Gather<kHeadDim>(partials, 0, params.parts, {kSumV, kMaxV, kMinV, kBadV},
                     [&](float (&x)[4][kVector]) {
                       of_thread.AddSums(x[0]);
                       of_thread.AddExtrema(x[1], x[2]);
#pragma unroll
                       for (int i = 0; i < kVector; ++i) {
                         const int bad = __float_as_int(x[3][i]);
                         if (bad != kNever) atomicMin(&shared.bad[channel + i], bad);
                       }
                     });
  }
  const ChannelStatistics all = Combine<kTensor == kValue>(shared, of_thread);
  const int c = threadIdx.x;
  if (c >= kHeadDim) return;
  float* channels = params.channels + head * static_cast<int64_t>(kChannelRows * kHeadDim) + c;
  int32_t* first_bad = params.first_bad + head * static_cast<int64_t>(kBadRows * kHeadDim) + c;
  if (kTensor == kKey) {
    const float per_sample = __fdiv_rn(1.0f, static_cast<float>(max(shared.count, 1)));
    channels[kKeyMean * kHeadDim] = KeyMean(params, per_sample, all);
    first_bad[kBadKey * kHeadDim] = kNever;
  } else {
    const float per_token =
        params.per_counted_key != nullptr ? params.per_counted_key[head] : plan.per_token;
    ValueChannel(params, per_token, all).template Store<kHeadDim>(channels);
    first_bad[kBadValue * kHeadDim] = shared.bad[c];
    params.value_code_sum[head * static_cast<int64_t>(kHeadDim) + c] = 0;
  }
}

// Those of a part, a stream of the tokens `begin` to `end` - 1, of which `count` count; the last to
// arrive finishes all.
template <Tensor kTensor, int kHeadDim, class T>
__device__ __forceinline__ void MakeStatistics(const QuantizeParams& params, const Plan& plan,
                                               SharedStatistics<kHeadDim>& shared, const T& tokens,
                                               Stream<kTensor, T>& stream, int head, int part,
                                               int begin, int end, int count) {
  const int c = threadIdx.x;
  if (c < kHeadDim) shared.bad[c] = kNever;
  if (c == 0) shared.count = 0;
  __syncthreads();
  const Statistics of_thread = StatisticsOf<kTensor>(tokens, stream, begin, end, shared.bad);
  const ChannelStatistics all = Combine<kTensor == kValue>(shared, of_thread);

  const int64_t index = head * static_cast<int64_t>(params.parts) + part;
  float* out = params.partials + index * (kPartialRows * kHeadDim) + c;
  if (c < kHeadDim) {
    out[(kTensor == kKey ? kSumK : kSumV) * kHeadDim] = all.sum;
    if (kTensor == kKey) {
      out[kCountK * kHeadDim] = __int_as_float(count);
    } else {
      out[kBadV * kHeadDim] = __int_as_float(shared.bad[c]);
      out[kMaxV * kHeadDim] = all.max;
      out[kMinV * kHeadDim] = all.min;
    }
  }
  __syncthreads();  // before the arrival: what it releases; after: the use of `shared`
  const Arrivals arrivals(params.arrivals[2 * static_cast<int64_t>(head) + kTensor]);
  if (c == 0) {
    shared.is_last = arrivals.fetch_add(1, cuda::memory_order_acq_rel) == params.parts - 1;
  }
  __syncthreads();
  if (!shared.is_last) return;
  FinishStatistics<kTensor>(params, plan, shared, head);
  __syncthreads();
  if (c == 0) arrivals.fetch_add(1, cuda::memory_order_release);
}

}  // namespace jax_sage::quantize
