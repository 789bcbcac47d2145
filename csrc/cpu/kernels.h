// The kernels of one instruction set. The including file names its namespace and vector size; standard headers come first, so that
// no inline function of theirs is compiled for the wider set.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>

#include "../params.h"
#include "../tiles.h"
#include "memory.h"
