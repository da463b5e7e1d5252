// The tokens of Q, K and V as quantization reads them: how they are cut into work, and how the
// threads of a CTA load them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/layout.h"
#include "common/ptx.cuh"
#include "quantize/quantize.h"

namespace jax_sage::quantize {

// Whether the attention of this architecture takes so many channels: if not, nothing calls the
// kernel, and it is left empty.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
template <int kHeadDim>
constexpr bool kIsBuilt = true;
#else
template <int kHeadDim>
constexpr bool kIsBuilt = kHeadDim <= kMaxHeadDimMma;
#endif

// kHeadDim is TableChannels of the padded head dimension. Codes have the padded head dimension's
// channels alone.
template <int kHeadDim>
__device__ __forceinline__ int CodeChannels(const QuantizeParams& params) {
  return kHeadDim == TableChannels(192) ? params.padded_head_dim : kHeadDim;
}
template <int kHeadDim>
__device__ __forceinline__ bool HasCodes(const QuantizeParams& params, int channel) {
  return kHeadDim != TableChannels(192) || channel < params.padded_head_dim;
}

// Of a CTA: those of 16 tokens at least.
template <int kHeadDim>
constexpr int kThreads = kHeadDim <= 128 ? 256 : 512;
template <int kHeadDim>
constexpr int kWarps = kThreads<kHeadDim> / 32;
constexpr int kVector = 8;  // channels of a thread
constexpr int kPasses = 4;  // tokens of a thread in a chunk
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr unsigned kAllLanes = 0xffffffffu;

enum Tensor : int { kKey, kValue, kQuery };

// How the work is cut. A unit is K or V of one head, an item one part of it.
struct Plan {
  int items;
  int lead;  // items of statistics ahead of the first codes: a unit's at least
  int tokens_per_part;
  float per_token;      // 1 / length_kv
  Divisor query_items;  // of a head
  Divisor group;        // query heads for each of K and V
};

// Items of statistics ahead of the codes, for each SM. With fewer, codes wait for statistics that
// still run; with more, K and V have left L2 when their codes are made.
template <class In>
constexpr int kLeadPerSm = sizeof(In) == 4 ? 1 : 2;

constexpr int kChunksOfQueries = 4;  // of an item of Q
// tokens: of a chunk, of which parts are made.
template <class In>
Plan PlanOf(const QuantizeParams& params, int tokens, int sms) {
  const int64_t items = 2 * params.batch * params.kv_heads * params.parts;
  const int chunks = (params.length_kv - 1) / tokens + 1;
  return {static_cast<int>(items),
          static_cast<int>(std::min<int64_t>(items, params.parts + kLeadPerSm<In> * sms)),
          ((chunks - 1) / params.parts + 1) * tokens,
          static_cast<float>(1.0 / params.length_kv),
          Divisor((params.padded_q - 1) / (kChunksOfQueries * tokens) + 1),
          Divisor(params.heads / params.kv_heads)};
}

// Of a kernel that waits for others of its CTAs: how many SMs it has.
template <class... Params>
cudaError_t PrepareLaunch(void (*kernel)(Params...), int shared_bytes, int& sms) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  return error;
}

// The work of a CTA: an item's statistics or its codes, or, from plan.items on, Q's codes.
struct Turn {
  int item;
  bool is_codes;
};
// First the lead, then codes and statistics by turns, the codes that are left, and Q.
__device__ __forceinline__ Turn TurnOf(const Plan& plan, int block) {
  const int paired = 2 * (plan.items - plan.lead);
  const int turn = block - plan.lead;
  if (turn < 0) return {block, false};
  if (turn >= paired) return {turn - paired / 2, true};
  if (turn % 2 == 0) return {turn / 2, true};
  return {plan.lead + turn / 2, false};
}

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
template <class In>
using Pair = typename PairOf<In>::Type;

__device__ __forceinline__ float2 ToFloats(float2 x) { return x; }
__device__ __forceinline__ float2 ToFloats(__half2 x) { return __half22float2(x); }
// One instruction each; the library's takes two for the upper.
__device__ __forceinline__ float2 ToFloats(__nv_bfloat162 x) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(&x);
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <class X>
__device__ __forceinline__ X FromFloats(float2 x) {
  if constexpr (std::is_same_v<X, float2>) return x;
  if constexpr (std::is_same_v<X, __half2>) return __float22half2_rn(x);
  if constexpr (std::is_same_v<X, __nv_bfloat162>) return __float22bfloat162_rn(x);
}

