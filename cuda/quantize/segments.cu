// Quantization of Q, K and V where each segment has means and scales of its own.
//
// The keys come sorted by segment id; a segment's slot is the place of its first key in that order,
// and what belongs to it lies at its slot in tables that are as long as the keys. Launches, each
// of which needs the whole of the one before:
//   1. the slots of queries, and the runs of keys that lie one behind the other;
//   2. statistics and codes, in the order of quantize.cu. For its statistics a CTA goes over a part
//      of the sorted keys of a head, segment by segment, and finishes those that lie in it as a
//      whole. Where a segment lies in several parts, the last CTA to make its piece puts them
//      together. Codes are in the order of the tokens, and wait for all parts of their head;
//   3. V's scales, and what smoothing took from it, by the sums of its codes.
// Every sum of floats is made in an order that the ids and the lengths alone decide.
#include <algorithm>

#include "common/overlap.cuh"
#include "quantize/codes.cuh"
#include "quantize/quantize.h"
#include "quantize/slots.cuh"
#include "quantize/statistics.cuh"
#include "quantize/tokens.cuh"
#include "quantize/value_codes.cuh"

namespace jax_sage {
namespace quantize {

// The first place of an id among the sorted ones, or -1.
__device__ __forceinline__ int FindPlace(const int32_t* ids, int length, int id) {
  int low = 0, high = length;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (__ldg(ids + middle) < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < length && __ldg(ids + low) == id ? low : -1;
}

__device__ __forceinline__ bool BeginsAt(const int32_t* ids, int place) {
  return place == 0 || __ldg(ids + place - 1) != __ldg(ids + place);
}

__device__ __forceinline__ const int32_t* SortedIds(const SegmentedParams& params, int head) {
  return params.sorted_ids + head / params.kv_heads * params.key_id_stride;
}

constexpr int kSlotThreads = kQueriesOfSlots;

// How the work of FindSlots is cut: blocks of queries, of keys, and others, of so many threads.
struct SlotPlan {
  int query_blocks, key_blocks;
  Divisor query_blocks_of_batch, key_blocks_of_batch;
  Divisor tokens_per_part;
};

// Where the segment of a key lies among the sorted keys: first place, and the place behind the
// last.
__device__ __forceinline__ int2 SegmentOfKey(const SegmentedParams& params, int batch, int key) {
  return __ldg(params.key_slots + batch * params.key_id_stride + key);
}

// Of 256 queries: their slots, and what they see where the keys of a segment lie one behind the
// other.
__device__ __forceinline__ void FindQuerySlots(const SegmentedParams& params, const SlotPlan& plan,
                                               int block) {
  const int batch = block / plan.query_blocks_of_batch;
  const int query = block % plan.query_blocks_of_batch * kSlotThreads + threadIdx.x;
  const int32_t* order = params.order + batch * params.key_id_stride;
  const int64_t index = batch * static_cast<int64_t>(params.padded_q) + query;

  // Least first, greatest end, greatest first, least end.
  __shared__ int4 groups[kSlotThreads / kMaskRows];
  __shared__ int first_slot;
  int4& group = groups[threadIdx.x / kMaskRows];
  if (threadIdx.x % kMaskRows == 0) group = make_int4(INT32_MAX, 0, 0, INT32_MAX);
  const bool exists = query < params.padded_q;
  int first = 0;  // the segment's first key
  int2 slots = make_int2(-1, -1);
  if (exists && params.own_segments) {
    slots = SegmentOfKey(params, batch, min(query, params.length_kv - 1));
    first = __ldg(order + slots.x);
  } else if (exists) {
    const int place = FindPlace(params.sorted_ids + batch * params.key_id_stride, params.length_kv,
                                __ldg(params.query_ids + batch * params.query_id_stride + query));
    if (place >= 0) {
      first = __ldg(order + place);
      slots = SegmentOfKey(params, batch, first);
    }
  }
  if (threadIdx.x == 0) first_slot = slots.x;
  __syncthreads();
  if (exists) {
    params.query_slots[index] = slots.x;
    int2 interval = make_int2(params.length_kv, 0);  // nothing
    if (slots.x >= 0) {
      const int2 row = __ldg(params.rows + batch * params.row_stride + query);
      const int begin = max(first, row.x);
      const int end = min(min(first + slots.y - slots.x, params.length_kv), row.y);
      if (begin < end) interval = make_int2(begin, end);
    }
    params.segment_rows[index] = interval;
    atomicMin(&group.x, interval.x);
    atomicMax(&group.y, interval.y);
    // Queries that are padding do not keep others from seeing all of a tile.
    const bool is_padding = query >= params.length_q;
    atomicMax(&group.z, is_padding ? 0 : interval.x);
    atomicMin(&group.w, is_padding ? params.length_kv : interval.y);
  }
  const bool alike = __syncthreads_and(!exists || slots.x == first_slot);
  if (threadIdx.x == 0) params.block_slots[block] = alike ? slots.x : kMixedSlots;
  if (exists && threadIdx.x % kMaskRows == 0) {
    params.segment_groups[index / kMaskRows] = group;
  }
}

// By the thread of a place in the order: what of its segment lies from there on in one part, if
// that begins there; and the slot of a part of the keys as they are, if its first has this place.
__device__ __forceinline__ void FindRuns(const SegmentedParams& params, const SlotPlan& plan,
                                         int block) {
  const int batch = block / plan.key_blocks_of_batch, length = params.length_kv;
  const int place = block % plan.key_blocks_of_batch * kSlotThreads + threadIdx.x;
  if (place >= length) return;
  const int32_t* order = params.order + batch * params.key_id_stride;
  const int position = __ldg(order + place);
  const int2 slots = SegmentOfKey(params, batch, position);
  const auto are_together = [&](int count) {
    return __ldg(order + place + count - 1) - position == count - 1;
  };
  const int part = place / plan.tokens_per_part;
  if (place == slots.x || place % plan.tokens_per_part == 0) {
    const int64_t part_end = (part + int64_t{1}) * plan.tokens_per_part;
    const int end = static_cast<int>(min(part_end, static_cast<int64_t>(slots.y)));
    params.runs[batch * static_cast<int64_t>(length) + place] = {
        are_together(end - place) ? position : -1, end, slots.x, slots.y};
  }
  if (position % plan.tokens_per_part == 0) {
    const int count = min(static_cast<int>(plan.tokens_per_part), length - position);
    const bool alike = place + count <= slots.y && are_together(count);
    params
        .part_slots[batch * static_cast<int64_t>(params.parts) + position / plan.tokens_per_part] =
        alike ? slots.x : kMixedSlots;
  }
}

// The slots, and what the other launches expect to be initialized.
__global__ void __launch_bounds__(kSlotThreads)
    FindSlots(const SegmentedParams params, const SlotPlan plan) {
  LetNextStart();
  WaitForPrevious();
  int block = static_cast<int>(blockIdx.x);
  if (block < plan.query_blocks) {
    FindQuerySlots(params, plan, block);
    return;
  }
  block -= plan.query_blocks;
  if (block < plan.key_blocks) {
    FindRuns(params, plan, block);
    return;
  }
  const int64_t i = (block - plan.key_blocks) * int64_t{kSlotThreads} + threadIdx.x;
  const int64_t units = 2 * params.batch * params.kv_heads;
  if (i < units) params.arrivals[i] = 0;
  if (i < units * params.parts) params.piece_arrivals[i] = 0;
  static_assert(kBadRows == 2, "of a unit K and V");
  if (i < units * TableChannels(params.padded_head_dim)) params.first_bad[i] = kNever;
}

template <int kHeadDim>
union SharedCodes {
  SharedKey<kHeadDim> key;
  SharedValue<kHeadDim> value;
};

template <int kHeadDim>
struct SharedPart {
  SharedStatistics<kHeadDim> statistics;
  float warp_max[kWarps<kHeadDim>];
};

// Of numbers that are not negative. Synchronizes once.
template <int kWarps>
__device__ __forceinline__ float MaxOfCta(float x, float (&warp_max)[kWarps]) {
  x = MaxAcross<32>(x);
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (float of_warp : warp_max) x = fmaxf(x, of_warp);
  return x;
}

// The largest power of two up to x.
__device__ __forceinline__ float PowerOfTwo(float x) {
  return __int_as_float(__float_as_int(fmaxf(x, kAbsmaxFloor)) & 0x7f800000);
}

// From the statistics of a segment's channels what the codes are made with. `count`: its keys that
// count.
template <Tensor kTensor, int kHeadDim>
__device__ __forceinline__ void FinishSlot(const SegmentedParams& params,
                                           SharedPart<kHeadDim>& shared, int head, int slot,
                                           int count, const ChannelStatistics& all) {
  const int c = threadIdx.x;
  const int64_t index = head * static_cast<int64_t>(params.length_kv) + slot;
  const float per_key = __fdiv_rn(1.0f, static_cast<float>(max(count, 1)));
  if (kTensor == kKey) {
    float absmax = 0;
    if (c < kHeadDim) {
      const float mean = KeyMean(params, per_key, all);
      params.slot_means[index * kHeadDim + c] = __float2bfloat16_rn(mean);  // exact
      absmax = AbsmaxFrom(mean, all);
    }
    absmax = MaxOfCta(absmax, shared.warp_max);
    if (c == 0) params.slot_factors[index].x = PowerOfTwo(absmax);
  } else if (c < kHeadDim) {
    const ValueChannel value(params, per_key, all);
    float* channels = params.slot_channels + index * (kSlotRows * kHeadDim) + c;
    channels[kSlotScale * kHeadDim] = value.absmax;
    channels[kSlotOffset * kHeadDim] = value.average;
    params.value_code_sum[index * kHeadDim + c] = 0;
    if (c == 0) params.slot_factors[index].y = per_key;
  }
}

// Rows of a tensor's partial statistics.
template <Tensor kTensor>
struct Rows {
  static constexpr PartialRow kSum = kTensor == kKey ? kSumK : kSumV;
  static constexpr PartialRow kMax = kTensor == kKey ? kMaxK : kMaxV;
  static constexpr PartialRow kMin = kTensor == kKey ? kMinK : kMinV;
};

__device__ __forceinline__ int64_t FirstPart(const SegmentedParams& params, int64_t unit,
                                             Piece piece) {
  return (unit * kPieces + piece) * params.parts;
}

// Puts the pieces together of a segment that begins in the part `first` and ends in `last`.
template <Tensor kTensor, int kHeadDim>
__device__ __forceinline__ void JoinPieces(const SegmentedParams& params,
                                           SharedPart<kHeadDim>& shared, int head, int slot,
                                           int first, int last) {
  const auto piece_of = [&](int part) { return part == first ? kBegun : kContinued; };
  const int64_t unit = 2 * static_cast<int64_t>(head) + kTensor;
  int count = 0;
  for (int part = first + threadIdx.x % 32; part <= last; part += 32) {
    count += __ldcg(params.piece_counts + FirstPart(params, unit, piece_of(part)) + part);
  }
  const auto partials = [&](int part) {
    const int64_t index = FirstPart(params, head, piece_of(part)) + part;
    return params.partials + index * (kPartialRows * kHeadDim);
  };
  using RowsOf = Rows<kTensor>;
  Statistics of_thread;
  Gather<kHeadDim>(partials, first, last + 1, {RowsOf::kSum, RowsOf::kMax, RowsOf::kMin},
                   [&](float (&x)[3][kVector]) {
                     of_thread.AddSums(x[0]);
                     of_thread.AddExtrema(x[1], x[2]);
                   });
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    count += __shfl_xor_sync(kAllLanes, count, offset);
  }
  FinishSlot<kTensor>(params, shared, head, slot, count,
                      Combine<true>(shared.statistics, of_thread));
}

// The statistics of `count` keys of a segment that are in a part: the segment's, or a piece of it.
// The last to make a piece puts them together, and is told so. Synchronizes.
template <Tensor kTensor, int kHeadDim>
__device__ __forceinline__ bool AddPiece(const SegmentedParams& params, const Plan& plan,
                                         SharedPart<kHeadDim>& shared, int head, int part, int slot,
                                         int slot_end, int count, const ChannelStatistics& all) {
  const int first = slot / plan.tokens_per_part, last = (slot_end - 1) / plan.tokens_per_part;
  if (first == last) {
    FinishSlot<kTensor>(params, shared, head, slot, count, all);
    return true;
  }
  const int c = threadIdx.x;
  const int64_t unit = 2 * static_cast<int64_t>(head) + kTensor;
  const Piece piece = first == part ? kBegun : kContinued;
  if (c < kHeadDim) {
    float* out =
        params.partials + (FirstPart(params, head, piece) + part) * (kPartialRows * kHeadDim) + c;
    out[Rows<kTensor>::kSum * kHeadDim] = all.sum;
    out[Rows<kTensor>::kMax * kHeadDim] = all.max;
    out[Rows<kTensor>::kMin * kHeadDim] = all.min;
  }
  if (c == 0) params.piece_counts[FirstPart(params, unit, piece) + part] = count;
  __syncthreads();  // before the arrival: what it releases; after: the use of `shared`
  if (c == 0) {
    const Arrivals pieces(params.piece_arrivals[unit * params.parts + first]);
    shared.statistics.is_last = pieces.fetch_add(1, cuda::memory_order_acq_rel) == last - first;
  }
  __syncthreads();
  const bool is_last = shared.statistics.is_last;
  if (is_last) JoinPieces<kTensor>(params, shared, head, slot, first, last);
  return is_last;
}

template <Tensor kTensor, int kHeadDim>
__device__ __forceinline__ int* FirstBad(const SegmentedParams& params, int head) {
  return params.first_bad +
         (head * static_cast<int64_t>(kBadRows) + (kTensor == kKey ? kBadKey : kBadValue)) *
             kHeadDim;
}

// Of keys in their order, from place `begin` on, wherever they are and whether or not they count;
// or of samples of those from place `origin` on. A function of its own, as the others of what is
// rare: it takes no registers of what is not.
template <Tensor kTensor, class T, class Ring>
__device__ __noinline__ Statistics StatisticsOfScattered(const SegmentedParams& params, Ring& ring,
                                                         int head, int begin, int end, int origin,
                                                         int* bad) {
  T tokens = TokensOf<kTensor, T>(params, head);
  tokens.order = params.order + head / params.kv_heads * params.key_id_stride;
  tokens.origin = origin;
  tokens.length = end;  // nothing is loaded of those behind
  Stream<kTensor, T> stream(tokens, ring, begin, end, false);
  return StatisticsOf<kTensor>(tokens, stream, begin, end, bad);
}

__device__ __forceinline__ SegmentRun LoadRun(const SegmentedParams& params, int head, int place) {
  const SegmentRun* runs = params.runs + head / params.kv_heads * int64_t{params.length_kv};
  const int4 x = __ldg(reinterpret_cast<const int4*>(runs + place));
  return {x.x, x.y, x.z, x.w};
}

// How many of a run's keys count, from a place on. Synchronizes.
__device__ __forceinline__ int CountSeenOfRun(const SegmentedParams& params, int head, int begin,
                                              const SegmentRun& run) {
  const uint8_t* seen = SeenBy(params, head);
  const int32_t* order = params.order + head / params.kv_heads * params.key_id_stride;
  int count = 0;
#pragma unroll 1
  for (int first = begin; first < run.end; first += blockDim.x) {
    const int place = first + threadIdx.x;
    count += __syncthreads_count(
        place < run.end && __ldg(seen + (run.position < 0 ? __ldg(order + place)
                                                          : run.position + place - begin)) != 0);
  }
  return count;
}

// Of how many parts all keys are of a run's segment.
__device__ __forceinline__ int WholeParts(const SegmentedParams& params, const Plan& plan,
                                          const SegmentRun& run) {
  const int size = plan.tokens_per_part;
  const int first = (run.slot + size - 1) / size;
  const int end =
      (run.slot_end == params.length_kv ? run.slot_end + size - 1 : run.slot_end) / size;
  return max(end - first, 0);
}

// Statistics of a run, from place `begin` on, and of how many keys they are. K's are of samples,
// numbered within the segment, where all keys count; else a segment might have none that counts.
template <Tensor kTensor, class In, int kAccess, int kHeadDim>
__device__ __forceinline__ Statistics StatisticsOfRun(const SegmentedParams& params,
                                                      Ring<In, kHeadDim>& ring, int head, int begin,
                                                      const SegmentRun& run, int& count) {
  constexpr int kOfAll = (kAccess | kExtremaOfAll) & ~kSomeSeen;
  int* bad = FirstBad<kTensor, kHeadDim>(params, head);
  if (params.seen != nullptr) {
    count = CountSeenOfRun(params, head, begin, run);
    using Scattered = Tokens<In, kAccess | kExtremaOfAll | kSorted, kHeadDim>;
    if (kTensor == kKey || run.position < 0 || count < run.end - begin) {
      return StatisticsOfScattered<kTensor, Scattered>(params, ring, head, begin, run.end, 0, bad);
    }
  }
  constexpr int kRead = kTensor == kKey ? kOfAll | kSampled : kOfAll;
  int first = run.position, end = first + run.end - begin;
  int origin = 0;
  if (kTensor == kKey) {
    first = SamplesOf(begin - run.slot), end = SamplesOf(run.end - run.slot);
    origin = run.position - (begin - run.slot);
  } else if (run.position < 0) {
    first = begin, end = run.end;
  }
  count = end - first;
  if (run.position < 0) {
    using Scattered = Tokens<In, kRead | kSorted, kHeadDim>;
    return StatisticsOfScattered<kTensor, Scattered>(params, ring, head, first, end, run.slot, bad);
  }
  using T = Tokens<In, kRead, kHeadDim>;
  T tokens = TokensOf<kTensor, T>(params, head);
  tokens.length = end;
  tokens.origin = origin;
  Stream<kTensor, T> stream(tokens, ring, first, end, false);
  return StatisticsOf<kTensor>(tokens, stream, first, end, bad);
}

// Statistics of a part of a head's sorted keys, `begin` to `end` - 1.
template <Tensor kTensor, class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakePart(const SegmentedParams& params, const Plan& plan,
                                         Ring<In, kHeadDim>& ring, SharedPart<kHeadDim>& shared,
                                         int head, int part, int begin, int end) {
  const int part_begin = begin;
  // A part arrives when it is done, but if it is a piece as a whole, with the one that puts the
  // pieces together.
  int arriving = 1;
#pragma unroll 1
  while (begin < end) {
    const SegmentRun run = LoadRun(params, head, begin);
    int count;
    const Statistics of_thread =
        StatisticsOfRun<kTensor, In, kAccess>(params, ring, head, begin, run, count);
    __syncthreads();  // all have read `shared`
    const bool is_done = AddPiece<kTensor>(params, plan, shared, head, part, run.slot, run.slot_end,
                                           count, Combine<true>(shared.statistics, of_thread));
    const bool is_whole = begin == part_begin && run.end == end;
    if (is_whole && !is_done) return;
    if (is_done) arriving += WholeParts(params, plan, run) - (is_whole ? 1 : 0);
    begin = run.end;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const Arrivals arrivals(params.arrivals[2 * static_cast<int64_t>(head) + kTensor]);
    arrivals.fetch_add(arriving, cuda::memory_order_release);
  }
}

// Codes of a part of a head's keys where not all count, or not all are of one segment.
template <Tensor kTensor, class T, class Ring, int kHeadDim>
__device__ __noinline__ void MakeMixedCodes(const SegmentedParams& params, Ring& ring,
                                            SharedCodes<kHeadDim>& shared, int head, int begin,
                                            int end) {
  const T tokens = TokensOf<kTensor, T>(params, head);
  const Slots<kTensor, kHeadDim> slots(params, head);
  Stream<kTensor, T> stream(tokens, ring, begin, end, true);
  if constexpr (kTensor == kKey) {
    SlotMeans<T, kKey> means(slots);
    MakeKeyCodes(params, shared.key, tokens, stream, head, begin, end, means);
  } else if (params.fp8_value) {
    MakeMixedValueCodes<true>(params, shared.value, tokens, stream, head, begin, end, slots);
  } else {
    MakeMixedValueCodes<false>(params, shared.value, tokens, stream, head, begin, end, slots);
  }
}
template <Tensor kTensor, class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeCodes(const SegmentedParams& params, Ring<In, kHeadDim>& ring,
                                          SharedCodes<kHeadDim>& shared, int head, int part,
                                          int begin, int end) {
  // On their way while it is found out.
  using T = Tokens<In, kAccess & ~kSomeSeen, kHeadDim>;
  const T tokens = TokensOf<kTensor, T>(params, head);
  Stream<kTensor, T> stream(tokens, ring, begin, end, true);
  using Seen = Tokens<In, kAccess, kHeadDim>;
  const int end_token = min(end, params.length_kv);
  int count = end_token - begin;
  if (params.seen != nullptr) {
    count = CountSeen(TokensOf<kTensor, Seen>(params, head), begin, end_token);
  }
  const Slots<kTensor, kHeadDim> slots(params, head);
  const int slot = __ldg(params.part_slots + head / params.kv_heads * int64_t{params.parts} + part);
  WaitForStatistics(params, head, kTensor);
  if (count < end_token - begin || slot == kMixedSlots) {
    ptx::CopyAsyncWait<0>();
    MakeMixedCodes<kTensor, Seen>(params, ring, shared, head, begin, end);
  } else if constexpr (kTensor == kKey) {
    SlotMean mean = slots.LoadMean(slot, T::Channel());
    MakeKeyCodes(params, shared.key, tokens, stream, head, begin, end, mean);
  } else {
    MakeValueCodes(params, shared.value, tokens, stream, head, begin, end,
                   SlotValue<kHeadDim>{slots, slot});
  }
}

// Codes of queries.
template <class T, class Ring>
__device__ __noinline__ void MakeMixedQueryCodes(const SegmentedParams& params, Ring& ring,
                                                 const QueryItem& item) {
  const T queries = QueriesOf<T>(params, item.head);
  Stream<kQuery, T> stream(queries, ring, item.begin, item.end, true);
  const Slots<kQuery, T::kThreadsPerRow * kVector> slots(params, item.kv_head);
  SlotMeans<T, kQuery> means(slots);
  MakeQueryCodes(params, stream, item, means);
}
template <class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeQueryCodes(const SegmentedParams& params, const Plan& plan,
                                               Ring<In, kHeadDim>& ring, int number) {
  using T = Tokens<In, kAccess & ~kSomeSeen, kHeadDim>;
  const QueryItem item = QueryItemOf<In, kHeadDim>(params, plan, number);
  const T queries = QueriesOf<T>(params, item.head);
  Stream<kQuery, T> stream(queries, ring, item.begin, item.end, true);
  const Slots<kQuery, kHeadDim> slots(params, item.kv_head);
  const int slot = slots.OfQueries(item.begin, item.end);
  WaitForStatistics(params, item.kv_head, kKey);
  if (slot == kMixedSlots) {
    ptx::CopyAsyncWait<0>();
    MakeMixedQueryCodes<T>(params, ring, item);
    return;
  }
  SlotMean mean = slots.LoadMean(slot, T::Channel());
  MakeQueryCodes(params, stream, item, mean);
}

template <class In, int kHeadDim>
struct SharedSegments {
  Ring<In, kHeadDim> ring;
  union {
    SharedPart<kHeadDim> part;
    SharedCodes<kHeadDim> codes;
  };
};

// The statistics of a part of K or V of a head, or its codes.
template <Tensor kTensor, class In, int kAccess, int kHeadDim>
__device__ __forceinline__ void MakeItem(const SegmentedParams& params, const Plan& plan,
                                         SharedSegments<In, kHeadDim>& shared, int head, int part,
                                         bool is_codes) {
  const int64_t start = static_cast<int64_t>(part) * plan.tokens_per_part;
  const int64_t length = is_codes ? params.padded_kv : params.length_kv;
  const int end = static_cast<int>(min(start + plan.tokens_per_part, length));
  const int begin = static_cast<int>(min(start, static_cast<int64_t>(end)));
  if (!is_codes) {
    MakePart<kTensor, In, kAccess>(params, plan, shared.ring, shared.part, head, part, begin, end);
  } else if (begin < end) {
    MakeCodes<kTensor, In, kAccess>(params, shared.ring, shared.codes, head, part, begin, end);
  }
}

// As many as the registers allow.
template <class In, int kAccess, int kHeadDim>
constexpr int kCtasPerSm = kHeadDim <= 128 ? (sizeof(In) == 4 ? 1 : 2) + (kAccess & kWide) : 1;
static_assert(kWide == 1);

template <class In, int kAccess, int kHeadDim>
__global__ void __launch_bounds__(kThreads<kHeadDim>, kCtasPerSm<In, kAccess, kHeadDim>)
    QuantizeSegments(const __grid_constant__ SegmentedParams params, const Plan plan) {
  if (!kIsBuilt<kHeadDim>) return;
  WaitForPrevious();
  LetNextStart();  // which may read what the launches before this one have made
  extern __shared__ uint4 dynamic[];
  auto& shared = *reinterpret_cast<SharedSegments<In, kHeadDim>*>(dynamic);
  const auto [item, is_codes] = TurnOf(plan, blockIdx.x);
  if (item >= plan.items) {
    MakeQueryCodes<In, kAccess, kHeadDim>(params, plan, shared.ring, item - plan.items);
    return;
  }
  const int unit = item / params.parts, part = item % params.parts;
  if (unit % 2 == kKey) {
    MakeItem<kKey, In, kAccess>(params, plan, shared, unit / 2, part, is_codes);
  } else {
    MakeItem<kValue, In, kAccess>(params, plan, shared, unit / 2, part, is_codes);
  }
}

// A CTA goes over as many places of a head's sorted keys as it has threads.
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads<kHeadDim>) FinishChannels(const SegmentedParams params) {
  if (!kIsBuilt<kHeadDim>) return;
  LetNextStart();
  constexpr int kPlaces = kThreads<kHeadDim>;
  __shared__ uint32_t begins[kPlaces / 32];
  const int groups = (params.length_kv + kPlaces - 1) / kPlaces;
  const int head = blockIdx.x / groups;
  const int first = blockIdx.x % groups * kPlaces;
  const int place = first + threadIdx.x;
  const bool begins_here = place < params.length_kv && BeginsAt(SortedIds(params, head), place);
  const uint32_t of_warp = __ballot_sync(kAllLanes, begins_here);
  if (threadIdx.x % 32 == 0) begins[threadIdx.x / 32] = of_warp;
  if (!__syncthreads_or(begins_here)) return;
  WaitForPrevious();
  constexpr int kAtOnce = kPlaces / kHeadDim;
  static_assert(kPlaces % kHeadDim == 0);
  const int c = threadIdx.x % kHeadDim;
  int turn = threadIdx.x / kHeadDim;  // 0: this thread's
#pragma unroll 1
  for (int i = 0; i < kPlaces; ++i) {
    const uint32_t left = begins[i / 32] >> i % 32;
    if (left == 0) {
      i |= 31;  // none in these 32
      continue;
    }
    i += __ffs(left) - 1;
    if (turn-- != 0) continue;
    turn = kAtOnce - 1;
    const int64_t slot = head * static_cast<int64_t>(params.length_kv) + first + i;
    float* channels = params.slot_channels + slot * (kSlotRows * kHeadDim) + c;
    const ValueChannel value(channels[kSlotOffset * kHeadDim], channels[kSlotScale * kHeadDim]);
    const float code_mean =
        static_cast<float>(static_cast<double>(params.value_code_sum[slot * kHeadDim + c]) *
                           kCodeUnit) *
        params.slot_factors[slot].y;
    channels[kSlotScale * kHeadDim] = value.scale;
    // 0: nothing was taken from V, and nothing is given back.
    channels[kSlotOffset * kHeadDim] =
        value.average == 0 ? 0 : value.average - value.scale * code_mean;
  }
}

template <class In, int kAccess, int kHeadDim>
cudaError_t LaunchSegments(const SegmentedParams& params, cudaStream_t stream) {
  constexpr int kTokens = Tokens<In, kAccess, kHeadDim>::kTokens;
  constexpr int kSharedBytes = sizeof(SharedSegments<In, kHeadDim>);
  const auto kernel = &QuantizeSegments<In, kAccess, kHeadDim>;
  int sms = 0;
  cudaError_t error = PrepareLaunch(kernel, kSharedBytes, sms);
  if (error != cudaSuccess) return error;

  const auto ceil_div = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const int64_t units = 2 * params.batch * params.kv_heads;
  const int64_t items = units * params.parts;
  const Plan plan = PlanOf<In>(params, kTokens, sms);
  const int64_t query_items = params.batch * params.heads * plan.query_items;
  const int64_t query_blocks = ceil_div(params.padded_q, kSlotThreads);
  const int64_t key_blocks = ceil_div(params.length_kv, kSlotThreads);
  const int64_t initialized = units * std::max<int>(kHeadDim, params.parts);
  const int64_t slot_blocks =
      params.batch * (query_blocks + key_blocks) + ceil_div(initialized, kSlotThreads);
  const int64_t channel_blocks = units / 2 * ceil_div(params.length_kv, kThreads<kHeadDim>);
  if (std::max({2 * items + query_items, slot_blocks, channel_blocks}) > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  const auto blocks = [](int64_t count) { return static_cast<unsigned>(count); };
  const SlotPlan slot_plan{static_cast<int>(params.batch * query_blocks),
                           static_cast<int>(params.batch * key_blocks),
                           Divisor(static_cast<int>(query_blocks)),
                           Divisor(static_cast<int>(key_blocks)), Divisor(plan.tokens_per_part)};
  error =
      LaunchOverlapping(FindSlots, blocks(slot_blocks), kSlotThreads, 0, stream, params, slot_plan);
  if (error != cudaSuccess) return error;
  error = LaunchOverlapping(kernel, blocks(2 * items + query_items), kThreads<kHeadDim>,
                            kSharedBytes, stream, params, plan);
  if (error != cudaSuccess) return error;
  return LaunchOverlapping(FinishChannels<kHeadDim>, blocks(channel_blocks), kThreads<kHeadDim>, 0,
                           stream, params);
}

template <class In, int kAccess>
cudaError_t LaunchSegmentsFor(const SegmentedParams& params, cudaStream_t stream) {
  if (params.padded_head_dim == 64) return LaunchSegments<In, kAccess, 64>(params, stream);
  if (params.padded_head_dim == 128) return LaunchSegments<In, kAccess, 128>(params, stream);
  return LaunchSegments<In, kAccess, 256>(params, stream);
}

template <class In>
cudaError_t LaunchSegmentsFor(const SegmentedParams& params, cudaStream_t stream) {
  // Without `seen` all keys are: kSomeSeen finds that out.
  return IsWide(params, sizeof(In)) ? LaunchSegmentsFor<In, kWide | kSomeSeen>(params, stream)
                                    : LaunchSegmentsFor<In, kSomeSeen>(params, stream);
}

}  // namespace quantize

cudaError_t LaunchQuantizeSegments(const SegmentedParams& params, cudaStream_t stream) {
  switch (params.type) {
    case DType::kF16:
      return quantize::LaunchSegmentsFor<__half>(params, stream);
    case DType::kBf16:
      return quantize::LaunchSegmentsFor<__nv_bfloat16>(params, stream);
    case DType::kF32:
      return quantize::LaunchSegmentsFor<float>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_sage
