#include "checks.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <type_traits>

#include "common/layout.h"
#include "quantize/quantize.h"
#include "quantize/sort_ids.h"

namespace jax_sage {
namespace {

// The kernels hold lengths and head counts in 32 bits, and round lengths up.
constexpr int64_t kMaxLength = (int64_t{1} << 31) - 2 * kBlockQ;

int64_t RoundUp(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

std::string ToString(const std::vector<int64_t>& dims) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < dims.size(); ++i) out << (i ? ", " : "") << dims[i];
  out << "]";
  return out.str();
}

// Collects the first thing that is wrong. What that is, a text or a function of none, is not put
// into words before: for a short sequence words take longer than attention.
class Checker {
 public:
  explicit Checker(const char* call) : call_(call) {}

  bool Ok() const { return message_.empty(); }
  const std::string& message() const { return message_; }

  void Fail(const std::string& what) {
    if (message_.empty()) message_ = std::string("jax_sage: ") + call_ + ": " + what;
  }
  template <class What>
  void Require(bool condition, const What& what) {
    if (condition) return;
    if constexpr (std::is_invocable_v<What>) {
      Fail(what());
    } else {
      Fail(what);
    }
  }
  void Count(const char* kind, size_t given, size_t expected) {
    Require(given == expected, [&] {
      return std::to_string(given) + " " + kind + ", expected " + std::to_string(expected);
    });
  }
  void Is(const char* name, const Buffer& buffer, const std::string& dtype,
          const std::vector<int64_t>& dims) {
    Require(buffer.dtype == dtype && buffer.dims == dims, [&] {
      return std::string(name) + " is " + buffer.dtype + ToString(buffer.dims) + ", expected " +
             dtype + ToString(dims);
    });
  }
  // The same, where the dimensions may be 1 of which `flexible` has a bit; the first has bit 0.
  void IsOrOne(const char* name, const Buffer& buffer, const std::string& dtype,
               std::vector<int64_t> dims, unsigned flexible) {
    for (size_t i = 0; i < dims.size() && i < buffer.dims.size(); ++i) {
      if ((flexible >> i & 1) && buffer.dims[i] == 1) dims[i] = 1;
    }
    Is(name, buffer, dtype, dims);
  }
  double Attribute(const Attrs& attrs, const char* name) {
    const auto found = attrs.find(name);
    if (found == attrs.end()) {
      Fail(std::string("attribute ") + name + " is missing");
      return 0;
    }
    return found->second;
  }
  bool Flag(const Attrs& attrs, const char* name) {
    const double value = Attribute(attrs, name);
    Require(value == 0 || value == 1,
            [&] { return std::string("attribute ") + name + " must be 0 or 1"; });
    return value == 1;
  }

