// Quantization in three launches: channel statistics of K and V in parts, the parts put together,
// and the codes of Q, K and V. Q is read once, K and V twice (the second time mostly from L2).
//
// Every rounding is that of jax_sage/quantization.py, to the bit: IEEE divisions, no contraction
// that changes a result, sums whose order shows only in the last bits of a mean that is then
// rounded to bfloat16.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <limits>

#include "quantize/quantize.h"

namespace jax_sage {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // channels of a thread
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

enum PartialRow : int { kSumK, kSumV, kMaxV, kMinV, kFirstBadK, kFirstBadV };

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

// Eight channels of a row from `channel` on; zeros past head_dim. kWide: rows are multiples of
// 16 bytes and so aligned.
template <class In, bool kWide>
__device__ __forceinline__ void LoadChannels(float (&x)[kVector], const In* row, int channel,
                                             int head_dim) {
  if constexpr (kWide) {
    constexpr int kPerLoad = 16 / sizeof(In);
#pragma unroll
    for (int i = 0; i < kVector; i += kPerLoad) {
      if (channel + i < head_dim) {
        alignas(16) In loaded[kPerLoad];
        *reinterpret_cast<uint4*>(loaded) =
            __ldg(reinterpret_cast<const uint4*>(row + channel + i));
#pragma unroll
        for (int j = 0; j < kPerLoad; ++j) x[i + j] = ToFloat(loaded[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kPerLoad; ++j) x[i + j] = 0;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = channel + i < head_dim ? ToFloat(row[channel + i]) : 0;
  }
}

// Eight floats, aligned to 16 bytes.
__device__ __forceinline__ void LoadFloats(float (&x)[kVector], const float* from) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(from));
  const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ float FiniteOrZero(float x) { return isfinite(x) ? x : 0.0f; }

// How the threads of a CTA cover rows of kHeadDim channels.
template <int kHeadDim>
struct Cover {
  static constexpr int kThreadsPerRow = kHeadDim / kVector;
  static constexpr int kRows = kThreads / kThreadsPerRow;  // rows covered at once
  static_assert(kRows % 8 == 0, "rows of a thread are congruent modulo 8: one class of K scales");
  __device__ static int Row() { return threadIdx.x / kThreadsPerRow; }
  __device__ static int Channel() { return threadIdx.x % kThreadsPerRow * kVector; }
};

template <int kWidth>
__device__ __forceinline__ float MaxAcross(float x) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}
template <int kWidth>
__device__ __forceinline__ float SumAcross(float x) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// First of `parts` tokens ranges: [Begin(part), Begin(part + 1)).
__device__ __forceinline__ int Begin(int part, int length, int parts) {
  return static_cast<int>(static_cast<int64_t>(part) * length / parts);
}

// 1. One CTA for each part and head of K and V: partials[b, k, part, :, :].
template <class In, bool kWide, int kHeadDim>
__global__ void __launch_bounds__(kThreads) PartialStatistics(const QuantizeParams params) {
  using C = Cover<kHeadDim>;
  const int part = blockIdx.x % params.parts;
  const int64_t head = blockIdx.x / params.parts;  // batch * K + head
  const int64_t batch = head / params.kv_heads;
  const int64_t stride = static_cast<int64_t>(params.kv_heads) * params.head_dim;
  const int64_t first =
      batch * params.length_kv * stride + head % params.kv_heads * params.head_dim;
  const In* key = static_cast<const In*>(params.key) + first;
  const In* value = static_cast<const In*>(params.value) + first;
  const int channel = C::Channel();

  float sum_k[kVector] = {}, sum_v[kVector] = {}, max_v[kVector], min_v[kVector];
  int bad_k = kNever, bad_v[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    max_v[i] = -kInf;
    min_v[i] = kInf;
    bad_v[i] = kNever;
  }
  const int end = Begin(part + 1, params.length_kv, params.parts);
#pragma unroll 2
  for (int token = Begin(part, params.length_kv, params.parts) + C::Row(); token < end;
       token += C::kRows) {
    float k[kVector], v[kVector];
    LoadChannels<In, kWide>(k, key + token * stride, channel, params.head_dim);
    LoadChannels<In, kWide>(v, value + token * stride, channel, params.head_dim);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (!isfinite(k[i])) bad_k = min(bad_k, token);
      if (!isfinite(v[i])) bad_v[i] = min(bad_v[i], token);
      sum_k[i] += FiniteOrZero(k[i]);
      const float x = FiniteOrZero(v[i]);
      sum_v[i] += x;
      max_v[i] = fmaxf(max_v[i], x);
      min_v[i] = fminf(min_v[i], x);
    }
  }

  // Put the rows of the CTA together, always in the same order.
  __shared__ alignas(16) float shared[kPartialRows][C::kRows][kHeadDim];
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const auto put = [&](PartialRow row, float x0, float x1, float x2, float x3) {
      *reinterpret_cast<float4*>(&shared[row][C::Row()][channel + i]) = make_float4(x0, x1, x2, x3);
    };
    const float bad = __int_as_float(bad_k);
    put(kSumK, sum_k[i], sum_k[i + 1], sum_k[i + 2], sum_k[i + 3]);
    put(kSumV, sum_v[i], sum_v[i + 1], sum_v[i + 2], sum_v[i + 3]);
    put(kMaxV, max_v[i], max_v[i + 1], max_v[i + 2], max_v[i + 3]);
    put(kMinV, min_v[i], min_v[i + 1], min_v[i + 2], min_v[i + 3]);
    put(kFirstBadK, bad, bad, bad, bad);
    put(kFirstBadV, __int_as_float(bad_v[i]), __int_as_float(bad_v[i + 1]),
        __int_as_float(bad_v[i + 2]), __int_as_float(bad_v[i + 3]));
  }
  __syncthreads();
  float* out = params.partials +
               (head * params.parts + part) * static_cast<int64_t>(kPartialRows * kHeadDim);
  for (int i = threadIdx.x; i < kPartialRows * kHeadDim; i += kThreads) {
    const int row = i / kHeadDim, c = i % kHeadDim;
    float x = shared[row][0][c];
    for (int r = 1; r < C::kRows; ++r) {
      const float y = shared[row][r][c];
      if (row == kSumK || row == kSumV) x += y;
      if (row == kMaxV) x = fmaxf(x, y);
      if (row == kMinV) x = fminf(x, y);
      if (row == kFirstBadK || row == kFirstBadV) {
        x = __int_as_float(min(__float_as_int(x), __float_as_int(y)));
      }
    }
    out[i] = x;
  }
}

