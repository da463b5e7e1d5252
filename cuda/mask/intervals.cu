#include <algorithm>

#include "common/layout.h"
#include "mask/intervals.h"

namespace jax_sage {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = kThreads / kMaskRows;

// Of a batch entry.
struct Limits {
  int64_t query_length, key_length, offset;

  __device__ __forceinline__ Limits(const IntervalParams& params, int64_t batch) {
    const auto length = [&](const int32_t* given, int whole) {
      return given == nullptr ? whole : min(max(given[batch], 0), whole);
    };
    query_length = length(params.query_lengths, params.length_q);
    key_length = length(params.key_lengths, params.length_kv);
    offset = params.bottom_right ? key_length - query_length : 0;
  }

  // Keys [x, y) of a query; x = S and y = 0 if it sees none.
  __device__ __forceinline__ int2 IntervalOf(const IntervalParams& params, int64_t row) const {
    int64_t first = 0, end = key_length;
    if (params.left >= 0) first = max(first, row + offset - params.left);
    if (params.right >= 0) end = min(end, row + offset + params.right + 1);
    if (row >= query_length || first >= end) return make_int2(params.length_kv, 0);
    return make_int2(static_cast<int>(first), static_cast<int>(end));
  }

  // Those of all queries together: neighbours have neighbouring intervals.
  __device__ __forceinline__ int2 IntervalOfAll(const IntervalParams& params) const {
    int64_t first_row = 0, last_row = query_length - 1;  // that see anything
    if (params.right >= 0) first_row = max(first_row, -offset - params.right);
    if (params.left >= 0) last_row = min(last_row, key_length - 1 - offset + params.left);
    if (first_row > last_row) return make_int2(params.length_kv, 0);
    const int2 first = IntervalOf(params, first_row), last = IntervalOf(params, last_row);
    return make_int2(min(first.x, last.x), max(first.y, last.y));
  }
};

// A thread has a query, a key, or a key/value head.
__global__ void __launch_bounds__(kThreads) MakeIntervals(const IntervalParams params) {
  const int64_t blocks = gridDim.x / params.batch;
  const int64_t batch = blockIdx.x / blocks;
  const int64_t i = blockIdx.x % blocks * kThreads + threadIdx.x;
  const Limits limits(params, batch);

  __shared__ int4 groups[kGroups];
  const int group = threadIdx.x / kMaskRows;
  if (threadIdx.x % kMaskRows == 0) groups[group] = make_int4(INT32_MAX, 0, 0, INT32_MAX);
  __syncthreads();
  if (i < params.padded_q) {
    const int2 interval = limits.IntervalOf(params, i);
    params.rows[batch * params.padded_q + i] = interval;
    atomicMin(&groups[group].x, interval.x);
    atomicMax(&groups[group].y, interval.y);
    // Queries that are padding do not keep others from seeing all of a tile.
    if (i < params.length_q) {
      atomicMax(&groups[group].z, interval.x);
      atomicMin(&groups[group].w, interval.y);
    } else {
      atomicMin(&groups[group].w, params.length_kv);
    }
  }
  __syncthreads();
  if (i < params.padded_q && threadIdx.x % kMaskRows == 0) {
    params.groups[(batch * params.padded_q + i) / kMaskRows] = groups[group];
  }

  if (i < params.length_kv) {
    const int2 seen = limits.IntervalOfAll(params);
    params.seen[batch * params.length_kv + i] = i >= seen.x && i < seen.y;
  }
  const int64_t heads = params.all_heads / params.batch;
  for (int64_t head = i; head < heads; head += blocks * kThreads) {
    const int2 seen = limits.IntervalOfAll(params);
    params.per_counted_key[batch * heads + head] =
        __fdiv_rn(1.0f, static_cast<float>(max(seen.y - seen.x, 1)));
  }
}

}  // namespace

cudaError_t LaunchIntervals(const IntervalParams& params, cudaStream_t stream) {
  const int64_t items = std::max(params.padded_q, params.length_kv);
  const int64_t blocks = (items + kThreads - 1) / kThreads * params.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  MakeIntervals<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_sage
