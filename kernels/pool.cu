// pool_{f16,bf16}_to_f32, pool_f16_to_f16, pool_bf16_to_bf16: token vectors to result rows, the whole batch at once.
//
// computes   out[s] = the pooling (by number, see `Pooling` below) of s's token vectors, cut to rows[s][0] values, where
//            rows[s][1] is 1 scaled to length 1 (a zero vector stays zero), 0 beyond the cut. *not_finite becomes the
//            largest 1 + s whose row holds a NaN or an infinity before it is scaled, if that is more than it was: the
//            host sets it to 0 before the batch.
// shapes     as beside the parameters; T and S are the bucket's capacities, the true counts stand in `header`.
// dtype      hidden f16 or bf16, sums f32 in an order that depends on hidden_size and the sequence alone, one rounding to
//            out's type. The squares are of values divided by the largest: neither 3e38 nor 1e-30 leaves f32's range.
// launch     block 512, grid S. G = max(1, 512 / packs of 8 columns) threads share a column and take every G-th token, so
//            that a sequence of 512 tokens is 50 loads deep at 384 columns. Shared: max(4096, hidden_size) f32.
// requires   hidden_size 1 to 8192; pointers 16-byte aligned, u32 ones 4-byte: src/ops/cuda/kernels/check.rs. No
//            sequence empty and bounds within T: `CuSeqlens`. Widths that 8 does not divide take 2-byte loads.
// traffic    reads 2 H bytes a token (cls and last: a sequence), writes 4 H or 2 H a sequence: memory-bound.
// tolerance  f32 sums: 1e-6 of the largest value times log of the length; then out's rounding.
// source     Reimers and Gurevych 2019, section 3 (mean, max, cls); Muennighoff 2022, section 4 (weighted mean);
//            Kusupati et al. 2022 (Matryoshka cut).
#include "rows.cuh"

namespace {

// The numbers of `Pooling` in src/ops/cuda/kernels.rs.
enum Pooling : u32 { CLS = 0, MEAN = 1, MAX = 2, LAST_TOKEN = 3, WEIGHTED_MEAN = 4 };

constexpr u32 POOL_THREADS = 512;

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }  // false for NaN

// fmaxf would drop a NaN, and a broken result must show.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// One value combined over the block, to each thread; `partial` is [POOL_THREADS / WARP] in shared memory.
template <typename Combine>
__device__ __forceinline__ float block_combine(float value, float* partial, Combine combine) {
    for (u32 lanes = rows::WARP / 2; lanes > 0; lanes /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, lanes));
    }
    __syncthreads();  // the last call's readers are done with `partial`
    if (threadIdx.x % rows::WARP == 0) partial[threadIdx.x / rows::WARP] = value;
    __syncthreads();
    value = partial[0];
    for (u32 w = 1; w < POOL_THREADS / rows::WARP; w++) value = combine(value, partial[w]);
    return value;
}

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Larger {
    __device__ __forceinline__ float operator()(float a, float b) const { return larger(a, b); }
};

// What a thread sees of tokens first, first + step, ... of WIDTH columns side by side, into values[WIDTH].
template <u32 WIDTH, typename T>
__device__ __forceinline__ void walk(float (&values)[WIDTH], const T* hidden, u32 column, u32 hidden_size, u32 begin,
                                     u32 end, u32 first, u32 step, u32 pooling) {
#pragma unroll
    for (u32 j = 0; j < WIDTH; j++) values[j] = pooling == MAX ? -INFINITY : 0.0f;
#pragma unroll 4
    for (u32 token = begin + first; token < end; token += step) {
        const T* from = hidden + static_cast<u64>(token) * hidden_size + column;
        float x[WIDTH];
        if (WIDTH == rows::PACK) {
            const rows::Pack<T> pack = *reinterpret_cast<const rows::Pack<T>*>(from);
#pragma unroll
            for (u32 j = 0; j < WIDTH; j++) x[j] = to_float(pack.values[j]);
        } else {
            x[0] = to_float(from[0]);
        }
        const float weight = pooling == WEIGHTED_MEAN ? static_cast<float>(token - begin + 1) : 1.0f;
#pragma unroll
        for (u32 j = 0; j < WIDTH; j++) values[j] = pooling == MAX ? larger(values[j], x[j]) : values[j] + weight * x[j];
    }
}