// Zero where x is too large to be subtracted without overflow.
__device__ __forceinline__ float UsableMean(float sum, float per_token) {
  const float mean = sum * per_token;
  return fabsf(mean) <= kMeanMax ? mean : 0.0f;
}

// 2. One CTA a head: means, scales and first positions that are not finite; clears the code sums.
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim) FinishStatistics(const QuantizeParams params) {
  const int64_t head = blockIdx.x;
  const int c = threadIdx.x;
  const float* in = params.partials + head * params.parts * (kPartialRows * kHeadDim) + c;
  float sum_k = 0, sum_v = 0, max_v = -kInf, min_v = kInf;
  int bad_k = kNever, bad_v = kNever;
#pragma unroll 4
  for (int part = 0; part < params.parts; ++part, in += kPartialRows * kHeadDim) {
    sum_k += in[kSumK * kHeadDim];
    sum_v += in[kSumV * kHeadDim];
    max_v = fmaxf(max_v, in[kMaxV * kHeadDim]);
    min_v = fminf(min_v, in[kMinV * kHeadDim]);
    bad_k = min(bad_k, __float_as_int(in[kFirstBadK * kHeadDim]));
    bad_v = min(bad_v, __float_as_int(in[kFirstBadV * kHeadDim]));
  }
  __shared__ int bad_any;  // a bad key is bad in all its channels
  if (c == 0) bad_any = kNever;
  __syncthreads();
  atomicMin(&bad_any, bad_k);
  __syncthreads();

  const float per_token = static_cast<float>(1.0 / params.length_kv);
  const float mean_k = params.smooth_k ? UsableMean(sum_k, per_token) : 0;
  const float average_v = params.smooth_v ? UsableMean(sum_v, per_token) : 0;
  const float mean_v = __bfloat162float(__float2bfloat16_rn(average_v));
  const float absmax = fmaxf(fmaxf(max_v - mean_v, mean_v - min_v), kAbsmaxFloor);

  float* channels = params.channels + head * (kChannelRows * kHeadDim) + c;
  channels[kKeyMean * kHeadDim] = __bfloat162float(__float2bfloat16_rn(mean_k));
  channels[kValueAverage * kHeadDim] = average_v;
  channels[kValueMean * kHeadDim] = mean_v;
  channels[kValueScale * kHeadDim] = absmax * (1.0f / kVMax);
  const float down = absmax > 1 ? kDownscale : 1;
  channels[kValueDown * kHeadDim] = down;
  channels[kValueInverse * kHeadDim] = __fdiv_rn(kVMax, absmax * down);
  int32_t* first_bad = params.first_bad + head * (kBadRows * kHeadDim) + c;
  first_bad[kBadKey * kHeadDim] = bad_any;
  first_bad[kBadValue * kHeadDim] = min(bad_any, bad_v);
  params.value_code_sum[head * kHeadDim + c] = 0;
}

