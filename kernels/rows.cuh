// Rows of 2-byte values in registers: what embedding.cu, norm.cu, activation.cu and pool.cu share.
//
// A row is held by a group of threads, blockDim.x of them: one warp for up to 1024 columns, a block of up to 256
// threads above that. blockDim.y rows share a block; it is 1 where a row has more than one warp. Each thread holds at
// most ROW_VALUES values, so that a row is read from memory once however often it is walked over.
//
//   columns divisible by 8:  thread t holds packs t, t + blockDim.x, ... of 8 columns: one 16-byte load each
//   any other number:        thread t holds columns t, t + blockDim.x, ...: 2-byte loads, still side by side
#pragma once

#include "common.cuh"

namespace rows {

constexpr u32 WARP = 32;
constexpr u32 PACK = 8;               // 2-byte values in a 16-byte load
constexpr u32 ROW_PACKS = 4;          // packs a thread holds
constexpr u32 ROW_VALUES = ROW_PACKS * PACK;
constexpr u32 MAX_ROW_THREADS = 256;  // so that a row has at most 256 * 32 = 8192 columns; src/ops/cuda/kernels.rs

// Words of the batch's header, of rows[S][2].
constexpr u32 TOTAL_TOKENS = 0, NUM_SEQS = 1, FLAGS = 3;
constexpr u32 HAS_TOKEN_TYPES = 1;

template <typename T>
struct alignas(16) Pack {
    T values[PACK];
};

struct alignas(16) Floats {
    float values[4];
};

// The column of a thread's i-th value.
template <bool PACKED>
__device__ __forceinline__ u32 column_of(u32 i) {
    return PACKED ? ((i / PACK) * blockDim.x + threadIdx.x) * PACK + i % PACK : i * blockDim.x + threadIdx.x;
}

// Adds a row's columns to a thread's values. A thread's values beyond the row stay as they are.
template <bool PACKED, typename T>
__device__ __forceinline__ void add_row(float (&values)[ROW_VALUES], const T* row /* [num_columns] */, u32 num_columns) {
    if (PACKED) {
#pragma unroll
        for (u32 p = 0; p < ROW_PACKS; p++) {
            const u32 column = column_of<true>(p * PACK);
            if (column < num_columns) {
                const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(row + column);
#pragma unroll
                for (u32 j = 0; j < PACK; j++) values[p * PACK + j] += to_float(pack.values[j]);
            }
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < ROW_VALUES; i++) {
            const u32 column = column_of<false>(i);
            if (column < num_columns) values[i] += to_float(row[column]);
        }
    }
}

// Rounds a thread's values and writes them to its columns.
template <bool PACKED, typename T>
__device__ __forceinline__ void store_row(T* row /* [num_columns] */, const float (&values)[ROW_VALUES], u32 num_columns) {
    if (PACKED) {
#pragma unroll
        for (u32 p = 0; p < ROW_PACKS; p++) {
            const u32 column = column_of<true>(p * PACK);
            if (column < num_columns) {
                Pack<T> pack;
#pragma unroll
                for (u32 j = 0; j < PACK; j++) pack.values[j] = from_float<T>(values[p * PACK + j]);
                *reinterpret_cast<Pack<T>*>(row + column) = pack;
            }
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < ROW_VALUES; i++) {
            const u32 column = column_of<false>(i);
            if (column < num_columns) row[column] = from_float<T>(values[i]);
        }
    }
}

// The sum over a row's threads, to each of them. `partial` is [MAX_ROW_THREADS / WARP] in shared memory; all threads
// of the block call this together, or the block has only rows of one warp and each warp does.
__device__ __forceinline__ float row_sum(float value, float* partial) {
    value = warp_sum(value);
    if (blockDim.x == WARP) return value;
    __syncthreads();  // the last sum's readers are done with `partial`
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = 0.0f;  // every thread in the same order: the same sum
    for (u32 w = 0; w < blockDim.x / WARP; w++) sum += partial[w];
    return sum;
}

// values = values * scale * gamma (+ beta), for the columns that the row has.
template <bool PACKED>
__device__ __forceinline__ void scale_row(float (&values)[ROW_VALUES], float scale, const float* gamma /* [num_columns] */,
                                          const float* beta /* [num_columns] or null */, u32 num_columns) {
#pragma unroll
    for (u32 i = 0; i < ROW_VALUES; i += 4) {
        if (PACKED) {
            const u32 column = column_of<true>(i);
            if (column < num_columns) {
                const Floats g = *reinterpret_cast<const Floats*>(gamma + column);
                Floats b = {{0.0f, 0.0f, 0.0f, 0.0f}};
                if (beta != nullptr) b = *reinterpret_cast<const Floats*>(beta + column);
#pragma unroll
                for (u32 j = 0; j < 4; j++) values[i + j] = values[i + j] * scale * g.values[j] + b.values[j];
            }
        } else {
#pragma unroll
            for (u32 j = i; j < i + 4; j++) {
                const u32 column = column_of<false>(j);
                if (column < num_columns) {
                    values[j] = values[j] * scale * gamma[column] + (beta == nullptr ? 0.0f : beta[column]);
                }
            }
        }
    }
}

// LayerNorm of one row in registers: the mean first, then the mean square of what is left, because E[x^2] - E[x]^2
// cancels digits and a second walk over registers costs next to nothing.
template <bool PACKED>
__device__ __forceinline__ void layer_norm_row(float (&values)[ROW_VALUES], const float* gamma, const float* beta,
                                               u32 num_columns, float eps, float* partial) {
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < ROW_VALUES; i++) sum += values[i];  // 0 beyond the row
    const float mean = row_sum(sum, partial) / static_cast<float>(num_columns);
    float square = 0.0f;
#pragma unroll
    for (u32 i = 0; i < ROW_VALUES; i++) {
        if (column_of<PACKED>(i) < num_columns) {
            values[i] -= mean;
            square += values[i] * values[i];
        }
    }
    const float variance = row_sum(square, partial) / static_cast<float>(num_columns);
    scale_row<PACKED>(values, 1.0f / sqrtf(variance + eps), gamma, beta, num_columns);
}

// RMSNorm of one row in registers.
template <bool PACKED>
__device__ __forceinline__ void rms_norm_row(float (&values)[ROW_VALUES], const float* gamma, u32 num_columns, float eps,
                                             float* partial) {
    float square = 0.0f;
#pragma unroll
    for (u32 i = 0; i < ROW_VALUES; i++) square += values[i] * values[i];  // 0 beyond the row
    const float mean = row_sum(square, partial) / static_cast<float>(num_columns);
    scale_row<PACKED>(values, 1.0f / sqrtf(mean + eps), gamma, nullptr, num_columns);
}

}  // namespace rows
