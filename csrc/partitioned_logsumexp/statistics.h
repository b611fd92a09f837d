// Rows of the statistics that forward returns; backward takes terms in the order of the first five.
#pragma once

#include <cstdint>

namespace ltk {

enum Statistic { kNegPeak, kNegMass, kPosPeak, kPosMass, kPosSum, kNumPos, kNegSlope, kPosSlope };
constexpr int64_t kStatistics = 6, kSlopes = 2;

}  // namespace ltk