 private:
  const char* call_;
  std::string message_;
};

bool IsInput(const std::string& dtype) {
  return dtype == "F16" || dtype == "BF16" || dtype == "F32";
}

// Reads [*B, length, heads, head_dim].
void ReadTokens(Checker& check, const char* name, const Buffer& buffer, int64_t& batch,
                int64_t& length, int64_t& heads, int64_t& head_dim) {
  check.Require(IsInput(buffer.dtype), [&] {
    return std::string(name) + " is " + buffer.dtype + ", expected F16, BF16 or F32";
  });
  check.Require(buffer.dims.size() >= 3, [&] {
    return std::string(name) + " has rank " + std::to_string(buffer.dims.size()) +
           ", expected at least 3";
  });
  if (!check.Ok()) return;
  const size_t lead = buffer.dims.size() - 3;
  batch = 1;
  for (size_t i = 0; i < lead; ++i) batch *= buffer.dims[i];
  length = buffer.dims[lead];
  heads = buffer.dims[lead + 1];
  head_dim = buffer.dims[lead + 2];
  for (int64_t dim : buffer.dims) {
    check.Require(dim >= 1 && dim <= kMaxLength, [&] {
      return std::string(name) + ToString(buffer.dims) + " has a dimension out of range";
    });
  }
}

// Padded sizes follow from the others.
void Pad(Sizes& s) {
  s.padded_q = RoundUp(s.length_q, kBlockQ);
  s.padded_kv = RoundUp(s.length_kv, kBlockKv);
  s.padded_head_dim = RoundUp(s.head_dim, 64);
  s.table_channels = TableChannels(static_cast<int>(s.padded_head_dim));
}

// The nine buffers that pass from quantization to attention. With segments scales and offsets of V
// are by slot, and finished; the slots of the queries take the place of the sums, and two buffers
// more have what they see.
void CheckQuantized(Checker& check, const std::vector<Buffer>& b, Sizes& s) {
  s.fp8_value = b[5].dtype == "F8E4M3FN";
  const int64_t hp = s.padded_head_dim, hc = s.table_channels;
  check.Is("q", b[0], "S8", {s.batch, s.heads, s.padded_q, hp});
  check.Is("q_scale", b[1], "F32", {s.batch, s.heads, s.padded_q});
  check.Is("q_dot_mean", b[2], "F32", {s.batch, s.heads, s.padded_q});
  check.Is("k", b[3], "S8", {s.batch, s.kv_heads, s.padded_kv, hp});
  check.Is("k_scale", b[4], "F32", {s.batch, s.kv_heads, s.padded_kv / kBlockKv, kKeyScales});
  if (s.fp8_value) {
    check.Is("v", b[5], "F8E4M3FN", {s.batch, s.kv_heads, hp, s.padded_kv});
  } else {
    check.Is("v", b[5], "F16", {s.batch, s.kv_heads, s.padded_kv, hp});
  }
  check.Is("first_bad", b[7], "S32", {s.batch, s.kv_heads, kBadRows, hc});
  if (s.kinds.segments) {
    check.Is("channels", b[6], "F32", {s.batch, s.kv_heads, s.length_kv, kSlotRows, hc});
    check.Is("query_slots", b[8], "S32", {s.batch, s.padded_q});
    check.Is("segment_rows", b[9], "S32", {s.batch, s.padded_q, 2});
    check.Is("segment_groups", b[10], "S32", {s.batch, s.padded_q / kMaskRows, 4});
  } else {
    check.Is("channels", b[6], "F32", {s.batch, s.kv_heads, kChannelRows, hc});
    check.Is("value_code_sum", b[8], "U32", {s.batch, s.kv_heads, hc, 2});
  }
}

void CheckHeads(Checker& check, const Sizes& s) {
  check.Require(s.head_dim >= 1 && s.head_dim <= kMaxHeadDim, [&] {
    return "head_dim is " + std::to_string(s.head_dim) + ", allowed: 1 to " +
           std::to_string(kMaxHeadDim);
  });
  check.Require(s.kv_heads >= 1 && s.heads % s.kv_heads == 0, [&] {
    return std::to_string(s.heads) + " query heads are not a multiple of " +
           std::to_string(s.kv_heads) + " key/value heads";
  });
}

}  // namespace

