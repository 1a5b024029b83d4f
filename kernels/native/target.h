// SYMOPT_TARGET(list) ... SYMOPT_TARGET_END: the functions in between may use these instructions.  Flags for the whole
// source would also apply to inline functions of the standard library, of which the linker keeps one copy for all
// sources, and that copy must run everywhere.

#pragma once

#define SYMOPT_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define SYMOPT_TARGET(list) SYMOPT_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define SYMOPT_TARGET_END SYMOPT_PRAGMA(clang attribute pop)
#define SYMOPT_WIDE ""
#else
#define SYMOPT_TARGET(list) SYMOPT_PRAGMA(GCC push_options) SYMOPT_PRAGMA(GCC target(list))
#define SYMOPT_TARGET_END SYMOPT_PRAGMA(GCC pop_options)
#define SYMOPT_WIDE ",prefer-vector-width=512"
#endif
