// What every entry of the C ABI is wrapped in: no exception leaves the library.
#pragma once
#include <exception>

#include "splatkit.h"

namespace sk {

// Keeps "entry: why" for sk_last_error() of this thread; returns SK_ERROR.
int32_t keep_error(const char* entry, const char* why);

template <class F> int32_t guarded(const char* entry, F&& f) {
  try {
    return f();
  } catch (const std::exception& e) {
    return keep_error(entry, e.what());
  }
}

}  // namespace sk
