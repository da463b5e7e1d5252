#include <algorithm>

#include "common/layout.h"
#include "common/masks.cuh"
#include "mask/seen.h"

namespace jax_sage {
namespace {

constexpr int kThreads = 128;        // of a CTA, one a key
constexpr int64_t kRowsOfCta = 256;  // queries that it looks at, from the last to the first
constexpr int kAtOnce = 8;

// The first CTAs look at the last queries, which with a causal mask see most. What they have found
// the others leave alone: most masks are read in part only. Whoever finds a key seen writes the
// same, so their order does not matter.
__global__ void __launch_bounds__(kThreads) FindSeen(const SeenParams params) {
  const int blocks = (params.length_kv + kThreads - 1) / kThreads;
  const int64_t units = params.batch * params.kv_heads;
  const int64_t chunk = blockIdx.x / (units * blocks);
  const int64_t unit = blockIdx.x / blocks % units;
  const int64_t batch = unit / params.kv_heads, kv_head = unit % params.kv_heads;
  const int key = static_cast<int>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  const int end = static_cast<int>(params.length_q - chunk * kRowsOfCta);
  const int begin = static_cast<int>(max(end - kRowsOfCta, int64_t{0}));

  uint8_t* seen = params.seen + unit * params.length_kv + key;
  bool done = key >= params.length_kv || __ldcg(seen) != 0;
  const bool was_done = done;
  for (int i = 0; i < params.group; ++i) {
    const int64_t head = kv_head * params.group + i;
    const int2* rows = params.rows + batch * params.row_stride;
    const uint8_t* mask = params.mask + batch * params.mask_batch_stride +
                          head * params.mask_head_stride + key * params.mask_column_stride;
    const int64_t bias = batch * params.bias_batch_stride + head * params.bias_head_stride +
                         key * params.bias_column_stride;
    for (int last = end - 1; last >= begin; last -= kAtOnce) {
      if (__all_sync(~0u, done)) break;
      bool sees = false;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int row = max(last - j, begin);  // one may be looked at twice
        const int2 interval = __ldg(rows + row);
        bool this_sees = !done && key >= interval.x && key < interval.y;
        if (this_sees && params.mask != nullptr) {
          this_sees = __ldg(mask + row * params.mask_row_stride) != 0;
        }
        if (this_sees && params.bias != nullptr) {
          this_sees = !Hides(params.bias, params.bias_type, bias + row * params.bias_row_stride);
        }
        sees |= this_sees;
      }
      done |= sees;
    }
  }
  if (done && !was_done) *seen = 1;
}

}  // namespace

cudaError_t LaunchSeen(const SeenParams& params, cudaStream_t stream) {
  const int64_t units = params.batch * params.kv_heads;
  const int64_t blocks = (params.length_kv + kThreads - 1) / kThreads;
  const int64_t chunks = (params.length_q + kRowsOfCta - 1) / kRowsOfCta;
  if (units * blocks * chunks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaMemsetAsync(params.seen, 0, units * params.length_kv, stream);
  if (error != cudaSuccess) return error;
  FindSeen<<<static_cast<unsigned>(units * blocks * chunks), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_sage