__device__ __forceinline__ uint2 PackInt8(const float (&x)[kVector], float inverse) {
  uint32_t packed[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t code = static_cast<uint32_t>(__float2int_rn(x[i] * inverse)) & 0xff;
    packed[i / 4] |= code << (8 * (i % 4));
  }
  return make_uint2(packed[0], packed[1]);
}

// 3a. 64 rows of Q: codes, scales, and q·k̄ for lse.
template <class In, bool kWide, int kHeadDim>
__device__ __forceinline__ void QuantizeQuery(const QuantizeParams& params, int64_t block) {
  using C = Cover<kHeadDim>;
  const int blocks = params.padded_q / kBlockKv;
  const int first = static_cast<int>(block % blocks) * kBlockKv;
  const int64_t head = block / blocks;  // batch * N + head
  const int64_t batch = head / params.heads;
  const int64_t kv_head = head / (params.heads / params.kv_heads);
  const int64_t stride = static_cast<int64_t>(params.heads) * params.head_dim;
  const In* query = static_cast<const In*>(params.query) + batch * params.length_q * stride +
                    head % params.heads * params.head_dim;
  const float* mean =
      params.channels + kv_head * (kChannelRows * kHeadDim) + kKeyMean * kHeadDim + C::Channel();
  constexpr int kPasses = kBlockKv / C::kRows;
  float loaded[kPasses][kVector] = {};  // all loads before the first use
#pragma unroll
  for (int r = 0; r < kPasses; ++r) {
    const int row = first + r * C::kRows + C::Row();
    if (row < params.length_q) {
      LoadChannels<In, kWide>(loaded[r], query + row * stride, C::Channel(), params.head_dim);
    }
  }
  float k_mean[kVector];
  LoadFloats(k_mean, mean);
#pragma unroll
  for (int r = 0; r < kPasses; ++r) {
    const int row = first + r * C::kRows + C::Row();
    float (&x)[kVector] = loaded[r];
    float absmax = 0, dot = 0, bad = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      dot = fmaf(x[i], k_mean[i], dot);
      if (!isfinite(x[i])) bad = 1;
      x[i] = FiniteOrZero(x[i]);
      absmax = fmaxf(absmax, fabsf(x[i]));
    }
    absmax = fmaxf(MaxAcross<C::kThreadsPerRow>(absmax), kAbsmaxFloor);
    bad = MaxAcross<C::kThreadsPerRow>(bad);
    dot = SumAcross<C::kThreadsPerRow>(dot);
    const float inverse = __fdiv_rn(copysignf(kInt8Max, params.scale_log2), absmax);
    const int64_t index = head * params.padded_q + row;
    *reinterpret_cast<uint2*>(params.q + index * kHeadDim + C::Channel()) = PackInt8(x, inverse);
    if (C::Channel() == 0) {
      params.q_scale[index] = bad != 0 ? kNan : absmax * params.q_scale_factor;
      params.q_dot_mean[index] = dot * params.scale_log2;
    }
  }
}

// 3b. 64 rows of K: codes, and four scales.
template <class In, bool kWide, int kHeadDim>
__device__ __forceinline__ void QuantizeKey(const QuantizeParams& params, int64_t block) {
  using C = Cover<kHeadDim>;
  constexpr int kPasses = kBlockKv / C::kRows;
  __shared__ float row_absmax[C::kRows];
  const int blocks = params.padded_kv / kBlockKv;
  const int first = static_cast<int>(block % blocks) * kBlockKv;
  const int64_t head = block / blocks;  // batch * K + head
  const int64_t batch = head / params.kv_heads;
  const int64_t stride = static_cast<int64_t>(params.kv_heads) * params.head_dim;
  const In* key = static_cast<const In*>(params.key) + batch * params.length_kv * stride +
                  head % params.kv_heads * params.head_dim;
  const float* mean =
      params.channels + head * (kChannelRows * kHeadDim) + kKeyMean * kHeadDim + C::Channel();

  float x[kPasses][kVector] = {}, absmax = 0;
#pragma unroll
  for (int r = 0; r < kPasses; ++r) {
    const int row = first + r * C::kRows + C::Row();
    if (row < params.length_kv) {
      LoadChannels<In, kWide>(x[r], key + row * stride, C::Channel(), params.head_dim);
    }
  }
  float k_mean[kVector];
  LoadFloats(k_mean, mean);
#pragma unroll
  for (int r = 0; r < kPasses; ++r) {
    if (first + r * C::kRows + C::Row() < params.length_kv) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[r][i] = FiniteOrZero(x[r][i]) - k_mean[i];
        absmax = fmaxf(absmax, fabsf(x[r][i]));
      }
    }
  }
  absmax = MaxAcross<C::kThreadsPerRow>(absmax);
  if (C::Channel() == 0) row_absmax[C::Row()] = absmax;
  __syncthreads();
  // Rows = {2j, 2j+1} mod 8 share a scale.
  const int group = C::Row() % 8 / 2;
  absmax = kAbsmaxFloor;
