// attention_{f16,bf16}_{32,64,96,128}: attention within each sequence of a packed batch.
//
// computes   out[q][h] = sum over k of softmax_k(scale * <q, k> + distance_bias[h][k - q + max_seq_len - 1]) v, for the
//            keys k of q's sequence, with `causal` those not after q. Where `cos` and `sin` are given, q and k are turned
//            first: (x1, x2) at columns (d, d + head_dim / 2) and position p become
//            (x1 cos[p][d] - x2 sin[p][d], x2 cos[p][d] + x1 sin[p][d]).
// shapes     as beside the parameters; T and S are the bucket's capacities, the true counts stand in `header`. A token of
//            qkv is its queries, its keys, its values, each head by head.
// dtype      qkv, out f16 or bf16; both products on tensor cores with f32 sums; scores, softmax and its sum f32;
//            probabilities rounded to the 2-byte type before the second product, as are turned q and k.
// launch     block 128, a warp for 16 queries; grid (S * num_query_blocks, num_heads), a block for 64 queries of one head,
//            num_query_blocks = ceil(longest sequence / 64). Blocks and warps without queries end at once, or only help
//            to load. Shared: 2 * 64 * (head_dim + 8) * 2 bytes, 34 KiB at most, static.
// requires   pointers 16-byte aligned, u32 ones 4-byte; no sequence longer than max_seq_len where there is a bias or a
//            table; out is not qkv: src/ops/cuda/attention.rs.
// traffic    reads a head's q once, its k and v once for every 64 queries (from L2 after the first), writes out once. The
//            scores stay in registers. Compute-bound from some 100 tokens a sequence on.
// tolerance  against double precision on the same 2-byte inputs: 2e-3 of the largest value for f16, 1.6e-2 for bf16.
// source     Dao 2023, FlashAttention-2, algorithm 1; Milakov and Gimelshein 2018 (the running maximum); Su et al. 2021
//            (RoPE; halves as GPT-NeoX has them); Press et al. 2021 (ALiBi, a distance bias).
#include "rows.cuh"
#include "tensor_cores.cuh"

namespace {

constexpr u32 ATTENTION_THREADS = 128;
constexpr u32 WARP_QUERIES = 16;   // rows of an mma
constexpr u32 TILE = 64;           // queries of a block; keys in shared memory at a time
constexpr u32 CHUNKS = TILE / 16;  // an mma's depth: 16 keys of the second product
constexpr u32 ROW_PAD = 8;         // values: rows begin 16 bytes further in the banks, so 8 rows hit all 32
constexpr float LOG2_E = 1.44269504088896341f;

// Rows `first` to first + 63 of a head, those below `end` from memory and zeros after them, on their way to shared
// memory. Zeros and not what lies there: a probability of 0 times a NaN is a NaN.
template <u32 HEAD_DIM>
__device__ __forceinline__ void load_tile(u16* tile, const u16* rows_from /* row 0 */, u32 row_stride, u32 first, u32 end) {
    constexpr u32 PACKS = HEAD_DIM / 8;
    for (u32 i = threadIdx.x; i < TILE * PACKS; i += ATTENTION_THREADS) {
        const u32 row = i / PACKS, column = i % PACKS * 8;
        const bool is_there = first + row < end;
        const u16* from = rows_from + static_cast<u64>(is_there ? first + row : first) * row_stride + column;
        copy_async_16(tile + row * (HEAD_DIM + ROW_PAD) + column, from, is_there);
    }
}

// RoPE on a tile in shared memory, whose row 0 has position `first`. Rows from `end` on are zeros and stay so.
template <u32 HEAD_DIM, typename T>
__device__ __forceinline__ void turn_tile(u16* tile, const float* cos, const float* sin, u32 first, u32 end) {
    constexpr u32 PAIRS = HEAD_DIM / 2;
    for (u32 i = threadIdx.x; i < TILE * PAIRS; i += ATTENTION_THREADS) {
        const u32 row = i / PAIRS, d = i % PAIRS;
        if (first + row >= end) continue;
        const u64 at = static_cast<u64>(first + row) * PAIRS + d;
        T* low = reinterpret_cast<T*>(tile) + row * (HEAD_DIM + ROW_PAD) + d;
        T* high = low + PAIRS;
        const float x1 = to_float(*low), x2 = to_float(*high), c = cos[at], s = sin[at];
        *low = from_float<T>(x1 * c - x2 * s);
        *high = from_float<T>(x2 * c + x1 * s);
    }
}

template <u32 HEAD_DIM, typename T>
__device__ __forceinline__ void attention(T* out, const u32* header, const T* qkv_values, const u32* cu_seqlens,
                                          const float* distance_bias, const float* cos, const float* sin, u32 num_heads,
                                          u32 num_query_blocks, u32 max_seq_len, float scale, u32 causal) {
    constexpr u32 STRIDE = HEAD_DIM + ROW_PAD;
    constexpr u32 STEPS = HEAD_DIM / 16;  // an mma's depth: 16 columns of the first product
    __shared__ __align__(16) u16 k_tile[TILE * STRIDE];
    __shared__ __align__(16) u16 v_tile[TILE * STRIDE];  // the queries first, until they are in registers

    const u32 seq = blockIdx.x / num_query_blocks, head = blockIdx.y;
    if (seq >= header[rows::NUM_SEQS]) return;
    const u32 begin = cu_seqlens[seq], len = cu_seqlens[seq + 1] - begin;
    const u32 first_query = blockIdx.x % num_query_blocks * TILE;
    if (first_query >= len) return;

    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 width = num_heads * HEAD_DIM, row_stride = 3 * width;
    const u16* q = reinterpret_cast<const u16*>(qkv_values) + static_cast<u64>(begin) * row_stride + head * HEAD_DIM;
    const u16 *k = q + width, *v = k + width;
    const u32 last_query = first_query + TILE < len ? first_query + TILE : len;  // one beyond it
    const u32 num_keys = causal != 0 ? last_query : len;                         // later ones are seen by none

    load_tile<HEAD_DIM>(v_tile, q, row_stride, first_query, len);
    commit_copies();
    load_tile<HEAD_DIM>(k_tile, k, row_stride, 0, len);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    if (cos != nullptr) {
        turn_tile<HEAD_DIM, T>(v_tile, cos, sin, first_query, len);
        __syncthreads();
    }
    const bool has_queries = first_query + warp * WARP_QUERIES < len;
    u32 queries[STEPS][4];
    if (has_queries) {
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            const u32 row = warp * WARP_QUERIES + lane % 16, column = step * 16 + lane / 16 * 8;
            load_matrices(queries[step], v_tile + row * STRIDE + column);
        }
    }
    __syncthreads();  // v_tile is free

