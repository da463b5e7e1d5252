// The XLA custom calls.
#pragma once

#include "xla/ffi/api/c_api.h"

// jax_sage_quantize: (query, key, value, ...) -> (the first buffers of jax_sage_attention,
// scratch); see CheckQuantize.
extern "C" XLA_FFI_Error* JaxSageQuantize(XLA_FFI_CallFrame* call_frame);
// jax_sage_attention: (the quantized buffers, those of masks) -> (out, lse).
extern "C" XLA_FFI_Error* JaxSageAttention(XLA_FFI_CallFrame* call_frame);
// jax_sage_pack_mask: mask -> (words, views), operands of a masked jax_sage_attention.
extern "C" XLA_FFI_Error* JaxSagePackMask(XLA_FFI_CallFrame* call_frame);
// jax_sage_seen_keys: (rows, mask, bias) -> seen, an operand of jax_sage_quantize.
extern "C" XLA_FFI_Error* JaxSageSeenKeys(XLA_FFI_CallFrame* call_frame);
// jax_sage_intervals: lengths -> (rows, groups), of a masked jax_sage_attention, and (seen,
// per_counted_key), of jax_sage_quantize.
extern "C" XLA_FFI_Error* JaxSageIntervals(XLA_FFI_CallFrame* call_frame);
// jax_sage_sort_ids: segment ids -> (sorted, whose they are, places of their segments), of
// jax_sage_quantize, and (scattered, ranges of 64, of 128), of jax_sage_attention.
extern "C" XLA_FFI_Error* JaxSageSortIds(XLA_FFI_CallFrame* call_frame);
