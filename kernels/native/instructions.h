// All that is compiled once per instruction set, and its tables.

#pragma once

#include "basis.h"
#include "orbit.h"
#include "single.h"
#include "units.h"

namespace symopt {
namespace {

template <class T> constexpr Functions functions() {
  return {single<T>,       survey<T>,       combine<T>,     move<T>,          move_slices<T>,
          survey_orbits<T>, move_orbits<T>, snap_orbits<T>, combine_means<T>, move_means<T>,
          survey_basis<T>, move_basis<T>,   second_moment<T>};
}

}  // namespace
}  // namespace symopt
