// Refuses what a caller gave, in words for the caller: no file and line of this source, which torch's own macro puts
// first.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <stdexcept>

#define DIMAP_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]    \
  throw std::runtime_error(STD_TORCH_CHECK_MSG(condition, "", __VA_ARGS__))