std::string CheckQuantize(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                          const Attrs& attrs, Sizes* sizes) {
  Checker check("quantize");
  const bool some_seen = check.Flag(attrs, "some_seen");
  const bool segments = check.Flag(attrs, "segments");
  check.Require(!check.Flag(attrs, "skip_unseen") || (some_seen && !segments),
                "attribute skip_unseen needs some_seen and is not for segments");
  const bool own_segments = check.Flag(attrs, "own_segments");
  check.Require(segments || !own_segments, "attribute own_segments needs segments");
  check.Count("arguments", args.size(), 3 + some_seen + (segments ? 5 : some_seen));
  check.Count("results", results.size(), segments ? 21 : 11);
  if (!check.Ok()) return check.message();

  Sizes s;
  s.kinds.segments = segments;
  int64_t batch = 0;
  ReadTokens(check, "query", args[0], s.batch, s.length_q, s.heads, s.head_dim);
  int64_t head_dim = 0;
  ReadTokens(check, "key", args[1], batch, s.length_kv, s.kv_heads, head_dim);
  if (!check.Ok()) return check.message();
  check.Require(batch == s.batch && head_dim == s.head_dim, [&] {
    return "key " + ToString(args[1].dims) + " does not fit query " + ToString(args[0].dims);
  });
  check.Is("key", args[1], args[0].dtype, args[1].dims);
  check.Is("value", args[2], args[1].dtype, args[1].dims);
  CheckHeads(check, s);
  if (!check.Ok()) return check.message();
  if (some_seen) {
    check.IsOrOne("seen", args[3], "U8", {s.batch, s.kv_heads, s.length_kv}, 3);
  }

  Pad(s);
  if (segments) {
    const size_t next = 3 + some_seen;
    check.IsOrOne("query_ids", args[next], "S32", {s.batch, s.padded_q}, 1);
    check.IsOrOne("sorted_ids", args[next + 1], "S32", {s.batch, s.length_kv}, 1);
    check.Is("order", args[next + 2], "S32", args[next + 1].dims);
    std::vector<int64_t> of_keys = args[next + 1].dims;
    of_keys.push_back(2);
    check.Is("key_slots", args[next + 3], "S32", of_keys);
    check.IsOrOne("rows", args[next + 4], "S32", {s.batch, s.padded_q, 2}, 1);
    check.Require(!own_segments || s.length_q == s.length_kv,
                  "attribute own_segments needs as many queries as keys");
  } else if (some_seen) {
    check.Is("per_counted_key", args[4], "F32", {s.batch, s.kv_heads});
  }
  CheckQuantized(check, results, s);
  const Buffer& partials = results[segments ? 11 : 9];
  const size_t lead = segments ? 3 : 2;
  check.Require(partials.dims.size() == lead + 3,
                [&] { return "partials must have rank " + std::to_string(lead + 3); });
  if (!check.Ok()) return check.message();
  s.parts = partials.dims[lead];
  const int64_t hc = s.table_channels;
  if (segments) {
    check.Is("partials", partials, "F32",
             {s.batch, s.kv_heads, kPieces, s.parts, kPartialRows, hc});
    check.Is("piece_counts", results[12], "S32", {s.batch, s.kv_heads, 2, kPieces, s.parts});
    check.Is("slot_means", results[13], "BF16", {s.batch, s.kv_heads, s.length_kv, hc});
    check.Is("slot_factors", results[14], "F32", {s.batch, s.kv_heads, s.length_kv, 2});
    check.Is("value_code_sum", results[15], "U32", {s.batch, s.kv_heads, s.length_kv, hc, 2});
    check.Is("piece_arrivals", results[16], "S32", {s.batch, s.kv_heads, 2, s.parts});
    check.Is("arrivals", results[17], "S32", {s.batch, s.kv_heads, 2});
    check.Is("runs", results[18], "S32", {s.batch, s.length_kv, 4});
    check.Is("part_slots", results[19], "S32", {s.batch, s.parts});
    check.Is("block_slots", results[20], "S32",
             {s.batch, (s.padded_q + kQueriesOfSlots - 1) / kQueriesOfSlots});
  } else {
    check.Is("partials", partials, "F32", {s.batch, s.kv_heads, s.parts, kPartialRows, hc});
    check.Is("arrivals", results[10], "S32", {s.batch, s.kv_heads, 2});
  }
  check.Require(s.parts >= 1 && s.parts <= s.length_kv, [&] {
    return "partials cuts " + std::to_string(s.length_kv) + " keys into " +
           std::to_string(s.parts) + " parts";
  });
  check.Require(std::isfinite(check.Attribute(attrs, "scale_log2")),
                "attribute scale_log2 is not finite");
  check.Flag(attrs, "smooth_k");
  check.Flag(attrs, "smooth_v");
  if (check.Ok() && sizes != nullptr) *sizes = s;
  return check.message();
}