    // A thread's values: rows lane / 4 and 8 below it, of each 8 columns the pair from 2 * (lane % 4) on.
    const u32 query = first_query + warp * WARP_QUERIES + lane / 4;
    const float factor = scale * LOG2_E;
    const float* bias = distance_bias == nullptr ? nullptr : distance_bias + static_cast<u64>(head) * (2 * max_seq_len - 1);
    float acc[HEAD_DIM / 8][4] = {};
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};

    for (u32 first_key = 0; first_key < num_keys; first_key += TILE) {
        load_tile<HEAD_DIM>(v_tile, v, row_stride, first_key, len);
        commit_copies();
        wait_copies<1>();  // the keys, which were asked for before
        __syncthreads();
        if (cos != nullptr) {
            turn_tile<HEAD_DIM, T>(k_tile, cos, sin, first_key, len);
            __syncthreads();
        }
        const u32 in_tile = num_keys - first_key < TILE ? num_keys - first_key : TILE;
        const u32 num_chunks = (in_tile + 15) / 16;

        float scores[2 * CHUNKS][4] = {};
        if (has_queries) {
#pragma unroll
            for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
                if (chunk >= num_chunks) continue;
#pragma unroll
                for (u32 step = 0; step < STEPS; step++) {
                    const u32 row = chunk * 16 + lane / 16 * 8 + lane % 8, column = step * 16 + lane / 8 % 2 * 8;
                    u32 keys[4];
                    load_matrices(keys, k_tile + row * STRIDE + column);
                    mma<T>(scores[2 * chunk], queries[step], keys[0], keys[1]);
                    mma<T>(scores[2 * chunk + 1], queries[step], keys[2], keys[3]);
                }
            }
        }
        __syncthreads();  // k_tile is free
        if (first_key + TILE < num_keys) load_tile<HEAD_DIM>(k_tile, k, row_stride, first_key + TILE, len);
        commit_copies();  // an empty group where there is none: the count of groups stays

        if (has_queries) {
            const bool is_cut = causal != 0 || in_tile < TILE;
            float new_largest[2] = {largest[0], largest[1]};
#pragma unroll
            for (u32 n = 0; n < 2 * CHUNKS; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 key = first_key + n * 8 + lane % 4 * 2 + i % 2, row = query + i / 2 * 8;
                    float score = scores[n][i] * factor;
                    if (bias != nullptr && key < len && row < len) score += bias[key + max_seq_len - 1 - row] * LOG2_E;
                    if (is_cut && (key >= len || (causal != 0 && key > row))) score = -INFINITY;
                    scores[n][i] = score;
                    new_largest[i / 2] = fmaxf(new_largest[i / 2], score);
                }
            }
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                // The four threads of a row. Finite from the first tile on: every query sees key 0.
                new_largest[r] = fmaxf(new_largest[r], __shfl_xor_sync(0xffffffffu, new_largest[r], 1));
                new_largest[r] = fmaxf(new_largest[r], __shfl_xor_sync(0xffffffffu, new_largest[r], 2));
                const float rescale = exp2f(largest[r] - new_largest[r]);
                largest[r] = new_largest[r];
                sum[r] *= rescale;
