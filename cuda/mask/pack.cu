#include "common/layout.h"
#include "common/masks.cuh"
#include "mask/pack.h"

namespace jax_sage {
namespace {

constexpr int kWarps = 4;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kKeysOfLane = 16;
constexpr int kLanesOfTile = kMaskKeys / kKeysOfLane;
constexpr int kTilesOfWarp = 32 / kLanesOfTile;
constexpr int kAtOnce = 8;                 // rows that are loaded together
constexpr uint32_t kHighest = 0x80808080;  // bits of bytes

// The bytes of 16 keys, of which the first is `key`; zeros past the last. kAligned: bytes that rows
// are aligned to.
template <int kAligned>
__device__ __forceinline__ uint4 LoadKeys(const uint8_t* row, int key, int length) {
  if constexpr (kAligned == 16) {
    if (key >= length) return make_uint4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const uint4*>(row + key));
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kKeysOfLane; i += kAligned) {
      if (key + i >= length) continue;
      if constexpr (kAligned == 4) {
        words[i / 4] = __ldg(reinterpret_cast<const uint32_t*>(row + key + i));
      } else {
        words[i / 4] |= static_cast<uint32_t>(__ldg(row + key + i)) << (8 * (i % 4));
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The highest bit of each byte that is not 0.
__device__ __forceinline__ uint32_t NotZero(uint32_t bytes) {
  return ((bytes & ~kHighest) + ~kHighest | bytes) & kHighest;
}

// A warp packs kMaskRows queries and four times kMaskKeys keys, a row at a time; a lane 16 keys.
// Those of lane i of a tile's eight are bit 7 - i of each byte: of word j, bytes 2h + e of 0 or 1
// are the keys 16i + 8h + 2j + e.
template <int kAligned>
__global__ void __launch_bounds__(32 * kWarps) Pack(const PackParams params) {
  const int tiles = (params.length_kv + kMaskKeys - 1) / kMaskKeys;
  const int strips = (tiles + kTilesOfWarp - 1) / kTilesOfWarp;
  const int groups = (params.padded_q + kMaskRows - 1) / kMaskRows;
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (item >= params.heads * groups * strips) return;
  const int group = static_cast<int>(item / strips % groups);
  const int64_t head = item / strips / groups;
  const int lane = threadIdx.x % 32, i = lane % kLanesOfTile;
  const int tile = static_cast<int>(item % strips) * kTilesOfWarp + lane / kLanesOfTile;
  const int first_row = group * kMaskRows;
  const int end_row = min(first_row + kMaskRows, params.padded_q);
  const int end_query = min(end_row, params.length_q);
  const int first_key = tile * kMaskKeys + i * kKeysOfLane;
  const uint8_t* mask = params.mask + head * params.length_q * params.length_kv;
  // Which word the exchanges leave to this lane and the next.
  const bool has_upper_two = i & 4, has_upper = i & 2;
  uint32_t* words = params.words + (head * tiles + tile) * params.padded_q * 4 +
                    (has_upper_two ? 2 : 0) + (has_upper ? 1 : 0);
  uint32_t any = 0, all = kHighest;
#pragma unroll 1
  for (int first = first_row; first < end_row; first += kAtOnce) {
    uint4 loaded[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      loaded[r] = make_uint4(0, 0, 0, 0);  // padding sees nothing
      if (first + r < end_query) {
        loaded[r] = LoadKeys<kAligned>(mask + (first + r) * int64_t{params.length_kv}, first_key,
                                       params.length_kv);
      }
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const uint32_t keys[4] = {NotZero(loaded[r].x), NotZero(loaded[r].y), NotZero(loaded[r].z),
                                NotZero(loaded[r].w)};
      any |= keys[0] | keys[1] | keys[2] | keys[3];
      if (first + r < end_query) all &= keys[0] & keys[1] & keys[2] & keys[3];
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        word[j] = __byte_perm(keys[j / 2], keys[2 + j / 2], j % 2 == 0 ? 0x5410 : 0x7632) >> i;
      }
      // The bits of eight lanes come together, and each lane sends what it does not keep.
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t sent = has_upper_two ? word[j] : word[j + 2];
        word[j] = (has_upper_two ? word[j + 2] : word[j]) | __shfl_xor_sync(kAllLanes, sent, 4);
      }
      const uint32_t sent = has_upper ? word[0] : word[1];
      word[0] = (has_upper ? word[1] : word[0]) | __shfl_xor_sync(kAllLanes, sent, 2);
      word[0] |= __shfl_xor_sync(kAllLanes, word[0], 1);
      if (i % 2 == 0 && tile < tiles && first + r < end_row) {
        words[(first + r) * int64_t{4}] = word[0];
      }
    }
  }
  constexpr unsigned kOfTile = (1u << kLanesOfTile) - 1;
  const int shift = lane - i;
  const unsigned with_any = __ballot_sync(kAllLanes, any != 0) >> shift & kOfTile;
  const unsigned with_all = __ballot_sync(kAllLanes, all == kHighest) >> shift & kOfTile;
  if (i == 0 && tile < tiles) {
    params.views[(head * groups + group) * tiles + tile] =
        static_cast<uint8_t>(with_all == kOfTile ? kAll
                             : with_any != 0     ? kAll | kByMask
                                                 : kNone);
  }
}

}  // namespace

cudaError_t LaunchPack(const PackParams& params, cudaStream_t stream) {
  const int64_t tiles = (params.length_kv + kMaskKeys - 1) / kMaskKeys;
  const int64_t groups = (params.padded_q + kMaskRows - 1) / kMaskRows;
  const int64_t strips = (tiles + kTilesOfWarp - 1) / kTilesOfWarp;
  const int64_t blocks = (params.heads * groups * strips + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto are_aligned = [&](int bytes) {
    return params.length_kv % bytes == 0 && reinterpret_cast<uintptr_t>(params.mask) % bytes == 0;
  };
  const auto kernel = are_aligned(16) ? Pack<16> : are_aligned(4) ? Pack<4> : Pack<1>;
  kernel<<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_sage
