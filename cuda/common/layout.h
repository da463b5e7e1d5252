// Numbers that the quantization and the attention kernels agree on. They repeat
// jax_sage/recipe.py and jax_sage/quantization.py, which say why they are what they are; a test
// compares the two bit by bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_SAGE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_SAGE_HOST_DEVICE inline
#endif

namespace jax_sage {

constexpr int kBlockQ = 128;  // queries are padded to a multiple of this
constexpr int kBlockKv =
    64;  // keys whose scales are computed together; also the key tile of mma.sync
constexpr int kMaxHeadDim = 256;
constexpr int kMaxHeadDimMma = 128;  // of the kernels on mma.sync
// Head dimensions are padded to 64, 128, 192 or 256 channels. Tables by channel have a power of
// two: as many as the quantization has threads for.
JAX_SAGE_HOST_DEVICE constexpr int TableChannels(int padded_head_dim) {
  return padded_head_dim == 192 ? 256 : padded_head_dim;
}
constexpr int kKeyScales = 4;  // per block of keys: one for the keys = {2j, 2j+1} mod 8

constexpr int kLog2PMaxInt = 6;
constexpr float kLog2PMax = kLog2PMaxInt;
constexpr float kPMax = 1 << kLog2PMaxInt;
constexpr float kVMax = 1.875f;
constexpr float kScoreMax = 0x1p24f;  // base 2; a row with a larger maximum gives NaN
constexpr float kInt8Max = 127.0f;
constexpr float kAbsmaxFloor = 0x1p-100f;
constexpr float kMeanMax = 0x1p100f;
constexpr int32_t kNever = 0x7fffffff;

// Codes of V are summed as integers in units of the smallest FP16 number: the sum does not depend
// on its order. 2^63 / (1.875 * 2^24) leaves room for 10^11 keys.
constexpr float kCodeUnit = 0x1p-24f;

// K and V are quantized in parts of a multiple of so many keys. Where queries see intervals of keys
// a part that nobody sees has no codes: attention may load no tile across the ends of a part.
constexpr int KeysOfPart(int padded_head_dim) { return padded_head_dim == 64 ? 128 : 64; }

constexpr int kMaskRows = 64;   // queries, and keys, of which it is known together whether all or
constexpr int kMaskKeys = 128;  // none of them are seen
// A bias (base 2) from here down hides its key.
constexpr float kHidingBias = -0x1p23f;
constexpr float kLog2E = 1.44269504f;

// Rows of the `channels` buffer [B, K, kChannelRows, Hc].
enum ChannelRow : int {
  kKeyMean = 0,       // subtracted from K
  kValueAverage = 1,  // mean of V; 0 where V is not smoothed
  kValueMean = 2,     // subtracted from V: the average rounded to bfloat16
  kValueScale = 3,
  kValueInverse = 4,  // codes are (V - mean) * inverse
  kChannelRows = 5,
};

// Rows of the `channels` buffer with segments, [B, K, S, kSlotRows, Hc]. A segment's slot is the
// place of its first key among the keys sorted by id.
enum SlotRow : int {
  // Of V, and until its codes have been made its absmax and average:
  kSlotScale = 0,
  kSlotOffset = 1,  // what smoothing took from it
  kSlotRows = 2,
};

// Rows of the `first_bad` buffer [B, K, 2, Hc]: first positions that are not finite, of V by
// channel, of K in channel 0. With segments only the least of all is exact.
enum BadRow : int { kBadKey = 0, kBadValue = 1, kBadRows = 2 };

enum class DType : int { kF16, kBf16, kF32 };
constexpr int SizeOf(DType type) { return type == DType::kF32 ? 4 : 2; }

// FP8 V is stored transposed, [Hp, Sp], and permuted within each 16 keys: position 4t + 2h + e
// holds key 8h + 2t + e. Thread t of a quad holds the keys {2t, 2t+1, 8+2t, 8+2t+1} of QK^T's
// C fragments and needs the positions 4t..4t+3 of PV's A fragment: no exchange between threads.

}  // namespace jax_sage
