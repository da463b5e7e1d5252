#include "common/layout.h"
#include "common/overlap.cuh"
#include "quantize/sort_ids.h"

namespace jax_sage {
namespace {

constexpr int kThreads = 1024;
constexpr int kMostOfThread = kMostSorted / kThreads;
static_assert(kMostSorted % kThreads == 0 && kMostSorted <= 65536, "places have 16 bits");

// Tokens that follow each other with one id. There is room for as many as tokens.
struct Runs {
  int32_t id[kMostSorted];
  uint16_t first[kMostSorted];  // token
  uint16_t place[kMostSorted];  // how many tokens it has, then where these are in the order
};
struct Shared {
  Runs runs;
  int sums[kThreads / 32];
};

// The sum of x over the threads before this one, and over all. Synchronizes.
__device__ __forceinline__ int SumBefore(int x, int (&sums)[kThreads / 32], int& total) {
  const int lane = threadIdx.x % 32;
  int sum = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += before;
  }
  __syncthreads();  // all have read `sums`
  if (lane == 31) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (warp == threadIdx.x / 32) before = total;
    total += sums[warp];
  }
  return before + sum - x;
}

// Of the ids from `first` on, of which each thread has kMostOfThread.
__device__ __forceinline__ void StoreRanges(const SortParams& params, int64_t batch, int first,
                                            int2 range) {
  const int64_t tiles = (params.length + kMaskKeys - 1) / kMaskKeys;
  const auto widen = [&](int ids) {
    const int offset = ids / kMostOfThread;
    range.x = min(range.x, __shfl_xor_sync(~0u, range.x, offset));
    range.y = max(range.y, __shfl_xor_sync(~0u, range.y, offset));
  };
  const bool is_one = first < tiles * kMaskKeys;
#pragma unroll
  for (int ids = kMostOfThread; ids < kMaskRows; ids *= 2) widen(ids);
  static_assert(kMaskKeys == 2 * kMaskRows && kMaskRows % kMostOfThread == 0);
  if (is_one && first % kMaskRows == 0) {
    params.group_ranges[batch * (2 * tiles) + first / kMaskRows] = range;
  }
  widen(kMaskRows);
  if (is_one && first % kMaskKeys == 0) {
    params.tile_ranges[batch * tiles + first / kMaskKeys] = range;
  }
}

