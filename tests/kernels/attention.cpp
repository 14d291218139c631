// Attention on the CPU, block by block, against a plain double-precision reference on the same 2-byte inputs.
//
// Every output is poisoned first; what lies beyond the true counts must still be poison afterwards, and the tokens beyond
// the batch are NaN, so that a key that is not there shows. Ends with 1 at the first wrong value.
#include "cases.h"

#include "../../kernels/attention.cu"

namespace {

struct Case {
    std::vector<u32> lens;
    u32 num_heads = 2;
    bool causal = false, with_bias = false, with_rope = false;
    double spread = 1.0;  // of queries and keys: a large one makes the softmax sharp
};

// Rounded to T as the kernel rounds turned queries and keys.
template <typename T>
double rounded(double x) {
    return value(from_float<T>(static_cast<float>(x)));
}

template <typename T, u32 HEAD_DIM, typename Kernel>
void attention_case(Kernel kernel, const Case& of) {
    const std::string what = std::string("attention ") + Type<T>::NAME + " head_dim " + std::to_string(HEAD_DIM) +
                             (of.causal ? " causal" : "") + (of.with_bias ? " bias" : "") + (of.with_rope ? " rope" : "") +
                             " first length " + std::to_string(of.lens[0]) + " of " + std::to_string(of.lens.size());
    Batch batch(of.lens);
    const u32 width = of.num_heads * HEAD_DIM, max_seq_len = batch.header[2] + 3, pairs = HEAD_DIM / 2;
    const size_t row_stride = 3 * width, used = batch.total_tokens * row_stride;
    Memory<T> qkv(batch.token_capacity * row_stride), values = noise<T>(1, used, -1.0, 1.0);
    for (size_t i = 0; i < used; i++) {
        const bool is_value = i % row_stride >= 2 * width;
        qkv[i] = is_value ? values[i] : from_float<T>(static_cast<float>(value(values[i]) * of.spread));
    }
    Memory<float> bias = noise<float>(2, of.num_heads * (2 * max_seq_len - 1), -2.0, 2.0);
    Memory<float> cos(max_seq_len * pairs), sin(max_seq_len * pairs);
    for (u32 p = 0; p < max_seq_len; p++) {
        for (u32 d = 0; d < pairs; d++) {
            const double angle = p * std::pow(10000.0, -2.0 * d / HEAD_DIM);
            cos[p * pairs + d] = static_cast<float>(std::cos(angle));
            sin[p * pairs + d] = static_cast<float>(std::sin(angle));
        }
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(HEAD_DIM)));
    // As src/ops/cuda/attention.rs launches it, for a longest sequence of a bucket.
    const u32 num_query_blocks = (max_seq_len + 63) / 64;
    Memory<T> out(static_cast<size_t>(batch.token_capacity) * width);
    emulate::launch(dim3(batch.seq_capacity * num_query_blocks, of.num_heads, 1), dim3(128, 1, 1), 0, [&] {
        kernel(out.data, batch.header.data, qkv.data, batch.cu_seqlens.data, of.with_bias ? bias.data : nullptr,
               of.with_rope ? cos.data : nullptr, of.with_rope ? sin.data : nullptr, of.num_heads, num_query_blocks,
               max_seq_len, scale, of.causal ? 1 : 0);
    });

    const double tolerance = std::is_same<T, __half>::value ? 2e-3 : 1.6e-2;
    for (size_t s = 0; s < of.lens.size(); s++) {
        const size_t begin = batch.cu_seqlens[s];
        const u32 len = of.lens[s];
        // Column `c` of part 0 (queries) or 1 (keys), turned where the kernel turns.
        const auto at = [&](u32 part, u32 head, u32 i, u32 c) {
            const T* row = qkv.data + (begin + i) * row_stride + part * width + head * HEAD_DIM;
            if (!of.with_rope) return value(row[c]);
            const u32 d = c % pairs;
            const double x1 = value(row[d]), x2 = value(row[d + pairs]);
            const double co = cos[i * pairs + d], si = sin[i * pairs + d];
            return rounded<T>(c < pairs ? x1 * co - x2 * si : x2 * co + x1 * si);
        };
        for (u32 head = 0; head < of.num_heads; head++) {
            std::vector<double> queries(len * HEAD_DIM), keys(len * HEAD_DIM);
            for (u32 i = 0; i < len; i++) {
                for (u32 c = 0; c < HEAD_DIM; c++) {
                    queries[i * HEAD_DIM + c] = at(0, head, i, c);
                    keys[i * HEAD_DIM + c] = at(1, head, i, c);
                }
            }
            for (u32 i = 0; i < len; i++) {
                const u32 seen = of.causal ? i + 1 : len;
                std::vector<double> weights(seen);
                double largest = -INFINITY, sum = 0;
                for (u32 j = 0; j < seen; j++) {
                    double score = 0;
                    for (u32 c = 0; c < HEAD_DIM; c++) score += queries[i * HEAD_DIM + c] * keys[j * HEAD_DIM + c];
                    score *= scale;
                    if (of.with_bias) score += bias[head * (2 * max_seq_len - 1) + j + max_seq_len - 1 - i];
                    weights[j] = score;
                    largest = std::fmax(largest, score);
                }
                for (double& weight : weights) sum += weight = std::exp(weight - largest);
                for (u32 c = 0; c < HEAD_DIM; c++) {
                    double expected = 0;
                    for (u32 j = 0; j < seen; j++) {
                        expected += weights[j] / sum * value(qkv[(begin + j) * row_stride + 2 * width + head * HEAD_DIM + c]);
                    }
                    expect(out, (begin + i) * width + head * HEAD_DIM + c, expected, tolerance, what);
                }
            }
        }
    }
    expect_untouched(out, static_cast<size_t>(batch.total_tokens) * width, what);
}

template <typename T, u32 HEAD_DIM, typename Kernel>
void attention_cases(Kernel kernel) {
    for (u32 len : {1u, 15u, 16u, 17u, 31u, 32u, 33u, 64u, 65u, 100u, 130u}) attention_case<T, HEAD_DIM>(kernel, {{len}, 1});
    const std::vector<u32> mixed = {70, 1, 33, 129, 64};
    attention_case<T, HEAD_DIM>(kernel, {mixed, 3});
    attention_case<T, HEAD_DIM>(kernel, {mixed, 2, true});
    attention_case<T, HEAD_DIM>(kernel, {mixed, 2, false, true});
    attention_case<T, HEAD_DIM>(kernel, {mixed, 2, false, false, true});
    attention_case<T, HEAD_DIM>(kernel, {{200, 5}, 1, true, true, true});
    // Scores of some hundreds: a sum of exponentials that are not shifted by their largest overflows.
    attention_case<T, HEAD_DIM>(kernel, {{130}, 1, false, false, false, 16.0});
}

}  // namespace

int main() {
    attention_cases<__half, 32>(attention_f16_32);
    attention_cases<__half, 64>(attention_f16_64);
    attention_cases<__half, 96>(attention_f16_96);
    attention_cases<__half, 128>(attention_f16_128);
    attention_cases<__nv_bfloat16, 32>(attention_bf16_32);
    attention_cases<__nv_bfloat16, 64>(attention_bf16_64);
    attention_cases<__nv_bfloat16, 96>(attention_bf16_96);
    attention_cases<__nv_bfloat16, 128>(attention_bf16_128);
    std::printf("attention: all equal\n");
}
