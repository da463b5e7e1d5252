#include "common/epilogue.cuh"
#include "common/masks.cuh"
#include "common/overlap.cuh"
#include "mask/mark.h"

namespace jax_sage {
namespace {

constexpr int kThreads = kMaxHeadDim;  // one a channel
constexpr int kRows = 32;              // queries at a time, one a lane
constexpr int kTurns = 32;             // of a CTA

// Without masks attention need only know the first key that is not finite. With them every such
// key must be looked at; they are rare, so it is a kernel of its own that looks for them.
template <class Type>
__global__ void __launch_bounds__(kThreads)
    Mark(const __grid_constant__ AttentionParams attention, const MarkParams params) {
  const int q_tiles = (attention.length_q + kTurns * kRows - 1) / (kTurns * kRows);
  const int64_t all_heads = blockIdx.x / q_tiles;
  const int first_of_cta = static_cast<int>(blockIdx.x % q_tiles) * (kTurns * kRows);
  const int batch = static_cast<int>(all_heads / attention.heads);
  const int head = static_cast<int>(all_heads % attention.heads);
  const int kv_head = head / (attention.heads / attention.kv_heads);
  const int64_t unit = static_cast<int64_t>(batch) * attention.kv_heads + kv_head;
  const int c = threadIdx.x;

  // The first of all channels. Attention lets this launch start when the quantization has ended:
  // what that has found is there, and only outputs are waited for.
  __shared__ int first_key;
  if (c == 0) first_key = kNever;
  __syncthreads();
  const int channels = TableChannels(attention.padded_head_dim);
  if (c < channels) {
    const int32_t* bad = params.first_bad + unit * kBadRows * channels + c;
    const int first = min(bad[kBadKey * channels], bad[kBadValue * channels]);
    if (first != kNever) atomicMin(&first_key, first);
  }
  __syncthreads();
  WaitForPrevious();
  if (first_key == kNever) return;

  for (int turn = 0; turn < kTurns; ++turn) {
    const int first_row = first_of_cta + turn * kRows;
    const int rows = min(kRows, attention.length_q - first_row);
    if (rows <= 0) return;
    const uint32_t all_rows = ~0u >> (32 - rows);
    const int lane = threadIdx.x % 32;
    uint32_t bad_out = 0, bad_lse = 0;
    // bad_lse is the same in all threads, and all rows of it are rows of bad_out.
    for (int key = first_key; key < attention.length_kv && bad_lse != all_rows; ++key) {
      const int64_t index =
          ((static_cast<int64_t>(batch) * attention.length_kv + key) * attention.kv_heads +
           kv_head) *
              attention.head_dim +
          c;
      bool bad_key = false, bad_value = false;
      if (c < attention.head_dim) {
        bad_key = !isfinite(static_cast<float>(static_cast<const Type*>(params.key)[index]));
        bad_value = !isfinite(static_cast<float>(static_cast<const Type*>(params.value)[index]));
      }
      bad_key = __syncthreads_or(bad_key);
      if (!__syncthreads_or(bad_key || bad_value)) continue;
      const uint32_t seen = __ballot_sync(
          ~0u, lane < rows && Sees(attention.masks, batch, head, first_row + lane, key));
      if (bad_key) bad_lse |= seen;
      if (bad_key || bad_value) bad_out |= seen;
    }
    for (int row = 0; row < rows; ++row) {
      const int64_t index =
          (static_cast<int64_t>(batch) * attention.length_q + first_row + row) * attention.heads +
          head;
      if ((bad_out >> row & 1) && c < attention.head_dim) {
        static_cast<Type*>(attention.out)[index * attention.head_dim + c] = Convert<Type>(kNan);
      }
      if ((bad_lse >> row & 1) && c == 0 && attention.with_lse) attention.lse[index] = kNan;
    }
  }
}

template <class Type>
cudaError_t Launch(const AttentionParams& attention, const MarkParams& params,
                   cudaStream_t stream) {
  const int64_t blocks = (attention.length_q + kTurns * kRows - 1) / (kTurns * kRows) *
                         attention.batch * attention.heads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return LaunchOverlapping(Mark<Type>, static_cast<unsigned>(blocks), kThreads, 0, stream,
                           attention, params);
}

}  // namespace

cudaError_t LaunchMark(const AttentionParams& attention, const MarkParams& params,
                       cudaStream_t stream) {
  switch (attention.out_type) {
    case DType::kF16:
      return Launch<__half>(attention, params, stream);
    case DType::kBf16:
      return Launch<__nv_bfloat16>(attention, params, stream);
    case DType::kF32:
      return Launch<float>(attention, params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_sage