// A thread's neighbouring ids, from `first` on; the last stands for what is behind it.
__device__ __forceinline__ void LoadIds(int32_t (&x)[kMostOfThread], const int32_t* ids, int first,
                                        int length) {
  static_assert(kMostOfThread % 4 == 0);
  if (first + kMostOfThread <= length && reinterpret_cast<uintptr_t>(ids) % sizeof(int4) == 0) {
#pragma unroll
    for (int i = 0; i < kMostOfThread / 4; ++i) {
      const int4 four = __ldg(reinterpret_cast<const int4*>(ids + first) + i);
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kMostOfThread; ++i) x[i] = __ldg(ids + min(first + i, length - 1));
}

// CTAs of a batch entry: each sorts, and writes a slice of the results, which takes longer.
constexpr int kSlices = 8;

// A CTA sorts the ids of a batch entry: not the tokens but their runs, which are few as a rule.
__global__ void __launch_bounds__(kThreads) SortIds(const SortParams params) {
  LetNextStart();
  WaitForPrevious();
  const int64_t batch = blockIdx.x / kSlices;
  const int slice = blockIdx.x % kSlices;
  extern __shared__ uint4 dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  Runs& runs = shared.runs;
  const int length = params.length;
  const int32_t* ids = params.ids + batch * length;

  // The runs, of a few neighbouring tokens by each thread.
  const int first = threadIdx.x * kMostOfThread;
  uint32_t begins = 0;  // bits of tokens that begin a run
  int32_t of_thread[kMostOfThread];
  LoadIds(of_thread, ids, first, length);
  int32_t last = __ldg(ids + min(max(first - 1, 0), length - 1));
  int2 range = make_int2(INT32_MAX, INT32_MIN);
#pragma unroll
  for (int i = 0; i < kMostOfThread; ++i) {
    const int token = first + i;
    const int32_t id = of_thread[i];
    if (token < length && (token == 0 || last != id)) begins |= 1u << i;
    range = make_int2(min(range.x, id), max(range.y, id));
    last = id;
  }
  if (slice == 0) StoreRanges(params, batch, first, range);
  int count;
  int run = SumBefore(__popc(begins), shared.sums, count);
  for (; begins != 0; begins &= begins - 1, ++run) {
    const int token = first + __ffs(begins) - 1;
    runs.id[run] = ids[token];
    runs.first[run] = static_cast<uint16_t>(token);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int next = i + 1 < count ? runs.first[i + 1] : length;
    runs.place[i] = static_cast<uint16_t>(next - runs.first[i]);
  }
  __syncthreads();

  // A bitonic network of comparisons that all go one way: what is not there counts as the greatest,
  // and would stay where it is.
  const auto compare = [&](int low, int high) {
    if (high >= count) return;
    const int32_t id = runs.id[low], other_id = runs.id[high];
    const uint16_t token = runs.first[low], other_token = runs.first[high];
    if (id != other_id ? id < other_id : token < other_token) return;
    const uint16_t tokens = runs.place[low];
    runs.id[low] = other_id, runs.id[high] = id;
    runs.first[low] = other_token, runs.first[high] = token;
    runs.place[low] = runs.place[high], runs.place[high] = tokens;
  };
  bool in_order = true;
  for (int i = threadIdx.x + 1; i < count; i += kThreads) {
    in_order = in_order && runs.id[i - 1] <= runs.id[i];
  }
  if (!__syncthreads_and(in_order)) {
    for (int size = 2; size < 2 * count; size *= 2) {
      for (int distance = size / 2; distance > 0; distance /= 2) {
        for (int pair = threadIdx.x; 2 * pair < count + size; pair += kThreads) {
          const int low = 2 * pair - (pair & (distance - 1));
          // The halves of a whole are compared from their ends.
          compare(low, distance == size / 2 ? low ^ (size - 1) : low + distance);
        }
        __syncthreads();
      }
    }
  }

  bool is_scattered = false;
  for (int i = threadIdx.x + 1; i < count; i += kThreads) {
    is_scattered = is_scattered || runs.id[i - 1] == runs.id[i];
  }
  is_scattered = __syncthreads_or(is_scattered);
  if (slice == 0 && threadIdx.x == 0) params.scattered[batch] = is_scattered;

  // Where each run's tokens begin in the order.
  const int runs_of_thread = (count + kThreads - 1) / kThreads;
  const int first_run = threadIdx.x * runs_of_thread;
  const int end_run = min(first_run + runs_of_thread, count);
  int tokens = 0, all;
  for (int i = first_run; i < end_run; ++i) tokens += runs.place[i];
  int place = SumBefore(tokens, shared.sums, all);
  for (int i = first_run; i < end_run; ++i) {
    const int next = place + runs.place[i];
    runs.place[i] = static_cast<uint16_t>(place);
    place = next;
  }
  __syncthreads();
  int32_t* sorted_ids = params.sorted_ids + batch * length;
  int32_t* order = params.order + batch * length;
  int2* slots = params.slots + batch * length;
  const auto place_of = [&](int run) { return run < count ? runs.place[run] : length; };
  // The first run of which something does not hold that holds of those before.
  const auto find_run = [&](auto holds) {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (holds(middle)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  for (int i = slice * kThreads + threadIdx.x; i < length; i += kSlices * kThreads) {
    const int run_of_token = find_run([&](int run) { return runs.place[run] <= i; }) - 1;
    const int32_t id = runs.id[run_of_token];
    const int token = runs.first[run_of_token] + i - runs.place[run_of_token];
    int first_of_id = run_of_token, end_of_id = run_of_token + 1;
    if (is_scattered) {
      first_of_id = find_run([&](int run) { return runs.id[run] < id; });
      end_of_id = find_run([&](int run) { return runs.id[run] <= id; });
    }
    sorted_ids[i] = id;
    order[i] = token;
    slots[token] = make_int2(place_of(first_of_id), place_of(end_of_id));
  }
}

}  // namespace

cudaError_t LaunchSortIds(const SortParams& params, cudaStream_t stream) {
  if (params.batch > INT32_MAX / kSlices || params.length > kMostSorted) {
    return cudaErrorInvalidConfiguration;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(SortIds, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  return LaunchOverlapping(SortIds, static_cast<unsigned>(kSlices * params.batch), kThreads,
                           sizeof(Shared), stream, params);
}

}  // namespace jax_sage