namespace {

// What follows the quantized buffers of a masked call. ReadMasks in ffi.cc repeats their places.
void CheckMasks(Checker& check, const std::vector<Buffer>& args, const Buffer& out, const Sizes& s,
                const MaskKinds& kinds) {
  const int64_t groups = s.padded_q / kMaskRows;
  const int64_t tiles = RoundUp(s.length_kv, kMaskKeys) / kMaskKeys;
  size_t next = kinds.segments ? 11 : 9;
  if (kinds.counted) check.Is("per_counted_key", args[next++], "F32", {s.batch, s.kv_heads});
  check.IsOrOne("rows", args[next], "S32", {s.batch, s.padded_q, 2}, 1);
  check.IsOrOne("groups", args[next + 1], "S32", {s.batch, groups, 4}, 1);
  std::vector<int64_t> tokens = out.dims;
  tokens[tokens.size() - 3] = s.length_kv;
  tokens[tokens.size() - 2] = s.kv_heads;
  check.Is("key", args[next + 2], out.dtype, tokens);
  check.Is("value", args[next + 3], out.dtype, tokens);
  next += 4;
  if (kinds.mask) {
    check.IsOrOne("words", args[next], "U32", {s.batch, s.heads, tiles, s.padded_q, 4},
                  1 | 2 | 4 | 8);
    check.IsOrOne("views", args[next + 1], "U8", {s.batch, s.heads, groups, tiles}, 1 | 2 | 4 | 8);
    next += 2;
  }
  if (kinds.segments) {
    check.IsOrOne("query_ids", args[next], "S32", {s.batch, s.padded_q}, 1);
    check.IsOrOne("key_ids", args[next + 1], "S32", {s.batch, tiles * kMaskKeys}, 1);
    check.IsOrOne("query_ranges", args[next + 2], "S32", {s.batch, groups, 2}, 1);
    check.IsOrOne("key_ranges", args[next + 3], "S32", {s.batch, tiles, 2}, 1);
    // Of as many entries as have ids of their own.
    if (check.Ok()) check.Is("scattered", args.back(), "S32", {args[next + 1].dims[0]});
    next += 4;
  }
  if (kinds.bias) {
    const Buffer& bias = args[next];
    check.Require(IsInput(bias.dtype),
                  [&] { return "bias is " + bias.dtype + ", expected F16, BF16 or F32"; });
    // Two columns stand for all.
    const bool is_column = bias.dims.size() == 4 && bias.dims[3] == 2;
    check.IsOrOne("bias", bias, bias.dtype,
                  {s.batch, s.heads, s.length_q, is_column ? 2 : tiles * kMaskKeys}, 1 | 2 | 4);
  }
}

}  // namespace

std::string CheckAttention(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                           const Attrs& attrs, Sizes* sizes) {
  Checker check("attention");
  MaskKinds kinds;
  kinds.masked = check.Flag(attrs, "masked");
  kinds.mask = check.Flag(attrs, "mask");
  kinds.segments = check.Flag(attrs, "segments");
  kinds.bias = check.Flag(attrs, "bias");
  kinds.counted = check.Flag(attrs, "counted");
  check.Require(kinds.masked || !(kinds.mask || kinds.segments || kinds.bias || kinds.counted),
                "attributes mask, segments, bias and counted need masked");
  check.Require(!(kinds.segments && kinds.counted), "attribute counted is not for segments");
  check.Require(kinds.segments || kinds.counted || !(kinds.mask || kinds.bias),
                "attributes mask and bias need counted, unless there are segments");
  const bool by_intervals = check.Flag(attrs, "by_intervals");
  check.Require(!by_intervals || (kinds.segments && !kinds.mask && !kinds.bias),
                "attribute by_intervals is for segments without a mask or a bias");
  check.Count("arguments", args.size(),
              9 + (kinds.masked ? 4 : 0) + (kinds.counted ? 1 : 0) + (kinds.mask ? 2 : 0) +
                  (kinds.segments ? 2 + 5 : 0) + (kinds.bias ? 1 : 0));
  check.Count("results", results.size(), 2);
  if (!check.Ok()) return check.message();

  Sizes s;
  ReadTokens(check, "out", results[0], s.batch, s.length_q, s.heads, s.head_dim);
  const double length_kv = check.Attribute(attrs, "length_kv");
  check.Require(length_kv >= 1 && length_kv <= kMaxLength, "attribute length_kv is out of range");
  check.Require(args[3].dims.size() == 4, "k must have rank 4");
  if (!check.Ok()) return check.message();
  s.length_kv = static_cast<int64_t>(length_kv);
  s.kv_heads = args[3].dims[1];
  s.kinds = kinds;
  CheckHeads(check, s);
  if (!check.Ok()) return check.message();

  Pad(s);
  CheckQuantized(check, args, s);
  std::vector<int64_t> lse_dims = results[0].dims;
  lse_dims.pop_back();
  check.Is("lse", results[1], "F32", lse_dims);
  if (kinds.masked) CheckMasks(check, args, results[0], s, kinds);
  check.Require(!(check.Flag(attrs, "is_causal") && kinds.masked),
                "attribute is_causal is not for masked calls: rows say what is seen");
  check.Flag(attrs, "alike");
  check.Flag(attrs, "with_lse");
  const double accumulator = check.Attribute(attrs, "pv_accumulator");
  check.Require(accumulator == 16 || accumulator == 32,
                "attribute pv_accumulator must be 16 or 32");
  check.Flag(attrs, "mma_sync");
  if (check.Ok() && sizes != nullptr) *sizes = s;
  return check.message();
}

