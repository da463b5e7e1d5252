// XLA FFI handlers: decode, check, launch. They keep no state, launch on XLA's stream only and
// allocate nothing, so a CUDA graph may capture them (kCmdBufferCompatible).
#include "ffi.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "mask/intervals.h"
#include "mask/mark.h"
#include "mask/pack.h"
#include "mask/seen.h"
#include "mma/attention.h"
#include "quantize/quantize.h"
#include "quantize/sort_ids.h"
#ifdef JAX_SAGE_SM90
#include "sm90/attention.h"
#endif
#include "xla/ffi/api/ffi.h"

namespace jax_sage {
namespace {

namespace ffi = xla::ffi;

std::string DTypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F16:
      return "F16";
    case ffi::DataType::BF16:
      return "BF16";
    case ffi::DataType::F32:
      return "F32";
    case ffi::DataType::S8:
      return "S8";
    case ffi::DataType::PRED:
      return "PRED";
    case ffi::DataType::U8:
      return "U8";
    case ffi::DataType::S32:
      return "S32";
    case ffi::DataType::U32:
      return "U32";
    case ffi::DataType::F8E4M3FN:
      return "F8E4M3FN";
    default:
      return "dtype" + std::to_string(static_cast<int>(dtype));
  }
}

// Of an input buffer that passed its check.
DType InputType(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F16:
      return DType::kF16;
    case ffi::DataType::BF16:
      return DType::kBf16;
    default:
      return DType::kF32;
  }
}

Buffer Describe(const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return {DTypeName(buffer.element_type()), {dims.begin(), dims.end()}};
}

ffi::Error Invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

ffi::Error FromCuda(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  cudaGetLastError();  // leave nothing behind that a later call would report
  std::string message = std::string("jax_sage: ") + call + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message +=
        " (this GPU's architecture is not in the build: python -m jax_sage lists those that are; "
        "reinstall with JAX_SAGE_CUDA_ARCHS set to it)";
  }
  return ffi::Error(ffi::ErrorCode::kInternal, message);
}

