// In place of the stream that XLA gives to handlers for a GPU: to those for the CPU it gives none.
#pragma once

#include <optional>

#include "xla/ffi/api/ffi.h"

namespace xla::ffi {

template <class T>
struct NoStream {};

template <class T>
struct CtxDecoding<NoStream<T>> {
  using Type = T;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return Type{};
  }
};

}  // namespace xla::ffi

#define PlatformStream NoStream