#pragma unroll
                for (u32 n = 0; n < HEAD_DIM / 8; n++) {
                    acc[n][2 * r] *= rescale;
                    acc[n][2 * r + 1] *= rescale;
                }
            }
#pragma unroll
            for (u32 n = 0; n < 2 * CHUNKS; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    scores[n][i] = exp2f(scores[n][i] - largest[i / 2]);
                    sum[i / 2] += scores[n][i];
                }
            }
        }
        wait_copies<1>();  // the values
        __syncthreads();
        if (has_queries) {
#pragma unroll
            for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
                if (chunk >= num_chunks) continue;
                // What the first product left in a thread is what the second wants there.
                const float(&low)[4] = scores[2 * chunk];
                const float(&high)[4] = scores[2 * chunk + 1];
                const u32 weights[4] = {pack_two<T>(low[0], low[1]), pack_two<T>(low[2], low[3]),
                                        pack_two<T>(high[0], high[1]), pack_two<T>(high[2], high[3])};
#pragma unroll
                for (u32 step = 0; step < STEPS; step++) {
                    const u32 row = chunk * 16 + lane % 16, column = step * 16 + lane / 16 * 8;
                    u32 values[4];
                    load_matrices_transposed(values, v_tile + row * STRIDE + column);
                    mma<T>(acc[2 * step], weights, values[0], values[1]);
                    mma<T>(acc[2 * step + 1], weights, values[2], values[3]);
                }
            }
        }
        __syncthreads();  // v_tile is free
    }

    if (!has_queries) return;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        const u32 row = query + 8 * r;
        if (row >= len) continue;
        const float share = 1.0f / sum[r];
        u16* to = reinterpret_cast<u16*>(out) + static_cast<u64>(begin + row) * width + head * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (u32 n = 0; n < HEAD_DIM / 8; n++) {
            *reinterpret_cast<u32*>(to + n * 8) = pack_two<T>(acc[n][2 * r] * share, acc[n][2 * r + 1] * share);
        }
    }
}

}  // namespace

#define ATTENTION(NAME, T, HEAD_DIM)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) NAME(                                                            \
        T* out,                     /* [T, num_heads * HEAD_DIM] */                                                    \
        const u32* header,          /* [8] */                                                                          \
        const T* qkv,               /* [T, 3 * num_heads * HEAD_DIM] */                                                \
        const u32* cu_seqlens,      /* [S + 1] */                                                                      \
        const float* distance_bias, /* [num_heads, 2 * max_seq_len - 1] or null */                                     \
        const float* cos,           /* [max_seq_len, HEAD_DIM / 2] or null, as sin */                                  \
        const float* sin,           /* the same */                                                                     \
        u32 num_heads, u32 num_query_blocks, u32 max_seq_len, float scale, u32 causal) {                               \
        attention<HEAD_DIM, T>(out, header, qkv, cu_seqlens, distance_bias, cos, sin, num_heads, num_query_blocks,     \
                               max_seq_len, scale, causal);                                                            \
    }

ATTENTION(attention_f16_32, __half, 32)
ATTENTION(attention_f16_64, __half, 64)
ATTENTION(attention_f16_96, __half, 96)
ATTENTION(attention_f16_128, __half, 128)
ATTENTION(attention_bf16_32, __nv_bfloat16, 32)
ATTENTION(attention_bf16_64, __nv_bfloat16, 64)
ATTENTION(attention_bf16_96, __nv_bfloat16, 96)
ATTENTION(attention_bf16_128, __nv_bfloat16, 128)