#pragma unroll
  for (int r = 0; r < C::kRows; r += 8) {
    absmax = fmaxf(absmax, fmaxf(row_absmax[r + 2 * group], row_absmax[r + 2 * group + 1]));
  }
  const float inverse = __fdiv_rn(kInt8Max, absmax);
#pragma unroll
  for (int r = 0; r < kPasses; ++r) {
    const int64_t index = head * params.padded_kv + first + r * C::kRows + C::Row();
    *reinterpret_cast<uint2*>(params.k + index * kHeadDim + C::Channel()) = PackInt8(x[r], inverse);
  }
  if (C::Channel() == 0 && C::Row() < 8 && C::Row() % 2 == 0) {
    params.k_scale[(head * blocks + first / kBlockKv) * kKeyScales + group] =
        absmax * (1.0f / kInt8Max);
  }
}

// 3c. 64 rows of V: codes, and their sums per channel. A thread takes four keys whose E4M3 codes
// are neighbours after the permutation, {2t, 2t+1, 8+2t, 8+2t+1} of 16: one word a channel.
template <class In, bool kWide, int kHeadDim>
__device__ __forceinline__ void QuantizeValue(const QuantizeParams& params, int64_t block) {
  using C = Cover<kHeadDim>;
  constexpr int kQuads = kBlockKv / 4;
  constexpr int kGroups = C::kThreadsPerRow;  // of kVector channels
  const int blocks = params.padded_kv / kBlockKv;
  const int first = static_cast<int>(block % blocks) * kBlockKv;
  const int64_t head = block / blocks;
  const int64_t batch = head / params.kv_heads;
  const int64_t stride = static_cast<int64_t>(params.kv_heads) * params.head_dim;
  const In* value = static_cast<const In*>(params.value) + batch * params.length_kv * stride +
                    head % params.kv_heads * params.head_dim;
  const float* channels = params.channels + head * (kChannelRows * kHeadDim);

  __shared__ alignas(16) int quad_sum[kQuads][kHeadDim];
  __shared__ alignas(16) uint32_t transposed[kHeadDim][kQuads];
  const int quad = C::Row(), channel = C::Channel();
  // Words of a channel are exchanged by its group's number: the channels that a warp writes at
  // once lie a multiple of 128 bytes apart.
  const int flip = channel / kVector;

  if (quad < kQuads) {
    const int first_key = quad / 4 * 16 + quad % 4 * 2;
    float x[4][kVector] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = first + first_key + j / 2 * 8 + j % 2;
      if (row < params.length_kv) {
        LoadChannels<In, kWide>(x[j], value + row * stride, channel, params.head_dim);
      }
    }
    float mean[kVector], down[kVector], inverse[kVector];
    LoadFloats(mean, channels + kValueMean * kHeadDim + channel);
    LoadFloats(down, channels + kValueDown * kHeadDim + channel);
    LoadFloats(inverse, channels + kValueInverse * kHeadDim + channel);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = first + first_key + j / 2 * 8 + j % 2;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float centered = FiniteOrZero(x[j][i]) - mean[i];
        x[j][i] = row < params.length_kv ? centered * down[i] * inverse[i] : 0;
      }
    }
    int sum[kVector];  // of four codes up to 1.875 * 2^24: fits
    if (params.fp8_value) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const __nv_fp8x4_e4m3 codes(make_float4(x[0][i], x[1][i], x[2][i], x[3][i]));
        transposed[channel + i][quad ^ flip] = codes.__x;
        const float4 rounded = static_cast<float4>(codes);
        // Multiples of 2^-9 up to 7.5: exact.
        sum[i] = __float2int_rn((rounded.x + rounded.y + rounded.z + rounded.w) * (1 / kCodeUnit));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        alignas(16) __half codes[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          codes[i] = __float2half_rn(x[j][i]);
          sum[i] += __float2int_rn(__half2float(codes[i]) * (1 / kCodeUnit));
        }
        const int64_t index = head * params.padded_kv + first + first_key + j / 2 * 8 + j % 2;
        *reinterpret_cast<uint4*>(static_cast<__half*>(params.v) + index * kHeadDim + channel) =
            *reinterpret_cast<const uint4*>(codes);
      }
    }
    int4* sums = reinterpret_cast<int4*>(&quad_sum[quad][channel]);
    sums[0] = make_int4(sum[0], sum[1], sum[2], sum[3]);
    sums[1] = make_int4(sum[4], sum[5], sum[6], sum[7]);
  }
  __syncthreads();
  if (params.fp8_value) {
    uint8_t* out = static_cast<uint8_t*>(params.v) +
                   head * kHeadDim * static_cast<int64_t>(params.padded_kv) + first;
    for (int i = threadIdx.x; i < kHeadDim * (kQuads / 4); i += kThreads) {
      const int row = i / (kQuads / 4), chunk = i % (kQuads / 4);
      const int exchange = row / kVector % kQuads;
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = transposed[row][(4 * chunk + j) ^ exchange];
      *reinterpret_cast<uint4*>(out + row * static_cast<int64_t>(params.padded_kv) + 16 * chunk) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  if (params.smooth_v && threadIdx.x < kHeadDim) {
    long long total = 0;
#pragma unroll
    for (int r = 0; r < kQuads; ++r) total += quad_sum[r][threadIdx.x];
    // Integers: the order of the additions does not show.
    atomicAdd(reinterpret_cast<unsigned long long*>(params.value_code_sum) + head * kHeadDim +
                  threadIdx.x,
              static_cast<unsigned long long>(total));
  }
  static_assert(kGroups <= kQuads, "the exchange permutes the words of a channel");
}

// 3. Q, K and V in one launch, one CTA for each 64 rows of a head.
template <class In, bool kWide, int kHeadDim>
__global__ void __launch_bounds__(kThreads) QuantizeRows(const QuantizeParams params) {
  const int64_t q_blocks = params.batch * params.heads * (params.padded_q / kBlockKv);
  const int64_t kv_blocks = params.batch * params.kv_heads * (params.padded_kv / kBlockKv);
  const int64_t block = blockIdx.x;
  if (block < q_blocks) {
    QuantizeQuery<In, kWide, kHeadDim>(params, block);
  } else if (block < q_blocks + kv_blocks) {
    QuantizeKey<In, kWide, kHeadDim>(params, block - q_blocks);
  } else {
    QuantizeValue<In, kWide, kHeadDim>(params, block - q_blocks - kv_blocks);
  }
}

template <class In, bool kWide, int kHeadDim>
cudaError_t Launch(const QuantizeParams& params, cudaStream_t stream) {
  const int64_t kv_heads = params.batch * params.kv_heads;
  const int64_t statistics = kv_heads * params.parts;
  const int64_t rows = params.batch * params.heads * (params.padded_q / kBlockKv) +
                       2 * kv_heads * (params.padded_kv / kBlockKv);
  if (rows > INT32_MAX || statistics > INT32_MAX) return cudaErrorInvalidConfiguration;
  PartialStatistics<In, kWide, kHeadDim>
      <<<static_cast<unsigned>(statistics), kThreads, 0, stream>>>(params);
  FinishStatistics<kHeadDim><<<static_cast<unsigned>(kv_heads), kHeadDim, 0, stream>>>(params);
  QuantizeRows<In, kWide, kHeadDim><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <class In>
cudaError_t LaunchFor(const QuantizeParams& params, cudaStream_t stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide = params.head_dim * sizeof(In) % 16 == 0 && aligned(params.query) &&
                    aligned(params.key) && aligned(params.value);
  if (params.padded_head_dim == 64) {
    return wide ? Launch<In, true, 64>(params, stream) : Launch<In, false, 64>(params, stream);
  }
  return wide ? Launch<In, true, 128>(params, stream) : Launch<In, false, 128>(params, stream);
}

}  // namespace

cudaError_t LaunchQuantize(const QuantizeParams& params, cudaStream_t stream) {
  switch (params.type) {
    case DType::kF16:
      return LaunchFor<__half>(params, stream);
    case DType::kBf16:
      return LaunchFor<__nv_bfloat16>(params, stream);
    case DType::kF32:
      return LaunchFor<float>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_sage
