// Quantization of Q, K and V in one launch.
//
// K and V are read twice: their codes need statistics of the whole sequence. The grid is ordered so
// that the codes of a head are made soon after its statistics, while K and V are still in L2: from
// HBM everything is read once. Launches of their own for statistics and codes could not alternate
// like this, hence one launch, after a memset of the counters that CTAs wait on: results of a
// custom call are not initialized.
//
// CTAs make one part of the keys of a head each, either its statistics or its codes; the last CTA
// to finish a part's statistics puts the parts together, and the codes wait for it. Forward
// progress: a CTA waits only for CTAs of lower block index. It is assumed that blocks are started
// in the order of their index, so that those run already or are done; scans with decoupled
// look-back assume the same.
//
// Every rounding is that of jax_sage/quantization.py, to the bit: IEEE divisions, no contraction
// that changes a result, sums whose order shows only in the last bits of a mean that is then
// rounded to bfloat16.
#include <algorithm>

#include "common/overlap.cuh"
#include "quantize/codes.cuh"
#include "quantize/quantize.h"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"
#include "quantize/value_codes.cuh"

namespace jax_sage {
namespace quantize {

template <int kHeadDim>
union SharedOfItem {
  SharedStatistics<kHeadDim> statistics;
  SharedKey<kHeadDim> key;
  SharedValue<kHeadDim> value;
};
template <class In, int kHeadDim>
struct Shared {
  Ring<In, kHeadDim> ring;
  SharedOfItem<kHeadDim> of_item;
};

// A part of K or V of a head.
struct Part {
  int head, number;
  int begin, end;  // its tokens
  bool is_codes;   // else its statistics are made
};

// Of K those of its samples.
template <Tensor kTensor, class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeStatistics(const QuantizeParams& params, const Plan& plan,
                                               Shared<In, kHeadDim>& shared, const Part& part) {
  using T = Tokens<In, kTensor == kKey ? kAccess | kSampled : kAccess, kHeadDim>;
  T tokens = TokensOf<kTensor, T>(params, part.head);
  int begin = part.begin, end = part.end;
  int count = 0;
  if constexpr (kTensor == kKey) {
    begin = SamplesOf(begin), end = tokens.length = SamplesOf(end);
    count = end - begin;
  }
  Stream<kTensor, T> stream(tokens, shared.ring, begin, end, false);
  if constexpr (kTensor == kKey && T::kHasUnseen) count = CountSeen(tokens, begin, end);
  MakeStatistics<kTensor>(params, plan, shared.of_item.statistics, tokens, stream, part.head,
                          part.number, begin, end, count);
}

template <Tensor kTensor, class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeCodes(const QuantizeParams& params,
                                          Shared<In, kHeadDim>& shared, const Part& part) {
  if (part.begin == part.end) return;
  using T = Tokens<In, kAccess, kHeadDim>;
  const T tokens = TokensOf<kTensor, T>(params, part.head);
  Stream<kTensor, T> stream(tokens, shared.ring, part.begin, part.end, true);
  if constexpr (kTensor == kKey) {
    OneMean mean = MeanOf<T>(params, part.head);
    MakeKeyCodes(params, shared.of_item.key, tokens, stream, part.head, part.begin, part.end, mean);
  } else {
    WaitForStatistics(params, part.head, kValue);
    MakeValueCodes(params, shared.of_item.value, tokens, stream, part.head, part.begin, part.end,
                   OneValue<kHeadDim>{params, part.head});
  }
}

template <Tensor kTensor, class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakePart(const QuantizeParams& params, const Plan& plan,
                                         Shared<In, kHeadDim>& shared, const Part& part) {
  if (part.is_codes) {
    MakeCodes<kTensor, In, kAccess>(params, shared, part);
  } else {
    MakeStatistics<kTensor, In, kAccess>(params, plan, shared, part);
  }
}

// The statistics of a part of K or V of a head, or its codes. Where all of its keys are seen, which
// is most often so, or none, that is found out once.
template <Tensor kTensor, class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeItem(const QuantizeParams& params, const Plan& plan,
                                         Shared<In, kHeadDim>& shared, int head, int number,
                                         bool is_codes) {
  const int64_t start = static_cast<int64_t>(number) * plan.tokens_per_part;
  const int64_t length = is_codes ? params.padded_kv : params.length_kv;
  const int end = static_cast<int>(min(start + plan.tokens_per_part, length));
  const int begin = static_cast<int>(min(start, static_cast<int64_t>(end)));
  Part part{head, number, begin, end, is_codes};
  if constexpr ((kAccess & kSomeSeen) != 0) {
    const int end_token = min(end, params.length_kv);
    const int count =
        CountSeen(TokensOf<kTensor, Tokens<In, kAccess, kHeadDim>>(params, head), begin, end_token);
    if (count == 0 && is_codes) {
      if (params.skip_unseen) return;
      if (kTensor == kKey) {
        ZeroKeyCodes<kHeadDim>(params, head, begin, end - begin);
      } else {
        ZeroValueCodes<kHeadDim>(params, head, begin, end - begin);
      }
      return;
    }
    if (count == 0) part.end = begin;
    if (count == 0 || count == end_token - begin) {
      MakePart<kTensor, In, kAccess & ~kSomeSeen>(params, plan, shared, part);
      return;
    }
  }
  MakePart<kTensor, In, kAccess>(params, plan, shared, part);
}

template <class In, int kHeadDim>
constexpr int kCtasPerSm = sizeof(In) == 4   ? 512 / kThreads<kHeadDim>
                           : kHeadDim <= 128 ? 3
                                             : 2;

template <class In, int kAccess, int kHeadDim>
__global__ void __launch_bounds__(kThreads<kHeadDim>, kCtasPerSm<In, kHeadDim>)
    Quantize(const QuantizeParams params, const Plan plan) {
  if (!kIsBuilt<kHeadDim>) return;
  LetNextStart();
  extern __shared__ uint4 dynamic[];
  Shared<In, kHeadDim>& shared = *reinterpret_cast<Shared<In, kHeadDim>*>(dynamic);
  const auto [item, is_codes] = TurnOf(plan, blockIdx.x);
  if (item >= plan.items) {
    using T = Tokens<In, kAccess & ~kSomeSeen, kHeadDim>;
    const QueryItem of_query = QueryItemOf<In, kHeadDim>(params, plan, item - plan.items);
    const T queries = QueriesOf<T>(params, of_query.head);
    Stream<kQuery, T> stream(queries, shared.ring, of_query.begin, of_query.end, true);
    OneMean mean = MeanOf<T>(params, of_query.kv_head);
    MakeQueryCodes(params, stream, of_query, mean);
    return;
  }
  const int unit = item / params.parts, part = item % params.parts;
  if (unit % 2 == kKey) {
    MakeItem<kKey, In, kAccess>(params, plan, shared, unit / 2, part, is_codes);
  } else {
    MakeItem<kValue, In, kAccess>(params, plan, shared, unit / 2, part, is_codes);
  }
}

template <class In, int kAccess, int kHeadDim>
cudaError_t Launch(const QuantizeParams& params, cudaStream_t stream) {
  constexpr int kTokens = Tokens<In, kAccess, kHeadDim>::kTokens;
  constexpr int kSharedBytes = sizeof(Shared<In, kHeadDim>);
  const auto kernel = &Quantize<In, kAccess, kHeadDim>;
  int sms = 0;
  cudaError_t error = PrepareLaunch(kernel, kSharedBytes, sms);
  if (error != cudaSuccess) return error;

  const auto ceil_div = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const int64_t units = 2 * params.batch * params.kv_heads;
  const int64_t items = units * params.parts;
  const Plan plan = PlanOf<In>(params, kTokens, sms);
  const int64_t query_items = params.batch * params.heads * plan.query_items;
  if (2 * items + query_items > INT32_MAX) return cudaErrorInvalidConfiguration;

  error = cudaMemsetAsync(params.arrivals, 0, units * sizeof(*params.arrivals), stream);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(2 * items + query_items), kThreads<kHeadDim>, kSharedBytes,
           stream>>>(params, plan);
  return cudaGetLastError();
}

template <class In, int kAccess>
cudaError_t LaunchFor(const QuantizeParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) return Launch<In, kAccess, 64>(params, stream);
  if (params.padded_head_dim == 128) return Launch<In, kAccess, 128>(params, stream);
  return Launch<In, kAccess, 256>(params, stream);
}

template <class In>
cudaError_t LaunchFor(const QuantizeParams& params, cudaStream_t stream) {
  const bool wide = IsWide(params, sizeof(In));
  if (params.seen != nullptr) {
    return wide ? LaunchFor<In, kWide | kSomeSeen>(params, stream)
                : LaunchFor<In, kSomeSeen>(params, stream);
  }
  return wide ? LaunchFor<In, kWide>(params, stream) : LaunchFor<In, 0>(params, stream);
}

}  // namespace quantize

cudaError_t LaunchQuantize(const QuantizeParams& params, cudaStream_t stream) {
  switch (params.type) {
    case DType::kF16:
      return quantize::LaunchFor<__half>(params, stream);
    case DType::kBf16:
      return quantize::LaunchFor<__nv_bfloat16>(params, stream);
    case DType::kF32:
      return quantize::LaunchFor<float>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_sage
