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

#include "quantize/codes.cuh"
#include "quantize/quantize.h"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"

namespace jax_sage {
namespace quantize {

template <int kHeadDim>
union Shared {
  SharedStatistics<kHeadDim> statistics;
  SharedKey<kHeadDim> key;
  SharedValue<kHeadDim> value;
};

template <class In, int kAccess, int kHeadDim>
__global__ void __launch_bounds__(kThreads<kHeadDim>,
                                  (sizeof(In) == 4 ? 512 : 1024) / kThreads<kHeadDim>)
    Quantize(const QuantizeParams params, const Plan plan) {
  if (!kIsBuilt<kHeadDim>) return;
  __shared__ Shared<kHeadDim> shared;
  // First the lead, then codes and statistics by turns, the codes that are left, and Q.
  const int block = blockIdx.x;
  const int paired = 2 * (plan.items - plan.lead);
  const int turn = block - plan.lead;
  bool is_codes;
  int item;
  if (turn < 0) {
    is_codes = false;
    item = block;
  } else if (turn < paired) {
    is_codes = turn % 2 == 0;
    item = is_codes ? turn / 2 : plan.lead + turn / 2;
  } else {
    is_codes = true;
    item = turn - paired / 2;
  }
  if (item >= plan.items) {
    item -= plan.items;
    constexpr int kTokens = Tokens<In, kAccess, kHeadDim>::kTokens;
    const int chunks = (params.padded_q + kTokens - 1) / kTokens;
    MakeQueryCodes<In, kAccess, kHeadDim>(params, item / chunks, item % chunks * kTokens);
    return;
  }
  const int unit = item / params.parts, part = item % params.parts;
  const int head = unit / 2;
  if (unit % 2 == kKey) {
    if (is_codes) {
      MakeKeyCodes<In, kAccess>(params, plan, shared.key, head, part);
    } else {
      MakeStatistics<kKey, In, kAccess>(params, plan, shared.statistics, head, part);
    }
  } else {
    if (is_codes) {
      MakeValueCodes<In, kAccess>(params, plan, shared.value, head, part);
    } else {
      MakeStatistics<kValue, In, kAccess>(params, plan, shared.statistics, head, part);
    }
  }
}

// Items of statistics ahead of the codes, for each SM. With fewer, codes wait for statistics that
// still run; with more, K and V have left L2 when their codes are made.
constexpr int kLeadPerSm = 3;

template <class In, int kAccess, int kHeadDim>
cudaError_t Launch(const QuantizeParams& params, cudaStream_t stream) {
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;

  constexpr int kTokens = Tokens<In, kAccess, kHeadDim>::kTokens;
  const auto ceil_div = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const int64_t units = 2 * params.batch * params.kv_heads;
  const int64_t items = units * params.parts;
  const int64_t query_items = params.batch * params.heads * ceil_div(params.padded_q, kTokens);
  if (2 * items + query_items > INT32_MAX) return cudaErrorInvalidConfiguration;
  Plan plan;
  plan.items = static_cast<int>(items);
  plan.lead = static_cast<int>(std::min<int64_t>(items, params.parts + kLeadPerSm * sms));
  plan.tokens_per_part =
      static_cast<int>(ceil_div(ceil_div(params.length_kv, params.parts), kTokens) * kTokens);
  plan.per_token = static_cast<float>(1.0 / params.length_kv);

  error = cudaMemsetAsync(params.arrivals, 0, units * sizeof(*params.arrivals), stream);
  if (error != cudaSuccess) return error;
  Quantize<In, kAccess, kHeadDim>
      <<<static_cast<unsigned>(2 * items + query_items), kThreads<kHeadDim>, 0, stream>>>(params,
                                                                                          plan);
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