// The first `dimensions` columns of the tokens begin..end combined into pooled[0..dimensions], times `factor`.
// `pooled` is [max(8 * POOL_THREADS, hidden_size)]; a thread's columns afterwards are threadIdx.x, + POOL_THREADS, ...
template <u32 WIDTH, typename T>
__device__ __forceinline__ void combine_tokens(float* pooled, const T* hidden, u32 hidden_size, u32 dimensions,
                                               u32 begin, u32 end, float factor, u32 pooling) {
    const u32 num_packs = (hidden_size + WIDTH - 1) / WIDTH;
    // By the width and not by the cut: a cut row is the beginning of the whole one, bit by bit.
    const u32 num_groups = num_packs < POOL_THREADS ? POOL_THREADS / num_packs : 1;
    const u32 group = num_packs < POOL_THREADS ? threadIdx.x / num_packs : 0;
    const u32 first_pack = num_packs < POOL_THREADS ? threadIdx.x % num_packs : threadIdx.x;
    if (group < num_groups) {
        for (u32 pack = first_pack; pack < num_packs && pack * WIDTH < dimensions; pack += POOL_THREADS) {
            float values[WIDTH];
            walk<WIDTH>(values, hidden, pack * WIDTH, hidden_size, begin, end, group, num_groups, pooling);
#pragma unroll
            for (u32 j = 0; j < WIDTH; j++) pooled[group * hidden_size + pack * WIDTH + j] = values[j];
        }
    }
    __syncthreads();
    for (u32 column = threadIdx.x; column < dimensions; column += POOL_THREADS) {
        float value = pooled[column];
        for (u32 g = 1; g < num_groups; g++) {
            const float next = pooled[g * hidden_size + column];
            value = pooling == MAX ? larger(value, next) : value + next;
        }
        pooled[column] = value * factor;
    }
}

template <typename T, typename Out>
__device__ __forceinline__ void pool(Out* out, const u32* header, const T* hidden, const u32* cu_seqlens,
                                     const u32* row_specs, u32 hidden_size, u32 pooling, u32* not_finite) {
    SHARED_FLOATS(pooled);
    __shared__ float partial[POOL_THREADS / rows::WARP];
    const u32 seq = blockIdx.x;
    if (seq >= header[rows::NUM_SEQS]) return;

    u32 begin = cu_seqlens[seq], end = cu_seqlens[seq + 1];
    const float len = static_cast<float>(end - begin);
    const u32 dimensions = row_specs[2 * seq] < hidden_size ? row_specs[2 * seq] : hidden_size;
    const bool normalize = row_specs[2 * seq + 1] != 0;
    float factor = 1.0f;
    if (pooling == MEAN) factor = 1.0f / len;
    if (pooling == WEIGHTED_MEAN) factor = 2.0f / (len * (len + 1.0f));
    if (pooling == CLS) end = begin + 1;
    if (pooling == LAST_TOKEN) begin = end - 1;
    // A single token is the sum over itself.
    if (hidden_size % rows::PACK == 0) {
        combine_tokens<rows::PACK>(pooled, hidden, hidden_size, dimensions, begin, end, factor, pooling);
    } else {
        combine_tokens<1>(pooled, hidden, hidden_size, dimensions, begin, end, factor, pooling);
    }

    // From here on a thread touches only its own columns of `pooled`.
    float largest = 0.0f;
    bool finite = true;
    for (u32 column = threadIdx.x; column < dimensions; column += POOL_THREADS) {
        finite = finite && is_finite(pooled[column]);
        largest = larger(largest, fabsf(pooled[column]));
    }
    if (!finite) atomicMax(not_finite, seq + 1);

    float divisor = 1.0f, norm = 1.0f;  // the row's length is divisor * norm
    if (normalize) {
        largest = block_combine(largest, partial, Larger());
        if (largest != 0.0f) {
            divisor = largest;
            float square = 0.0f;
            for (u32 column = threadIdx.x; column < dimensions; column += POOL_THREADS) {
                const float x = pooled[column] / divisor;
                square += x * x;
            }
            norm = sqrtf(block_combine(square, partial, Sum()));
        }
    }
    Out* row = out + static_cast<u64>(seq) * hidden_size;
    for (u32 column = threadIdx.x; column < hidden_size; column += POOL_THREADS) {
        row[column] = from_float<Out>(column < dimensions ? pooled[column] / divisor / norm : 0.0f);
    }
}

}  // namespace

#define POOL(NAME, T, OUT)                                                                                             \
    extern "C" __global__ void __launch_bounds__(512) NAME(                                                            \
        OUT* out,              /* [S, hidden_size] */                                                                  \
        const u32* header,     /* [8] */                                                                               \
        const T* hidden,       /* [T, hidden_size] */                                                                  \
        const u32* cu_seqlens, /* [S + 1] */                                                                           \
        const u32* row_specs,  /* [S, 2]: dimensions, and 1 to scale to length 1 */                                    \
        u32 hidden_size, u32 pooling, u32* not_finite /* [1] */) {                                                     \
        pool<T, OUT>(out, header, hidden, cu_seqlens, row_specs, hidden_size, pooling, not_finite);                    \
    }

POOL(pool_f16_to_f32, __half, float)
POOL(pool_bf16_to_f32, __nv_bfloat16, float)
POOL(pool_f16_to_f16, __half, __half)
POOL(pool_bf16_to_bf16, __nv_bfloat16, __nv_bfloat16)