template <class T>
T* Data(ffi::AnyBuffer buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// Elements from one entry of dimension `dim` to the next; 0 where there is one for all.
int64_t Stride(const ffi::AnyBuffer& buffer, size_t dim) {
  const auto dims = buffer.dimensions();
  if (dims[dim] == 1) return 0;
  int64_t stride = 1;
  for (size_t i = dim + 1; i < dims.size(); ++i) stride *= dims[i];
  return stride;
}

ffi::Error Collect(ffi::RemainingArgs args, std::vector<ffi::AnyBuffer>& buffers,
                   std::vector<Buffer>& described) {
  for (size_t i = 0; i < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    if (!arg) return arg.error();
    buffers.push_back(*arg);
    described.push_back(Describe(buffers.back()));
  }
  return ffi::Error::Success();
}

// Whether this GPU runs the kernels for Hopper: the build has some.
ffi::Error IsOnHopper(const char* call, bool& result) {
#ifndef JAX_SAGE_SM90
  result = false;
  return ffi::Error::Success();
#endif
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  result = major == 9;
  return FromCuda(call, error);
}

ffi::Error TooManyChannels(const char* call, int64_t head_dim) {
  return Invalid(std::string("jax_sage: ") + call + ": head_dim is " + std::to_string(head_dim) +
                 ", and the kernels on mma.sync take up to " + std::to_string(kMaxHeadDimMma) +
                 ": this call was lowered for a Hopper GPU");
}

ffi::Error QuantizeImpl(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                        float scale_log2, int64_t smooth_k, int64_t smooth_v, int64_t some_seen,
                        int64_t skip_unseen, int64_t segments, int64_t own_segments) {
  std::vector<ffi::AnyBuffer> in;
  std::vector<Buffer> described;
  if (auto error = Collect(args, in, described); error.failure()) return error;
  std::vector<ffi::AnyBuffer> out;
  std::vector<Buffer> results;
  for (size_t i = 0; i < rets.size(); ++i) {
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (!ret) return ret.error();
    out.push_back(**ret);
    results.push_back(Describe(out.back()));
  }
  Sizes sizes;
  const std::string message = CheckQuantize(described, results,
                                            {{"scale_log2", scale_log2},
                                             {"smooth_k", static_cast<double>(smooth_k)},
                                             {"smooth_v", static_cast<double>(smooth_v)},
                                             {"some_seen", static_cast<double>(some_seen)},
                                             {"skip_unseen", static_cast<double>(skip_unseen)},
                                             {"segments", static_cast<double>(segments)},
                                             {"own_segments", static_cast<double>(own_segments)}},
                                            &sizes);
  if (!message.empty()) return Invalid(message);
  if (sizes.head_dim > kMaxHeadDimMma) {
    bool on_hopper = false;
    if (auto error = IsOnHopper("quantize", on_hopper); error.failure()) return error;
    if (!on_hopper) return TooManyChannels("quantize", sizes.head_dim);
  }

  SegmentedParams params{};
  params.query = in[0].untyped_data();
  params.key = in[1].untyped_data();
  params.value = in[2].untyped_data();
  params.type = InputType(in[0]);
  if (some_seen != 0) {
    params.seen = Data<uint8_t>(in[3]);
    params.seen_batch_stride = Stride(in[3], 0);
    params.seen_head_stride = Stride(in[3], 1);
  }
  params.q = Data<int8_t>(out[0]);
  params.q_scale = Data<float>(out[1]);
  params.q_dot_mean = Data<float>(out[2]);
  params.k = Data<int8_t>(out[3]);
  params.k_scale = Data<float>(out[4]);
  params.v = out[5].untyped_data();
  params.first_bad = Data<int32_t>(out[7]);
  if (segments != 0) {
    const size_t next = some_seen != 0 ? 4 : 3;
    params.query_ids = Data<int32_t>(in[next]);
    params.query_id_stride = Stride(in[next], 0);
    params.sorted_ids = Data<int32_t>(in[next + 1]);
    params.key_id_stride = Stride(in[next + 1], 0);
    params.order = Data<int32_t>(in[next + 2]);
    params.key_slots = Data<int2>(in[next + 3]);
    params.rows = Data<int2>(in[next + 4]);
    params.row_stride = Stride(in[next + 4], 0) / 2;
    params.own_segments = own_segments != 0;
    params.slot_channels = Data<float>(out[6]);
    params.query_slots = Data<int32_t>(out[8]);
    params.segment_rows = Data<int2>(out[9]);
    params.segment_groups = Data<int4>(out[10]);
    params.partials = Data<float>(out[11]);
    params.piece_counts = Data<int32_t>(out[12]);
    params.slot_means = Data<__nv_bfloat16>(out[13]);
    params.slot_factors = Data<float2>(out[14]);
    params.value_code_sum = Data<long long>(out[15]);
    params.piece_arrivals = Data<int32_t>(out[16]);
    params.arrivals = Data<int32_t>(out[17]);
    params.runs = Data<SegmentRun>(out[18]);
    params.part_slots = Data<int32_t>(out[19]);
    params.block_slots = Data<int32_t>(out[20]);
  } else {
    params.partials = Data<float>(out[9]);
    if (some_seen != 0) params.per_counted_key = Data<float>(in[4]);
    params.channels = Data<float>(out[6]);
    params.value_code_sum = Data<long long>(out[8]);
    params.arrivals = Data<int32_t>(out[10]);
  }
  params.batch = sizes.batch;
  params.heads = Divisor(static_cast<int>(sizes.heads));
  params.kv_heads = Divisor(static_cast<int>(sizes.kv_heads));
  params.length_q = static_cast<int>(sizes.length_q);
  params.length_kv = static_cast<int>(sizes.length_kv);
  params.padded_q = static_cast<int>(sizes.padded_q);
  params.padded_kv = static_cast<int>(sizes.padded_kv);
  params.head_dim = static_cast<int>(sizes.head_dim);
  params.padded_head_dim = static_cast<int>(sizes.padded_head_dim);
  params.parts = Divisor(static_cast<int>(sizes.parts));
  params.scale_log2 = scale_log2;
  params.q_scale_factor = static_cast<float>(std::fabs(static_cast<double>(scale_log2)) / kInt8Max);
  params.smooth_k = smooth_k != 0;
  params.smooth_v = smooth_v != 0;
  params.fp8_value = sizes.fp8_value;
  params.skip_unseen = skip_unseen != 0;
  return FromCuda("quantize", segments != 0 ? LaunchQuantizeSegments(params, stream)
                                            : LaunchQuantize(params, stream));
}

// The buffers behind those that quantization made, in the order of CheckMasks.
void ReadMasks(const std::vector<ffi::AnyBuffer>& in, const MaskKinds& kinds, bool by_intervals,
               AttentionParams& params, MarkParams& mark) {
  size_t next = kinds.segments ? 11 : 9;
  if (kinds.counted) params.per_counted_key = Data<float>(in[next++]);
  MaskParams& masks = params.masks;
  masks.rows = Data<const int2>(in[next]);
  masks.row_stride = Stride(in[next], 0) / 2;
  masks.groups = Data<const int4>(in[next + 1]);
  masks.group_stride = Stride(in[next + 1], 0) / 4;
  mark = {in[next + 2].untyped_data(), in[next + 3].untyped_data(), params.first_bad};
  next += 4;
  if (kinds.mask) {
    const ffi::AnyBuffer& words = in[next];
    const ffi::AnyBuffer& views = in[next + 1];
    masks.words = Data<const uint32_t>(words);
    masks.word_batch_stride = Stride(words, 0);
    masks.word_head_stride = Stride(words, 1);
    masks.word_tile_stride = Stride(words, 2);
    masks.word_row_stride = static_cast<int>(Stride(words, 3));  // 4, or 0
    masks.views = Data<const uint8_t>(views);
    masks.view_batch_stride = Stride(views, 0);
    masks.view_head_stride = Stride(views, 1);
    masks.view_group_stride = static_cast<int>(Stride(views, 2));
    masks.view_tile_stride = static_cast<int>(Stride(views, 3));
    next += 2;
  }
  if (kinds.segments) {
    masks.query_ids = Data<const int>(in[next]);
    masks.query_id_stride = Stride(in[next], 0);
    masks.key_ids = Data<const int>(in[next + 1]);
    masks.key_id_stride = Stride(in[next + 1], 0);
    masks.query_ranges = Data<const int2>(in[next + 2]);
    masks.query_range_stride = Stride(in[next + 2], 0) / 2;
    masks.key_ranges = Data<const int2>(in[next + 3]);
    masks.key_range_stride = Stride(in[next + 3], 0) / 2;
    if (by_intervals) {
      params.segment_rows = Data<const int2>(in[9]);
      params.segment_groups = Data<const int4>(in[10]);
      params.scattered = Data<const int32_t>(in.back());
      params.scattered_stride = Stride(in.back(), 0);
    }
    next += 4;
  }
  if (kinds.bias) {
    const ffi::AnyBuffer& bias = in[next];
    masks.bias = bias.untyped_data();
    masks.bias_type = InputType(bias);
    masks.bias_batch_stride = Stride(bias, 0);
    masks.bias_head_stride = Stride(bias, 1);
    masks.bias_row_stride = Stride(bias, 2);
    masks.bias_column_stride = bias.dimensions()[3] == 2 ? 0 : 1;
  }
}

// The fastest kernel that the GPU has; with `mma_sync` that of cuda/mma in any case.
ffi::Error LaunchAttention(const AttentionParams& params, bool fp8_value, bool fp16_accumulator,
                           bool mma_sync, cudaStream_t stream) {
  constexpr const char* kCall = "attention";
#ifdef JAX_SAGE_SM90
  // Of the recipes, those with names: FP8 with FP16 sums, FP16 with FP32 sums.
  if (!mma_sync && fp8_value == fp16_accumulator) {
    bool on_hopper = false;
    if (auto error = IsOnHopper(kCall, on_hopper); error.failure()) return error;
    if (on_hopper) {
      if (params.scattered != nullptr) {
        AttentionParams by_intervals = params;
        by_intervals.masks = {};
        by_intervals.masks.rows = params.segment_rows;
        by_intervals.masks.row_stride = params.padded_q;
        by_intervals.masks.groups = params.segment_groups;
        by_intervals.masks.group_stride = params.padded_q / kMaskRows;
        const cudaError_t error = fp8_value ? sm90::LaunchSegmentsFp8(by_intervals, stream)
                                            : sm90::LaunchSegmentsFp16(by_intervals, stream);
        if (error != cudaSuccess) return FromCuda(kCall, error);
      }
      if (!params.masks.AreIntervals() || params.masks.bias != nullptr) {
        return FromCuda(kCall, fp8_value ? sm90::LaunchMaskedFp8(params, stream)
                                         : sm90::LaunchMaskedFp16(params, stream));
      }
      return FromCuda(kCall, fp8_value ? sm90::LaunchAttentionFp8(params, stream)
                                       : sm90::LaunchAttentionFp16(params, stream));
    }
  }
#endif
  if (params.head_dim > kMaxHeadDimMma) return TooManyChannels(kCall, params.head_dim);
#ifndef JAX_SAGE_NO_FP8_MMA
  if (fp8_value) {
    return FromCuda(kCall, mma::LaunchAttentionFp8(params, fp16_accumulator, stream));
  }
#endif
  return FromCuda(kCall, mma::LaunchAttentionFp16(params, fp16_accumulator, stream));
}

ffi::Error AttentionImpl(cudaStream_t stream, ffi::RemainingArgs args,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                         int64_t length_kv, int64_t is_causal, int64_t alike, int64_t with_lse,
                         int64_t pv_accumulator, int64_t mma_sync, int64_t masked, int64_t mask,
                         int64_t segments, int64_t bias, int64_t counted, int64_t by_intervals) {
  std::vector<ffi::AnyBuffer> in;
  std::vector<Buffer> described;
  if (auto error = Collect(args, in, described); error.failure()) return error;
  Sizes sizes;
  const std::string message =
      CheckAttention(described, {Describe(*out), Describe(*lse)},
                     {{"length_kv", static_cast<double>(length_kv)},
                      {"is_causal", static_cast<double>(is_causal)},
                      {"alike", static_cast<double>(alike)},
                      {"with_lse", static_cast<double>(with_lse)},
                      {"pv_accumulator", static_cast<double>(pv_accumulator)},
                      {"mma_sync", static_cast<double>(mma_sync)},
                      {"masked", static_cast<double>(masked)},
                      {"mask", static_cast<double>(mask)},
                      {"segments", static_cast<double>(segments)},
                      {"bias", static_cast<double>(bias)},
                      {"counted", static_cast<double>(counted)},
                      {"by_intervals", static_cast<double>(by_intervals)}},
                     &sizes);
  if (!message.empty()) return Invalid(message);

  AttentionParams params{};
  params.q = Data<int8_t>(in[0]);
  params.q_scale = Data<float>(in[1]);
  params.q_dot_mean = Data<float>(in[2]);
  params.k = Data<int8_t>(in[3]);
  params.k_scale = Data<float>(in[4]);
  params.v = in[5].untyped_data();
  params.first_bad = Data<int32_t>(in[7]);
  if (segments != 0) {
    params.slot_channels = Data<float>(in[6]);
    params.query_slots = Data<int32_t>(in[8]);
  } else {
    params.channels = Data<float>(in[6]);
    params.value_code_sum = Data<long long>(in[8]);
  }
  params.out = out->untyped_data();
  params.lse = Data<float>(*lse);
  params.batch = sizes.batch;
  params.heads = static_cast<int>(sizes.heads);
  params.kv_heads = static_cast<int>(sizes.kv_heads);
  params.length_q = static_cast<int>(sizes.length_q);
  params.length_kv = static_cast<int>(sizes.length_kv);
  params.padded_q = static_cast<int>(sizes.padded_q);
  params.padded_kv = static_cast<int>(sizes.padded_kv);
  params.per_key = static_cast<float>(1.0 / static_cast<double>(sizes.length_kv));
  params.head_dim = static_cast<int>(sizes.head_dim);
  params.padded_head_dim = static_cast<int>(sizes.padded_head_dim);
  params.is_causal = is_causal != 0;
  params.alike = alike != 0;
  params.with_lse = with_lse != 0;
  params.out_type = InputType(*out);
  MarkParams mark{};
  if (masked != 0) ReadMasks(in, sizes.kinds, by_intervals != 0, params, mark);
#ifdef JAX_SAGE_NO_FP8_MMA
  if (sizes.fp8_value) {
    return Invalid(
        "jax_sage: attention: no architecture of this build has E4M3 matrix instructions (sm_89 "
        "and newer); use recipe=\"8+16\"");
  }
#endif
  ffi::Error error =
      LaunchAttention(params, sizes.fp8_value, pv_accumulator == 16, mma_sync != 0, stream);
  if (error.failure() || masked == 0) return error;
  return FromCuda("attention", LaunchMark(params, mark, stream));
}

ffi::Error PackMaskImpl(cudaStream_t stream, ffi::AnyBuffer mask, ffi::Result<ffi::AnyBuffer> words,
                        ffi::Result<ffi::AnyBuffer> views) {
  PackSizes sizes;
  const std::string message =
      CheckPackMask({Describe(mask)}, {Describe(*words), Describe(*views)}, {}, &sizes);
  if (!message.empty()) return Invalid(message);
  PackParams params{};
  params.mask = Data<uint8_t>(mask);
  params.words = Data<uint32_t>(*words);
  params.views = Data<uint8_t>(*views);
  params.heads = sizes.heads;
  params.length_q = static_cast<int>(sizes.length_q);
  params.length_kv = static_cast<int>(sizes.length_kv);
  params.padded_q = static_cast<int>(sizes.padded_q);
  return FromCuda("pack_mask", LaunchPack(params, stream));
}

ffi::Error SeenKeysImpl(cudaStream_t stream, ffi::RemainingArgs args,
                        ffi::Result<ffi::AnyBuffer> seen, int64_t length_q, int64_t mask,
                        int64_t bias) {
  std::vector<ffi::AnyBuffer> in;
  std::vector<Buffer> described;
  if (auto error = Collect(args, in, described); error.failure()) return error;
  SeenSizes sizes;
  const std::string message = CheckSeenKeys(described, {Describe(*seen)},
                                            {{"length_q", static_cast<double>(length_q)},
                                             {"mask", static_cast<double>(mask)},
                                             {"bias", static_cast<double>(bias)}},
                                            &sizes);
  if (!message.empty()) return Invalid(message);
  SeenParams params{};
  params.rows = Data<const int2>(in[0]);
  params.row_stride = Stride(in[0], 0) / 2;
  size_t next = 1;
  if (sizes.mask) {
    const ffi::AnyBuffer& buffer = in[next++];
    params.mask = Data<const uint8_t>(buffer);
    params.mask_batch_stride = Stride(buffer, 0);
    params.mask_head_stride = Stride(buffer, 1);
    params.mask_row_stride = Stride(buffer, 2);
    params.mask_column_stride = Stride(buffer, 3);
  }
  if (sizes.bias) {
    const ffi::AnyBuffer& buffer = in[next];
    params.bias = buffer.untyped_data();
    params.bias_type = InputType(buffer);
    params.bias_batch_stride = Stride(buffer, 0);
    params.bias_head_stride = Stride(buffer, 1);
    params.bias_row_stride = Stride(buffer, 2);
    params.bias_column_stride = Stride(buffer, 3);
  }
  params.seen = Data<uint8_t>(*seen);
  params.batch = sizes.batch;
  params.kv_heads = static_cast<int>(sizes.kv_heads);
  params.group = static_cast<int>(sizes.heads / sizes.kv_heads);
  params.length_q = static_cast<int>(sizes.length_q);
  params.length_kv = static_cast<int>(sizes.length_kv);
  return FromCuda("seen_keys", LaunchSeen(params, stream));
}

ffi::Error IntervalsImpl(cudaStream_t stream, ffi::RemainingArgs args,
                         ffi::Result<ffi::AnyBuffer> rows, ffi::Result<ffi::AnyBuffer> groups,
                         ffi::Result<ffi::AnyBuffer> seen,
                         ffi::Result<ffi::AnyBuffer> per_counted_key, int64_t length_q,
                         int64_t query_lengths, int64_t key_lengths, int64_t left, int64_t right,
                         int64_t bottom_right) {
  std::vector<ffi::AnyBuffer> in;
  std::vector<Buffer> described;
  if (auto error = Collect(args, in, described); error.failure()) return error;
  IntervalSizes sizes;
  const std::string message = CheckIntervals(
      described, {Describe(*rows), Describe(*groups), Describe(*seen), Describe(*per_counted_key)},
      {{"length_q", static_cast<double>(length_q)},
       {"query_lengths", static_cast<double>(query_lengths)},
       {"key_lengths", static_cast<double>(key_lengths)},
       {"left", static_cast<double>(left)},
       {"right", static_cast<double>(right)},
       {"bottom_right", static_cast<double>(bottom_right)}},
      &sizes);
  if (!message.empty()) return Invalid(message);
  IntervalParams params{};
  if (sizes.query_lengths) params.query_lengths = Data<int32_t>(in.front());
  if (sizes.key_lengths) params.key_lengths = Data<int32_t>(in.back());
  params.left = left;
  params.right = right;
  params.bottom_right = bottom_right != 0;
  params.length_q = static_cast<int>(sizes.length_q);
  params.length_kv = static_cast<int>(sizes.length_kv);
  params.padded_q = static_cast<int>(sizes.padded_q);
  params.batch = sizes.batch;
  params.all_heads = sizes.all_batch * sizes.kv_heads;
  params.rows = Data<int2>(*rows);
  params.groups = Data<int4>(*groups);
  params.seen = Data<uint8_t>(*seen);
  params.per_counted_key = Data<float>(*per_counted_key);
  return FromCuda("intervals", LaunchIntervals(params, stream));
}

ffi::Error SortIdsImpl(cudaStream_t stream, ffi::AnyBuffer ids,
                       ffi::Result<ffi::AnyBuffer> sorted_ids, ffi::Result<ffi::AnyBuffer> order,
                       ffi::Result<ffi::AnyBuffer> slots, ffi::Result<ffi::AnyBuffer> scattered,
                       ffi::Result<ffi::AnyBuffer> group_ranges,
                       ffi::Result<ffi::AnyBuffer> tile_ranges) {
  SortSizes sizes;
  const std::string message =
      CheckSortIds({Describe(ids)},
                   {Describe(*sorted_ids), Describe(*order), Describe(*slots), Describe(*scattered),
                    Describe(*group_ranges), Describe(*tile_ranges)},
                   {}, &sizes);
  if (!message.empty()) return Invalid(message);
  SortParams params{};
  params.ids = Data<int32_t>(ids);
  params.sorted_ids = Data<int32_t>(*sorted_ids);
  params.order = Data<int32_t>(*order);
  params.slots = Data<int2>(*slots);
  params.scattered = Data<int32_t>(*scattered);
  params.group_ranges = Data<int2>(*group_ranges);
  params.tile_ranges = Data<int2>(*tile_ranges);
  params.batch = sizes.batch;
  params.length = static_cast<int>(sizes.length);
  return FromCuda("sort_ids", LaunchSortIds(params, stream));
}

}  // namespace
}  // namespace jax_sage

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxSagePackMask, jax_sage::PackMaskImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // mask [B, N, T, S]
                                  .Ret<xla::ffi::AnyBuffer>()   // words
                                  .Ret<xla::ffi::AnyBuffer>(),  // views
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxSageSeenKeys, jax_sage::SeenKeysImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()             // see CheckSeenKeys
                                  .Ret<xla::ffi::AnyBuffer>()  // seen [B, K, S]
                                  .Attr<int64_t>("length_q")
                                  .Attr<int64_t>("mask")
                                  .Attr<int64_t>("bias"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxSageIntervals, jax_sage::IntervalsImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()             // see CheckIntervals
                                  .Ret<xla::ffi::AnyBuffer>()  // rows
                                  .Ret<xla::ffi::AnyBuffer>()  // groups
                                  .Ret<xla::ffi::AnyBuffer>()  // seen
                                  .Ret<xla::ffi::AnyBuffer>()  // per_counted_key
                                  .Attr<int64_t>("length_q")
                                  .Attr<int64_t>("query_lengths")
                                  .Attr<int64_t>("key_lengths")
                                  // -1: no limit
                                  .Attr<int64_t>("left")
                                  .Attr<int64_t>("right")
                                  .Attr<int64_t>("bottom_right"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxSageSortIds, jax_sage::SortIdsImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // ids [B, S]
                                  .Ret<xla::ffi::AnyBuffer>()   // sorted
                                  .Ret<xla::ffi::AnyBuffer>()   // whose they are
                                  .Ret<xla::ffi::AnyBuffer>()   // places of their segments
                                  .Ret<xla::ffi::AnyBuffer>()   // scattered
                                  .Ret<xla::ffi::AnyBuffer>()   // ranges of 64
                                  .Ret<xla::ffi::AnyBuffer>(),  // and of 128
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxSageQuantize, jax_sage::QuantizeImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()  // see CheckQuantize
                                  .RemainingRets()
                                  .Attr<float>("scale_log2")
                                  .Attr<int64_t>("smooth_k")
                                  .Attr<int64_t>("smooth_v")
                                  .Attr<int64_t>("some_seen")
                                  .Attr<int64_t>("skip_unseen")
                                  .Attr<int64_t>("segments")
                                  .Attr<int64_t>("own_segments"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxSageAttention, jax_sage::AttentionImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()  // out [*B, T, N, H]
                                  .Ret<xla::ffi::AnyBuffer>()  // lse [*B, T, N]
                                  .Attr<int64_t>("length_kv")
                                  .Attr<int64_t>("is_causal")
                                  .Attr<int64_t>("alike")
                                  .Attr<int64_t>("with_lse")
                                  .Attr<int64_t>("pv_accumulator")
                                  // 1: the kernel of cuda/mma even where there is a faster one.
                                  .Attr<int64_t>("mma_sync")
                                  // What there is of masks: anything at all, a boolean mask,
                                  // segment ids, a bias; how many keys count.
                                  .Attr<int64_t>("masked")
                                  .Attr<int64_t>("mask")
                                  .Attr<int64_t>("segments")
                                  .Attr<int64_t>("bias")
                                  .Attr<int64_t>("counted")
                                  // Queries have the order of their segments' keys.
                                  .Attr<int64_t>("by_intervals"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