std::string CheckPackMask(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                          const Attrs&, PackSizes* sizes) {
  Checker check("pack_mask");
  check.Count("arguments", args.size(), 1);
  check.Count("results", results.size(), 2);
  if (!check.Ok()) return check.message();
  const std::vector<int64_t>& dims = args[0].dims;
  check.Require(args[0].dtype == "PRED" && dims.size() == 4, [&] {
    return "mask is " + args[0].dtype + ToString(dims) + ", expected PRED of rank 4";
  });
  for (int64_t dim : dims) {
    check.Require(dim >= 1 && dim <= kMaxLength,
                  [&] { return "mask" + ToString(dims) + " has a dimension out of range"; });
  }
  if (!check.Ok()) return check.message();
  PackSizes s;
  s.heads = dims[0] * dims[1];
  s.length_q = dims[2];
  s.length_kv = dims[3];
  const int64_t tiles = RoundUp(s.length_kv, kMaskKeys) / kMaskKeys;
  // One row may stand for all, or be the only one.
  const bool one = s.length_q == 1 && results[0].dims.size() == 5 && results[0].dims[3] == 1;
  s.padded_q = one ? 1 : RoundUp(s.length_q, kBlockQ);
  check.Is("words", results[0], "U32", {dims[0], dims[1], tiles, s.padded_q, 4});
  check.Is("views", results[1], "U8",
           {dims[0], dims[1], RoundUp(s.padded_q, kMaskRows) / kMaskRows, tiles});
  if (check.Ok() && sizes != nullptr) *sizes = s;
  return check.message();
}

std::string CheckSeenKeys(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                          const Attrs& attrs, SeenSizes* sizes) {
  Checker check("seen_keys");
  SeenSizes s;
  s.mask = check.Flag(attrs, "mask");
  s.bias = check.Flag(attrs, "bias");
  check.Require(s.mask || s.bias, "attributes mask and bias are both 0");
  check.Count("arguments", args.size(), 1 + s.mask + s.bias);
  check.Count("results", results.size(), 1);
  const double length_q = check.Attribute(attrs, "length_q");
  check.Require(length_q >= 1 && length_q <= kMaxLength, "attribute length_q is out of range");
  if (!check.Ok()) return check.message();
  const Buffer& seen = results[0];
  check.Require(seen.dtype == "U8" && seen.dims.size() == 3, [&] {
    return "seen is " + seen.dtype + ToString(seen.dims) + ", expected U8 of rank 3";
  });
  for (int64_t dim : seen.dims) {
    check.Require(dim >= 1 && dim <= kMaxLength,
                  [&] { return "seen" + ToString(seen.dims) + " has a dimension out of range"; });
  }
  if (!check.Ok()) return check.message();
  s.batch = seen.dims[0];
  s.kv_heads = seen.dims[1];
  s.length_kv = seen.dims[2];
  s.length_q = static_cast<int64_t>(length_q);
  check.IsOrOne("rows", args[0], "S32", {s.batch, RoundUp(s.length_q, kBlockQ), 2}, 1);
  for (size_t i = 1; i < args.size(); ++i) {
    if (args[i].dims.size() == 4 && args[i].dims[1] > 1) s.heads = args[i].dims[1];
  }
  s.heads = std::max(s.heads, s.kv_heads);
  const std::vector<int64_t> whole = {s.batch, s.heads, s.length_q, s.length_kv};
  size_t next = 1;
  if (s.mask) check.IsOrOne("mask", args[next++], "PRED", whole, 1 | 2 | 4 | 8);
  if (s.bias) {
    const Buffer& bias = args[next];
    check.Require(IsInput(bias.dtype),
                  [&] { return "bias is " + bias.dtype + ", expected F16, BF16 or F32"; });
    check.IsOrOne("bias", bias, bias.dtype, whole, 1 | 2 | 4 | 8);
  }
  check.Require(s.heads % s.kv_heads == 0, [&] {
    return "seen" + ToString(seen.dims) + " has " + std::to_string(s.kv_heads) +
           " heads, which do not divide " + std::to_string(s.heads);
  });
  if (check.Ok() && sizes != nullptr) *sizes = s;
  return check.message();
}