__device__ __forceinline__ float2 Max(float2 x, float2 y) {
  return make_float2(fmaxf(x.x, y.x), fmaxf(x.y, y.y));
}
__device__ __forceinline__ __half2 Max(__half2 x, __half2 y) { return __hmax2(x, y); }
__device__ __forceinline__ __nv_bfloat162 Max(__nv_bfloat162 x, __nv_bfloat162 y) {
  return __hmax2(x, y);
}
__device__ __forceinline__ float2 Min(float2 x, float2 y) {
  return make_float2(fminf(x.x, y.x), fminf(x.y, y.y));
}
__device__ __forceinline__ __half2 Min(__half2 x, __half2 y) { return __hmin2(x, y); }
__device__ __forceinline__ __nv_bfloat162 Min(__nv_bfloat162 x, __nv_bfloat162 y) {
  return __hmin2(x, y);
}

// What a thread takes of a token.
template <class In>
struct alignas(16) Vector {
  Pair<In> pairs[kVector / 2];
};

template <class In>
__device__ __forceinline__ void ToFloats(float (&x)[kVector], const Vector<In>& vector) {
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = ToFloats(vector.pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// Puts 0 for what is not finite.
template <class In>
__device__ __forceinline__ void MakeFinite(Vector<In>& vector) {
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    float2 pair = ToFloats(vector.pairs[i]);
    if (!isfinite(pair.x)) pair.x = 0;
    if (!isfinite(pair.y)) pair.y = 0;
    vector.pairs[i] = FromFloats<Pair<In>>(pair);
  }
}

template <class In>
__device__ __forceinline__ void MakeFinite(Vector<In> (&x)[kPasses]) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) MakeFinite(x[pass]);
}

// How tokens are read. kWide: all are aligned to 16 bytes. kSomeSeen: some may not count. kSorted:
// they are numbered by their place in an order. kExtremaOfAll: of K too the statistics have
// extrema. kSampled: they are numbered among the samples.
enum Access : int { kWide = 1, kSomeSeen = 2, kSorted = 4, kExtremaOfAll = 8, kSampled = 16 };

// K's mean is that of half the keys: any vector may be taken off K, and to read the others takes
// time. Of each 64 it is the first or the last 32, by the parity of the bits of the block's number,
// which has no period: no column of an image is left out.
constexpr int kSamples = kBlockKv / 2;  // of a block
__device__ __forceinline__ int PositionOfSample(int sample) {
  const int block = sample / kSamples;
  return block * kBlockKv + (__popc(block) & 1) * kSamples + sample % kSamples;
}
// Of the first `count` keys.
__device__ __forceinline__ int SamplesOf(int count) {
  const int block = count / kBlockKv, skipped = (__popc(block) & 1) * kSamples;
  return block * kSamples + min(max(count % kBlockKv - skipped, 0), kSamples);
}

// Whether all tokens are aligned to 16 bytes.
inline bool IsWide(const QuantizeParams& params, size_t element) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return params.head_dim * element % 16 == 0 && aligned(params.query) && aligned(params.key) &&
         aligned(params.value);
}

// The tokens of one head of Q, K or V, and how the threads of a CTA cover them: `kRows` tokens at
// once, `kTokens` in all passes.
template <class In, int kAccess, int kHeadDim>
struct Tokens {
  using Element = In;
  static constexpr int kThreadsPerRow = kHeadDim / kVector;
  static constexpr int kRows = kThreads<kHeadDim> / kThreadsPerRow;
  static constexpr int kTokens = kRows * kPasses;
  static_assert(kTokens % KeysOfPart(kHeadDim) == 0, "parts are of whole chunks");
  static constexpr bool kIsSorted = (kAccess & kSorted) != 0;
  static constexpr bool kIsSampled = (kAccess & kSampled) != 0;
  static constexpr bool kHasUnseen = (kAccess & kSomeSeen) != 0;
  static constexpr bool kHasExtrema = (kAccess & kExtremaOfAll) != 0;

