// bias_activation_{f16,bf16}, swiglu_{f16,bf16}: what a product's epilogue cannot do.
//
// computes   bias_activation: y = f(y + bias) in place, f by number, see `Activation` below; GELU is the exact one,
//            which cuBLASLt's epilogue is not.
//            swiglu: out[t][c] = silu(x[t][c]) * x[t][N + c]: the first N columns are the gate.
// shapes     as beside the parameters, N = num_columns; T is the bucket's capacity, the true count stands in `header`.
// dtype      y, x, out f16 or bf16; bias and arithmetic f32.
// launch     block 256, grid ceil(T * N / (256 * 8)): a thread takes 8 values that lie side by side in memory, across
//            the end of a row if need be. No shared memory.
// requires   N at least 1; T * N below 2^31, so that 32 bits count them and swiglu's x; pointers 16-byte aligned:
//            src/ops/cuda/kernels/check.rs. Widths that 8 does not divide are slower: single loads of bias and x.
//            swiglu's out is not x.
// traffic    bias_activation reads and writes 2 N bytes a row; swiglu reads 4 N, writes 2 N. Memory-bound, the exact
//            GELU by little: erff is some 25 instructions a value.
// tolerance  one rounding to the 2-byte type after f32 arithmetic: half a unit in the last place, and 1e-5.
// source     Hendrycks and Gimpel 2016 (GELU and its tanh form); Shazeer 2020 (SwiGLU).
#include "rows.cuh"

namespace {

// The numbers of `Activation` in src/ops/cuda/kernels.rs.
enum Activation : u32 { NONE = 0, GELU = 1, GELU_TANH = 2, RELU = 3, SILU = 4, TANH = 5 };

constexpr u32 FLAT_THREADS = 256;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

template <u32 ACTIVATION>
__device__ __forceinline__ float activate(float x) {
    switch (ACTIVATION) {
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case RELU: return x < 0.0f ? 0.0f : x;  // NaN stays
        case SILU: return silu(x);
        case TANH: return tanhf(x);
        default: return x;
    }
}

// 8 values from flat index `first` on, of `num_values`.
template <u32 ACTIVATION, typename T>
__device__ __forceinline__ void activate_pack(T* y, const float* bias, u32 num_columns, u32 first, u32 num_values) {
    float values[rows::PACK];
    const bool full = first + rows::PACK <= num_values;
    rows::Pack<T> pack;
    if (full) {
        pack = *reinterpret_cast<const rows::Pack<T>*>(y + first);
    } else {
        for (u32 j = 0; j < num_values - first; j++) pack.values[j] = y[first + j];
    }
    u32 column = first % num_columns;
#pragma unroll
    for (u32 j = 0; j < rows::PACK; j++) {
        if (!full && first + j >= num_values) break;
        values[j] = to_float(pack.values[j]);
    }
    if (bias != nullptr && num_columns % rows::PACK == 0) {  // so this pack is full and lies in one row
#pragma unroll
        for (u32 j = 0; j < rows::PACK; j += 4) {
            const rows::Floats b = *reinterpret_cast<const rows::Floats*>(bias + column + j);
#pragma unroll
            for (u32 k = 0; k < 4; k++) values[j + k] += b.values[k];
        }
    } else if (bias != nullptr) {
#pragma unroll
        for (u32 j = 0; j < rows::PACK; j++) {
            if (!full && first + j >= num_values) break;
            values[j] += bias[column];
            column = column + 1 == num_columns ? 0 : column + 1;
        }
    }
#pragma unroll
    for (u32 j = 0; j < rows::PACK; j++) {
        if (!full && first + j >= num_values) break;
        pack.values[j] = from_float<T>(activate<ACTIVATION>(values[j]));
    }
    if (full) {
        *reinterpret_cast<rows::Pack<T>*>(y + first) = pack;
    } else {
        for (u32 j = 0; j < num_values - first; j++) y[first + j] = pack.values[j];
    }
}

template <typename T>
__device__ __forceinline__ void bias_activation(T* y, const u32* header, const float* bias, u32 num_columns,
                                                u32 activation) {
    const u32 num_values = header[rows::TOTAL_TOKENS] * num_columns;
    const u32 first = (blockIdx.x * FLAT_THREADS + threadIdx.x) * rows::PACK;
    if (first >= num_values) return;
    // Uniform over the grid: one branch, then straight code.
    switch (activation) {
        case GELU: return activate_pack<GELU>(y, bias, num_columns, first, num_values);
        case GELU_TANH: return activate_pack<GELU_TANH>(y, bias, num_columns, first, num_values);
        case RELU: return activate_pack<RELU>(y, bias, num_columns, first, num_values);
        case SILU: return activate_pack<SILU>(y, bias, num_columns, first, num_values);
        case TANH: return activate_pack<TANH>(y, bias, num_columns, first, num_values);
        default: return activate_pack<NONE>(y, bias, num_columns, first, num_values);
    }
}

template <typename T>
__device__ __forceinline__ void swiglu(T* out, const u32* header, const T* x, u32 num_columns) {
    const u32 num_values = header[rows::TOTAL_TOKENS] * num_columns;
    const u32 first = (blockIdx.x * FLAT_THREADS + threadIdx.x) * rows::PACK;
    if (first >= num_values) return;
    // Row t of out begins at t * N, row t of x at 2 t N: the flat index and the row's begin.
    if (num_columns % rows::PACK == 0) {
        const T* gate = x + first + first / num_columns * num_columns;
        const rows::Pack<T> gates = *reinterpret_cast<const rows::Pack<T>*>(gate);
        const rows::Pack<T> values = *reinterpret_cast<const rows::Pack<T>*>(gate + num_columns);
        rows::Pack<T> pack;
#pragma unroll
        for (u32 j = 0; j < rows::PACK; j++) {
            pack.values[j] = from_float<T>(silu(to_float(gates.values[j])) * to_float(values.values[j]));
        }
        *reinterpret_cast<rows::Pack<T>*>(out + first) = pack;
    } else {
        for (u32 i = first; i < first + rows::PACK && i < num_values; i++) {
            const T* gate = x + i + i / num_columns * num_columns;
            out[i] = from_float<T>(silu(to_float(gate[0])) * to_float(gate[num_columns]));
        }
    }
}

}  // namespace

#define BIAS_ACTIVATION(NAME, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                            \
        T* y,              /* [T, num_columns], in place */                                                            \
        const u32* header, /* [8] */                                                                                   \
        const float* bias, /* [num_columns] or null */                                                                 \
        u32 num_columns, u32 activation) {                                                                             \
        bias_activation<T>(y, header, bias, num_columns, activation);                                                  \
    }

#define SWIGLU(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                            \
        T* out,            /* [T, num_columns] */                                                                      \
        const u32* header, /* [8] */                                                                                   \
        const T* x,        /* [T, 2 * num_columns] */                                                                  \
        u32 num_columns) {                                                                                             \
        swiglu<T>(out, header, x, num_columns);                                                                        \
    }

BIAS_ACTIVATION(bias_activation_f16, __half)
BIAS_ACTIVATION(bias_activation_bf16, __nv_bfloat16)
SWIGLU(swiglu_f16, __half)
SWIGLU(swiglu_bf16, __nv_bfloat16)
