// Checks of the buffers and attributes of the custom calls. Apart from the XLA headers and from
// CUDA, so that Python tests can call them on a machine without a GPU.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace jax_sage {

struct Buffer {
  std::string dtype;  // XLA's names: "F16", "BF16", "F32", "S8", "U8", "S32", "U32", "PRED",
                      // "F8E4M3FN"
  std::vector<int64_t> dims;
};
using Attrs = std::map<std::string, double>;

// What a call of attention is given besides the quantized buffers.
struct MaskKinds {
  bool masked = false, mask = false, segments = false, bias = false;
  bool counted = false;  // it is told of how many keys the means are, as some may not count
};

// Dimensions of one call, from its buffers.
struct Sizes {
  int64_t batch = 0;  // product of the leading dimensions
  int64_t length_q = 0, heads = 0, head_dim = 0;
  int64_t length_kv = 0, kv_heads = 0;
  int64_t padded_q = 0, padded_kv = 0, padded_head_dim = 0, table_channels = 0;
  int64_t parts = 0;
  MaskKinds kinds;  // of quantization `segments` alone
  bool fp8_value = false;
};

// Dimensions of a mask to be packed.
struct PackSizes {
  int64_t heads = 0, length_q = 0, length_kv = 0, padded_q = 0;
};

// Dimensions of a search for the keys that are seen.
struct SeenSizes {
  int64_t batch = 0, heads = 0, kv_heads = 0;  // heads: that differ
  int64_t length_q = 0, length_kv = 0;
  bool mask = false, bias = false;
};

// Dimensions of a call that makes intervals.
struct IntervalSizes {
  int64_t batch = 0, all_batch = 0, kv_heads = 0;  // batch: whose intervals may differ
  int64_t length_q = 0, length_kv = 0, padded_q = 0;
  bool query_lengths = false, key_lengths = false;
};

// Dimensions of ids to be sorted.
struct SortSizes {
  int64_t batch = 0, length = 0;
};

// An empty message means that the call is right; `sizes`, if given, is then filled.
std::string CheckQuantize(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                          const Attrs& attrs, Sizes* sizes);
std::string CheckAttention(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                           const Attrs& attrs, Sizes* sizes);
std::string CheckPackMask(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                          const Attrs& attrs, PackSizes* sizes);
std::string CheckSeenKeys(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                          const Attrs& attrs, SeenSizes* sizes);
std::string CheckIntervals(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                           const Attrs& attrs, IntervalSizes* sizes);
std::string CheckSortIds(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                         const Attrs& attrs, SortSizes* sizes);

inline std::string CheckQuantize(const std::vector<Buffer>& args,
                                 const std::vector<Buffer>& results, const Attrs& attrs) {
  return CheckQuantize(args, results, attrs, nullptr);
}
inline std::string CheckAttention(const std::vector<Buffer>& args,
                                  const std::vector<Buffer>& results, const Attrs& attrs) {
  return CheckAttention(args, results, attrs, nullptr);
}
inline std::string CheckPackMask(const std::vector<Buffer>& args,
                                 const std::vector<Buffer>& results, const Attrs& attrs) {
  return CheckPackMask(args, results, attrs, nullptr);
}
inline std::string CheckSeenKeys(const std::vector<Buffer>& args,
                                 const std::vector<Buffer>& results, const Attrs& attrs) {
  return CheckSeenKeys(args, results, attrs, nullptr);
}
inline std::string CheckIntervals(const std::vector<Buffer>& args,
                                  const std::vector<Buffer>& results, const Attrs& attrs) {
  return CheckIntervals(args, results, attrs, nullptr);
}
inline std::string CheckSortIds(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                                const Attrs& attrs) {
  return CheckSortIds(args, results, attrs, nullptr);
}

}  // namespace jax_sage
