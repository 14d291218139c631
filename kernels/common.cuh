// What every kernel uses: types, conversions, reductions over a warp.
//
// tests/kernels compiles the kernels with a plain C++ compiler: then EREMOIS_EMULATE is set and emulate.h stands in for
// CUDA's own words and types. What has no plain form (inline PTX) is a function here with a second body there.
#pragma once

#ifdef EREMOIS_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
// The block's dynamic shared memory under a name.
#define SHARED_FLOATS(name) extern __shared__ __align__(16) float name[]
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// The sum over the 32 lanes of a warp, to each of them. Every lane calls it.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}
