// One format for every error: "<op>: <argument> must be <what is allowed>, got <what came>".
// They arrive in Python as ValueError and TypeError.
#pragma once

#include <c10/util/Exception.h>

#define LTOOD_CHECK_VALUE(condition, op, argument, allowed, ...) \
  TORCH_CHECK_VALUE(condition, op, ": ", argument, " must be ", allowed, ", got ", __VA_ARGS__)

#define LTOOD_CHECK_TYPE(condition, op, argument, allowed, ...) \
  TORCH_CHECK_TYPE(condition, op, ": ", argument, " must be ", allowed, ", got ", __VA_ARGS__)