  const In* data;
  const uint8_t* seen;             // by token with kSomeSeen; null: all
  const int32_t* order = nullptr;  // by place with kSorted
  int origin = 0;                  // with kSampled: of what the samples are numbered from
  int64_t stride;
  int length;
  int head_dim;

  __device__ static int Row() { return threadIdx.x / kThreadsPerRow; }
  __device__ static int Channel() { return threadIdx.x % kThreadsPerRow * kVector; }

  __device__ Tokens(const void* tensor, int head, const Divisor& heads, int length, int head_dim,
                    const uint8_t* seen)
      : data(static_cast<const In*>(tensor)),
        seen(seen),
        stride(static_cast<int64_t>(heads) * head_dim),
        length(length),
        head_dim(head_dim) {
    data += head / heads * (length * stride) + head % heads * head_dim;
  }

  // Where in the tensor a token is.
  __device__ __forceinline__ int Position(int token) const {
    if constexpr (kIsSampled) token = origin + PositionOfSample(token);
    if constexpr (kIsSorted) return __ldg(order + token);
    return token;
  }

  // Whether the token counts: it is one, and a query sees it.
  __device__ __forceinline__ bool Counts(int token) const {
    if (token >= length) return false;
    if constexpr (!kHasUnseen) return true;
    return seen == nullptr || __ldg(seen + Position(token)) != 0;
  }

  // Zeros for tokens that do not count, and past the last channel.
  __device__ __forceinline__ Vector<In> Load(int token) const {
    Vector<In> vector;
    const bool counts = Counts(token);
    if constexpr (kIsSorted || kIsSampled) token = counts ? Position(token) : 0;
    const In* row = data + token * stride + Channel();
    constexpr bool kIsWide = (kAccess & kWide) != 0;
    constexpr int kPerLoad = kIsWide ? 16 / sizeof(In) : 1;
    using Loaded = std::conditional_t<kIsWide, uint4, In>;
#pragma unroll
    for (int i = 0; i < kVector / kPerLoad; ++i) {
      Loaded loaded{};
      if (counts && Channel() + i * kPerLoad < head_dim) {
        loaded = __ldg(reinterpret_cast<const Loaded*>(row) + i);
      }
      reinterpret_cast<Loaded*>(vector.pairs)[i] = loaded;
    }
    return vector;
  }
  // The passes of a chunk to an address in shared memory, kWords words a pass, kThreads<kHeadDim>
  // apart.
  // `row`: of the thread in the first pass.
  template <Tensor kTensor>
  __device__ __forceinline__ void Copy(uint32_t to, int first, const In* row,
                                       uint64_t policy) const {
    constexpr int kWords = sizeof(Vector<In>) / sizeof(uint4);
    constexpr int kPerWord = sizeof(uint4) / sizeof(In);
    constexpr bool kIsWide = (kAccess & kWide) != 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int token = first + RowOfPass<kTensor>(pass);
      if constexpr (kIsWide) {
        const bool counts = Counts(token);
        const In* from = row + (RowOfPass<kTensor>(pass) - RowOfPass<kTensor>(0)) * stride;
        if constexpr (kIsSorted || kIsSampled) {
          from = data + (counts ? Position(token) : 0) * stride + Channel();
        }
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          // In FP32 two copies share sectors: through L1.
          ptx::CopyAsync16OrZeros<(kWords > 1)>(
              to + (pass * kWords + i) * (kThreads<kHeadDim> * 16), from + i * kPerWord,
              counts && Channel() + i * kPerWord < head_dim, policy);
        }
      } else {
        const Vector<In> vector = Load(token);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          ptx::StoreSharedAs(to + (pass * kWords + i) * (kThreads<kHeadDim> * 16),
                             reinterpret_cast<const uint4*>(vector.pairs)[i]);
        }
      }
    }
  }

  // In its passes a thread takes tokens that are congruent modulo 8, of one class of K scales; of V
  // those whose E4M3 codes are neighbours after the permutation, {2t, 2t+1, 8+2t, 8+2t+1} of 16.
  template <Tensor kTensor>
  __device__ static int RowOfPass(int pass) {
    if (kTensor != kValue) return pass * kRows + Row();
    return Row() / 4 * 16 + Row() % 4 * 2 + pass / 2 * 8 + pass % 2;
  }
  static_assert(kRows % 8 == 0 && kPasses == 4);

  // Whether one of the thread's tokens of a chunk counts.
  template <Tensor kTensor>
  __device__ __forceinline__ bool SomeCount(int first) const {
    bool some = false;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) some |= Counts(first + RowOfPass<kTensor>(pass));
    return some;
  }
};

