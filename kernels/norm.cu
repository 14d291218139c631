// add_layer_norm_{f16,bf16}, add_rms_norm_{f16,bf16}: residual and normalisation.
//
// computes   s = x + residual;  LayerNorm: out = (s - mean(s)) / sqrt(var(s) + eps) * gamma + beta, var the biased one;
//            RMSNorm: out = s / sqrt(mean(s^2) + eps) * gamma. Where `sum` is given it gets s: pre-norm models go on
//            from it; post-norm ones read only out, and s is written nowhere.
// shapes     as beside the parameters; T is the bucket's capacity, the true count stands in `header`.
// dtype      x, residual, sum, out f16 or bf16; s is never rounded before it is normalised; all arithmetic f32.
// launch     block (32, 4): a warp a row, or above 1024 columns (up to 256, 1): a block a row; grid ceil(T / rows of a
//            block). __launch_bounds__(256): 32 f32 values a thread stay in registers. Shared: 32 bytes.
// requires   hidden_size 1 to 8192; pointers 16-byte aligned, u32 ones 4-byte: src/ops/cuda/kernels/check.rs. out and
//            sum may each be x or residual, not each other: a thread reads only the columns it writes, and first.
// traffic    reads 4 H bytes a row, 2 H without a residual, writes 2 H, 4 H with sum; memory-bound.
// tolerance  one rounding to the 2-byte type after f32 arithmetic: half a unit in the last place, and 1e-5.
// source     Ba, Kiros and Hinton 2016, section 3; Zhang and Sennrich 2019, equation 4 (RMSNorm).
#include "rows.cuh"

namespace {

template <bool PACKED, bool CENTRED, typename T>
__device__ __forceinline__ void norm_row(T* out, const T* x, const T* residual, T* sum, const float* gamma,
                                         const float* beta, u32 hidden_size, float eps, u64 offset, float* partial) {
    float values[rows::ROW_VALUES] = {};
    rows::add_row<PACKED>(values, x + offset, hidden_size);
    if (residual != nullptr) rows::add_row<PACKED>(values, residual + offset, hidden_size);
    if (sum != nullptr) rows::store_row<PACKED>(sum + offset, values, hidden_size);
    if (CENTRED) {
        rows::layer_norm_row<PACKED>(values, gamma, beta, hidden_size, eps, partial);
    } else {
        rows::rms_norm_row<PACKED>(values, gamma, hidden_size, eps, partial);
    }
    rows::store_row<PACKED>(out + offset, values, hidden_size);
}

template <bool CENTRED, typename T>
__device__ __forceinline__ void add_norm(T* out, const u32* header, const T* x, const T* residual, T* sum,
                                         const float* gamma, const float* beta, u32 hidden_size, float eps) {
    __shared__ float partial[rows::MAX_ROW_THREADS / rows::WARP];
    const u32 row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= header[rows::TOTAL_TOKENS]) return;  // a whole warp, or the whole block
    const u64 offset = static_cast<u64>(row) * hidden_size;
    if (hidden_size % rows::PACK == 0) {
        norm_row<true, CENTRED>(out, x, residual, sum, gamma, beta, hidden_size, eps, offset, partial);
    } else {
        norm_row<false, CENTRED>(out, x, residual, sum, gamma, beta, hidden_size, eps, offset, partial);
    }
}

}  // namespace

#define ADD_LAYER_NORM(NAME, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                            \
        T* out,             /* [T, hidden_size] */                                                                     \
        const u32* header,  /* [8] */                                                                                  \
        const T* x,         /* [T, hidden_size] */                                                                     \
        const T* residual,  /* [T, hidden_size] or null */                                                             \
        T* sum,             /* [T, hidden_size] or null */                                                             \
        const float* gamma, /* [hidden_size] */                                                                        \
        const float* beta,  /* [hidden_size] or null */                                                                \
        u32 hidden_size, float eps) {                                                                                  \
        add_norm<true, T>(out, header, x, residual, sum, gamma, beta, hidden_size, eps);                               \
    }

#define ADD_RMS_NORM(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                            \
        T* out,             /* [T, hidden_size] */                                                                     \
        const u32* header,  /* [8] */                                                                                  \
        const T* x,         /* [T, hidden_size] */                                                                     \
        const T* residual,  /* [T, hidden_size] or null */                                                             \
        T* sum,             /* [T, hidden_size] or null */                                                             \
        const float* gamma, /* [hidden_size] */                                                                        \
        u32 hidden_size, float eps) {                                                                                  \
        add_norm<false, T>(out, header, x, residual, sum, gamma, nullptr, hidden_size, eps);                           \
    }

ADD_LAYER_NORM(add_layer_norm_f16, __half)
ADD_LAYER_NORM(add_layer_norm_bf16, __nv_bfloat16)
ADD_RMS_NORM(add_rms_norm_f16, __half)
ADD_RMS_NORM(add_rms_norm_bf16, __nv_bfloat16)