std::string CheckIntervals(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                           const Attrs& attrs, IntervalSizes* sizes) {
  Checker check("intervals");
  IntervalSizes s;
  s.query_lengths = check.Flag(attrs, "query_lengths");
  s.key_lengths = check.Flag(attrs, "key_lengths");
  check.Flag(attrs, "bottom_right");
  check.Count("arguments", args.size(), s.query_lengths + s.key_lengths);
  check.Count("results", results.size(), 4);
  const double length_q = check.Attribute(attrs, "length_q");
  check.Require(length_q >= 1 && length_q <= kMaxLength, "attribute length_q is out of range");
  constexpr double kMaxLimit = int64_t{1} << 32;
  const double left = check.Attribute(attrs, "left"), right = check.Attribute(attrs, "right");
  check.Require(left >= -1 && left <= kMaxLimit, "attribute left is out of range");
  check.Require(right >= -1 && right <= kMaxLimit, "attribute right is out of range");
  if (!check.Ok()) return check.message();
  const Buffer &seen = results[2], &per_counted_key = results[3];
  check.Require(seen.dtype == "U8" && seen.dims.size() == 3, [&] {
    return "seen is " + seen.dtype + ToString(seen.dims) + ", expected U8 of rank 3";
  });
  check.Require(per_counted_key.dtype == "F32" && per_counted_key.dims.size() == 2, [&] {
    return "per_counted_key is " + per_counted_key.dtype + ToString(per_counted_key.dims) +
           ", expected F32 of rank 2";
  });
  if (!check.Ok()) return check.message();
  for (const Buffer* buffer : {&seen, &per_counted_key}) {
    for (int64_t dim : buffer->dims) {
      check.Require(dim >= 1 && dim <= kMaxLength, [&] {
        return std::string(buffer == &seen ? "seen" : "per_counted_key") + ToString(buffer->dims) +
               " has a dimension out of range";
      });
    }
  }
  if (!check.Ok()) return check.message();
  s.batch = seen.dims[0];
  s.length_kv = seen.dims[2];
  s.all_batch = per_counted_key.dims[0];
  s.kv_heads = per_counted_key.dims[1];
  s.length_q = static_cast<int64_t>(length_q);
  s.padded_q = RoundUp(s.length_q, kBlockQ);
  check.Require(s.batch == 1 || s.batch == s.all_batch, [&] {
    return "seen" + ToString(seen.dims) + " does not fit per_counted_key" +
           ToString(per_counted_key.dims);
  });
  check.Is("seen", seen, "U8", {s.batch, 1, s.length_kv});
  check.Is("rows", results[0], "S32", {s.batch, s.padded_q, 2});
  check.Is("groups", results[1], "S32", {s.batch, s.padded_q / kMaskRows, 4});
  if (s.query_lengths) check.Is("query_lengths", args[0], "S32", {s.batch});
  if (s.key_lengths) check.Is("key_lengths", args.back(), "S32", {s.batch});
  if (check.Ok() && sizes != nullptr) *sizes = s;
  return check.message();
}

std::string CheckSortIds(const std::vector<Buffer>& args, const std::vector<Buffer>& results,
                         const Attrs&, SortSizes* sizes) {
  Checker check("sort_ids");
  check.Count("arguments", args.size(), 1);
  check.Count("results", results.size(), 6);
  if (!check.Ok()) return check.message();
  const std::vector<int64_t>& dims = args[0].dims;
  check.Require(args[0].dtype == "S32" && dims.size() == 2, [&] {
    return "ids is " + args[0].dtype + ToString(dims) + ", expected S32 of rank 2";
  });
  if (!check.Ok()) return check.message();
  check.Require(dims[0] >= 1 && dims[0] <= kMaxLength,
                [&] { return "ids" + ToString(dims) + " has a batch size out of range"; });
  check.Require(dims[1] >= 1 && dims[1] <= kMostSorted, [&] {
    return "ids" + ToString(dims) + " has a length that is not 1 to " + std::to_string(kMostSorted);
  });
  check.Is("sorted_ids", results[0], "S32", dims);
  check.Is("order", results[1], "S32", dims);
  check.Is("slots", results[2], "S32", {dims[0], dims[1], 2});
  check.Is("scattered", results[3], "S32", {dims[0]});
  const int64_t tiles = (dims[1] + kMaskKeys - 1) / kMaskKeys;
  check.Is("group_ranges", results[4], "S32", {dims[0], tiles * (kMaskKeys / kMaskRows), 2});
  check.Is("tile_ranges", results[5], "S32", {dims[0], tiles, 2});
  if (check.Ok() && sizes != nullptr) *sizes = {dims[0], dims[1]};
  return check.message();
}

}  // namespace jax_sage