// Whether a token of a chunk counts, for all threads alike. Synchronizes.
template <Tensor kTensor, class T>
__device__ __forceinline__ bool ChunkCounts(const T& tokens, int first) {
  if constexpr (T::kHasUnseen) return __syncthreads_or(tokens.template SomeCount<kTensor>(first));
  __syncthreads();
  return true;
}
// How many of the tokens `begin` to `end` - 1 do. Synchronizes.
template <class T>
__device__ __forceinline__ int CountSeen(const T& tokens, int begin, int end) {
  int count = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += blockDim.x) {
    const int token = first + threadIdx.x;
    count += __syncthreads_count(token < end && tokens.Counts(token));
  }
  return count;
}

// Chunks of tokens in shared memory.
template <class In, int kHeadDim>
struct Ring {
  static constexpr int kStages = 2;
  static constexpr int kWords = sizeof(Vector<In>) / sizeof(uint4);
  uint4 words[kStages][kPasses][kWords][kThreads<kHeadDim>];
};

// A range of tokens, chunk after chunk, loaded ahead. A thread copies what it reads itself, and so
// it waits for no other.
template <Tensor kTensor, class T>
class Stream {
  using In = typename T::Element;
  static constexpr int kHeadDim = T::kThreadsPerRow * kVector;
  using RingOf = Ring<In, kHeadDim>;
  static_assert(RingOf::kStages == 2);

 public:
  __device__ __forceinline__ Stream(const T& tokens, RingOf& ring, int first, int end,
                                    bool is_last_read)
      : tokens_(tokens),
        stage_(__shfl_sync(kAllLanes, ptx::SharedAddress(&ring.words[0][0][0][threadIdx.x]),
                           threadIdx.x % 32)),
        other_(stage_ ^ (stage_ + sizeof(ring.words[0]))),
        copied_(first),
        end_(end),
        policy_(ptx::CachePolicy(is_last_read)),
        row_(tokens.data + (first + T::template RowOfPass<kTensor>(0)) * tokens.stride +
             T::Channel()) {
    CopyChunk();
    CopyChunk();
  }
  __device__ __forceinline__ void Next(Vector<In> (&x)[kPasses]) {
    if (!is_first_) CopyChunk();
    is_first_ = false;
    ptx::CopyAsyncWait<1>();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int i = 0; i < RingOf::kWords; ++i) {
        reinterpret_cast<uint4*>(x[pass].pairs)[i] = ptx::LoadSharedAs<uint4>(
            stage_ + (pass * RingOf::kWords + i) * (kThreads<kHeadDim> * 16));
      }
    }
  }

 private:
  // To the stage that was read last, and turns to the other.
  __device__ __forceinline__ void CopyChunk() {
    if (copied_ < end_) {
      tokens_.template Copy<kTensor>(stage_, copied_, row_, policy_);
      copied_ += T::kTokens;
      row_ += T::kTokens * tokens_.stride;
    }
    ptx::CopyAsyncCommit();  // also of nothing: a chunk's copies are a group's
    stage_ ^= other_;
  }

  const T& tokens_;
  // The thread's address in the stage to be read next, and what turns it to the other. By a shuffle
  // and by bits, not as a sum, of which ptxas 13.0 may keep a part in UR0, and then the copy's
  // policy in UR1, where only an even register will do: an illegal instruction.
  uint32_t stage_, other_;
  bool is_first_ = true;
  int copied_, end_;
  uint64_t policy_;
  const In* row_;  // the thread's, of the next chunk to copy
};

__device__ __forceinline__ void StoreFloats(float* to, const float (&x)[kVector]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
// Past L1: what other CTAs have written.
__device__ __forceinline__ void LoadFloats(float (&x)[kVector], const float* from) {
  const float4 low = __ldcg(reinterpret_cast<const float4*>(from));
  const float4 high = __ldcg(reinterpret_cast<const float4*>(from) + 1);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

}  // namespace jax_sage::quantize
