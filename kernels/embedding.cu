// embedding_{f16,bf16}: from token ids to the first hidden state.
//
// computes   out[t] = LayerNorm(word[id[t]] + position[t - start + position_offset] + token_type[type[t]]) * gamma + beta,
//            start being the first token of t's sequence; all types are 0 where the batch has none.
// shapes     as beside the parameters; T and S are the bucket's capacities, the true counts stand in `header`.
// dtype      tables and out f16 or bf16; sums, mean and variance f32; gamma and beta f32.
// launch     block (32, 4): a warp a row, or above 1024 columns (up to 256, 1): a block a row; grid ceil(T / rows of a
//            block). __launch_bounds__(256): 32 f32 values a thread stay in registers. Shared: 32 bytes.
// requires   hidden_size 1 to 8192; pointers 16-byte aligned, u32 ones 4-byte: src/ops/cuda/kernels/check.rs. Rows of a
//            width that 8 does not divide take 2-byte loads. cu_seqlens rising from 0: `CuSeqlens`. An id, type or
//            position beyond its table reads nothing and gives a row of NaN, which pool.cu reports.
// traffic    reads 2 H bytes of the word table a token (positions and types stay in the L2), writes 2 H: memory-bound.
// tolerance  one rounding to the 2-byte type after f32 arithmetic: half a unit in the last place, and 1e-5.
// source     Devlin et al. 2019, section 3 (sum of three embeddings); Ba, Kiros and Hinton 2016, section 3.
#include "rows.cuh"

namespace {

// The sequence of a token: the last bound not after it. The bounds of a batch lie in the L1 after the first warps.
__device__ __forceinline__ u32 sequence_of(const u32* cu_seqlens, u32 num_seqs, u32 token) {
    u32 low = 0, high = num_seqs;  // cu_seqlens[low] <= token < cu_seqlens[high]
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (cu_seqlens[middle] <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

template <bool PACKED, typename T>
__device__ __forceinline__ void embed_row(T* out, u32 token, u32 input_id, u32 type_id, u32 start, bool in_tables,
                                          u32 position, const T* word, const T* position_table, const T* token_type,
                                          const float* gamma, const float* beta, u32 hidden_size, float eps,
                                          float* partial) {
    float values[rows::ROW_VALUES] = {};
    if (in_tables) {
        rows::add_row<PACKED>(values, word + static_cast<u64>(input_id) * hidden_size, hidden_size);
        rows::add_row<PACKED>(values, position_table + static_cast<u64>(position) * hidden_size, hidden_size);
        if (token_type != nullptr) {
            rows::add_row<PACKED>(values, token_type + static_cast<u64>(type_id) * hidden_size, hidden_size);
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < rows::ROW_VALUES; i++) values[i] = NAN;
    }
    rows::layer_norm_row<PACKED>(values, gamma, beta, hidden_size, eps, partial);
    rows::store_row<PACKED>(out + static_cast<u64>(token) * hidden_size, values, hidden_size);
}

template <typename T>
__device__ __forceinline__ void embedding(T* out, const u32* header, const u32* input_ids, const u32* token_type_ids,
                                          const u32* cu_seqlens, const T* word, const T* position, const T* token_type,
                                          const float* gamma, const float* beta, u32 vocab_size, u32 num_positions,
                                          u32 num_token_types, u32 hidden_size, u32 position_offset, float eps) {
    __shared__ float partial[rows::MAX_ROW_THREADS / rows::WARP];
    const u32 token = blockIdx.x * blockDim.y + threadIdx.y;
    if (token >= header[rows::TOTAL_TOKENS]) return;  // a whole warp, or the whole block

    const u32 input_id = input_ids[token];
    const bool has_types = token_type_ids != nullptr && (header[rows::FLAGS] & rows::HAS_TOKEN_TYPES) != 0;
    const u32 type_id = has_types ? token_type_ids[token] : 0;
    const u32 start = cu_seqlens[sequence_of(cu_seqlens, header[rows::NUM_SEQS], token)];
    const u32 row = token - start + position_offset;
    const bool in_tables = input_id < vocab_size && row < num_positions && (token_type == nullptr || type_id < num_token_types);

    if (hidden_size % rows::PACK == 0) {
        embed_row<true>(out, token, input_id, type_id, start, in_tables, row, word, position, token_type, gamma, beta,
                        hidden_size, eps, partial);
    } else {
        embed_row<false>(out, token, input_id, type_id, start, in_tables, row, word, position, token_type, gamma, beta,
                         hidden_size, eps, partial);
    }
}

}  // namespace

#define EMBEDDING(NAME, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                                            \
        T* out,                    /* [T, hidden_size] */                                                              \
        const u32* header,         /* [8] */                                                                           \
        const u32* input_ids,      /* [T] */                                                                           \
        const u32* token_type_ids, /* [T] or null; read where the header says that the batch has them */               \
        const u32* cu_seqlens,     /* [S + 1] */                                                                       \
        const T* word,             /* [vocab_size, hidden_size] */                                                     \
        const T* position,         /* [num_positions, hidden_size] */                                                  \
        const T* token_type,       /* [num_token_types, hidden_size] or null */                                        \
        const float* gamma,        /* [hidden_size] */                                                                 \
        const float* beta,         /* [hidden_size] */                                                                 \
        u32 vocab_size, u32 num_positions, u32 num_token_types, u32 hidden_size, u32 position_offset, float eps) {     \
        embedding<T>(out, header, input_ids, token_type_ids, cu_seqlens, word, position, token_type, gamma, beta,      \
                     vocab_size, num_positions, num_token_types, hidden_size, position_offset, eps);                   \
    }

EMBEDDING(embedding_f16, __half)
EMBEDDING(embedding_bf16, __nv_bfloat16)
