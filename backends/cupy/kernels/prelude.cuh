// What every kernel begins with: the constants of its problem, numbers, parameters.
#pragma once
// hole: constants
#ifdef FLEXREF_HOST
#include "cuda_host.h"
#else
#include "device.cuh"
#endif
#include "numbers.cuh"
#include "params.cuh"
#include "mods.cuh"
#include "walk.cuh"
#if TENSOR_CORES
#include "mma.cuh"
#else
#include "fma.cuh"
#endif
#include "softmax.cuh"
#include "statistics.cuh"
