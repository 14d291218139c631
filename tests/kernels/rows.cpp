// The row kernels on the CPU, block by block, against plain double-precision references.
//
// Every output is poisoned first; what lies beyond the true counts must still be poison afterwards. Ends with 1 at the
// first wrong value.
#include "cases.h"

#include "../../kernels/activation.cu"
#include "../../kernels/embedding.cu"
#include "../../kernels/norm.cu"
#include "../../kernels/pool.cu"

namespace {

// As src/ops/cuda/kernels/check.rs launches rows.
struct Geometry {
    dim3 grid, block;
    Geometry(u32 num_rows, u32 width) {
        const u32 packs = ((width + 7) / 8 + 31) / 32 * 32;
        const u32 threads = width <= 1024 ? 32 : packs < 256 ? packs : 256;
        const u32 rows = width <= 1024 ? 4 : 1;
        grid = dim3((num_rows + rows - 1) / rows, 1, 1);
        block = dim3(threads, rows, 1);
    }
};

// Normalises in place as the papers write it.
void layer_norm(std::vector<double>& row, const float* gamma, const float* beta, double eps) {
    double mean = 0, variance = 0;
    for (double x : row) mean += x / row.size();
    for (double x : row) variance += (x - mean) * (x - mean) / row.size();
    for (size_t c = 0; c < row.size(); c++) {
        row[c] = (row[c] - mean) / std::sqrt(variance + eps) * gamma[c] + (beta == nullptr ? 0.0 : beta[c]);
    }
}

void rms_norm(std::vector<double>& row, const float* gamma, double eps) {
    double square = 0;
    for (double x : row) square += x * x / row.size();
    for (size_t c = 0; c < row.size(); c++) row[c] = row[c] / std::sqrt(square + eps) * gamma[c];
}

// ---- embedding -----------------------------------------------------------------------------------------------------

enum class Types { NONE, ALL_ZERO, GIVEN };

template <typename T, typename Kernel>
void embedding_case(Kernel kernel, const std::vector<u32>& lens, u32 width, Types types, u32 offset, bool bad_id) {
    const u32 vocab = 50, positions = 120, num_types = 3;
    const float eps = 1e-12f;
    Batch batch(lens);
    const std::string what = std::string("embedding ") + Type<T>::NAME + " width " + std::to_string(width) + " tokens " +
                             std::to_string(batch.total_tokens) + " types " + std::to_string(static_cast<int>(types));
    Memory<T> word = noise<T>(1, vocab * width), position = noise<T>(2, positions * width);
    Memory<T> type_table = noise<T>(3, num_types * width);
    Memory<float> gamma = noise<float>(4, width), beta = noise<float>(5, width);
    Memory<u32> ids(batch.token_capacity), type_ids(batch.token_capacity);
    for (u32 t = 0; t < batch.total_tokens; t++) {
        ids[t] = (t * 7 + 3) % vocab;
        type_ids[t] = t * 5 % num_types;
    }
    if (bad_id) ids[0] = vocab;
    batch.header[3] = types == Types::GIVEN ? 1 : 0;
    Memory<T> out(batch.token_capacity * static_cast<size_t>(width));
    const Geometry at(batch.token_capacity, width);
    emulate::launch(at.grid, at.block, 0, [&] {
        kernel(out.data, batch.header.data, ids.data, types == Types::NONE ? nullptr : type_ids.data,
               batch.cu_seqlens.data, word.data, position.data, types == Types::NONE ? nullptr : type_table.data,
               gamma.data, beta.data, vocab, positions, num_types, width, offset, eps);
    });
    size_t token = 0;
    for (u32 len : lens) {
        for (u32 i = 0; i < len; i++, token++) {
            std::vector<double> row(width);
            for (u32 c = 0; c < width; c++) {
                row[c] = ids[token] < vocab ? value(word[ids[token] * width + c]) : NAN;
                row[c] += value(position[(i + offset) * width + c]);
                if (types != Types::NONE) {
                    row[c] += value(type_table[(types == Types::GIVEN ? type_ids[token] : 0) * width + c]);
                }
            }
            layer_norm(row, gamma.data, beta.data, eps);
            for (u32 c = 0; c < width; c++) expect(out, token * width + c, row[c], 2e-5, what);
        }
    }
    expect_untouched(out, token * width, what);
}

template <typename T, typename Kernel>
void embedding_cases(Kernel kernel) {
    for (u32 width : {1u, 8u, 31u, 32u, 33u, 384u, 1024u, 1030u, 1032u, 1536u}) {
        for (const auto& lens : LENS) embedding_case<T>(kernel, lens, width, Types::GIVEN, 2, false);
    }
    for (u32 width : {33u, 384u}) {
        embedding_case<T>(kernel, LENS[1], width, Types::NONE, 0, false);
        embedding_case<T>(kernel, LENS[1], width, Types::ALL_ZERO, 0, false);
        embedding_case<T>(kernel, LENS[1], width, Types::GIVEN, 0, true);
    }
    for (u32 width : {4104u, 8191u, 8192u}) embedding_case<T>(kernel, {2}, width, Types::GIVEN, 0, false);
}

// ---- norm ----------------------------------------------------------------------------------------------------------

enum class Norm { LAYER, LAYER_WITHOUT_BETA, RMS };

// `in_place`: out is the residual's memory.
template <typename T>
void norm_case(Norm norm, u32 num_rows, u32 width, bool with_residual, bool with_sum, bool in_place, double centre) {
    const float eps = 1e-5f;
    const std::string what = std::string("norm ") + std::to_string(static_cast<int>(norm)) + " " + Type<T>::NAME + " width " +
                             std::to_string(width) + " rows " + std::to_string(num_rows) + (in_place ? " in place" : "");
    Batch batch({num_rows});
    const size_t len = static_cast<size_t>(batch.token_capacity) * width;
    const size_t used = static_cast<size_t>(num_rows) * width;
    Memory<T> x = noise<T>(1, len, centre - 1, centre + 1), residual(len), out(len), sum(len);
    Memory<T> noisy = noise<T>(2, used);
    std::memcpy(residual.data, noisy.data, used * sizeof(T));  // beyond the rows: poison
    Memory<float> gamma = noise<float>(3, width), beta = noise<float>(4, width);
    T* to = in_place ? residual.data : out.data;
    const T* from = with_residual ? residual.data : nullptr;
    T* sum_to = with_sum ? sum.data : nullptr;
    const float* beta_from = norm == Norm::LAYER ? beta.data : nullptr;
    const Geometry at(batch.token_capacity, width);
    emulate::launch(at.grid, at.block, 0, [&] {
        if constexpr (std::is_same<T, __half>::value) {
            if (norm == Norm::RMS) {
                add_rms_norm_f16(to, batch.header.data, x.data, from, sum_to, gamma.data, width, eps);
            } else {
                add_layer_norm_f16(to, batch.header.data, x.data, from, sum_to, gamma.data, beta_from, width, eps);
            }
        } else {
            if (norm == Norm::RMS) {
                add_rms_norm_bf16(to, batch.header.data, x.data, from, sum_to, gamma.data, width, eps);
            } else {
                add_layer_norm_bf16(to, batch.header.data, x.data, from, sum_to, gamma.data, beta_from, width, eps);
            }
        }
    });
    const Memory<T>& got = in_place ? residual : out;
    for (u32 r = 0; r < num_rows; r++) {
        std::vector<double> row(width);
        for (u32 c = 0; c < width; c++) {
            const size_t i = static_cast<size_t>(r) * width + c;
            row[c] = value(x[i]) + (with_residual ? value(noisy[i]) : 0.0);
            if (with_sum) expect(sum, i, row[c], 1e-6, what + " sum");
        }
        if (norm == Norm::RMS) {
            rms_norm(row, gamma.data, eps);
        } else {
            layer_norm(row, gamma.data, beta_from, eps);
        }
        for (u32 c = 0; c < width; c++) {
            expect(got, static_cast<size_t>(r) * width + c, row[c], centre == 0 ? 2e-5 : 2e-4, what);
        }
    }
    expect_untouched(got, used, what);
    expect_untouched(sum, with_sum ? used : 0, what + " sum");
}

template <typename T>
void norm_cases() {
    for (Norm norm : {Norm::LAYER, Norm::RMS}) {
        for (u32 width : {1u, 8u, 31u, 32u, 33u, 384u, 1024u, 1030u, 1032u, 1536u}) {
            for (u32 rows : {1u, 31u, 32u, 33u, 100u}) norm_case<T>(norm, rows, width, true, false, false, 0.0);
        }
        for (u32 width : {33u, 384u, 1032u, 4104u, 8191u, 8192u}) {
            norm_case<T>(norm, 3, width, false, true, false, 0.0);
            norm_case<T>(norm, 3, width, true, true, true, 0.0);
        }
    }
    norm_case<T>(Norm::LAYER_WITHOUT_BETA, 3, 384, true, false, false, 0.0);
    // A mean far from 0: E[x^2] - E[x]^2 would lose the variance's digits.
    norm_case<T>(Norm::LAYER, 3, 384, false, false, false, 100.0);
    norm_case<T>(Norm::LAYER, 3, 1536, false, false, false, 100.0);
}

// ---- activation ----------------------------------------------------------------------------------------------------

double activation(u32 number, double x) {
    switch (number) {
        case 1: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case 2: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case 3: return x < 0 ? 0 : x;
        case 4: return x / (1 + std::exp(-x));
        case 5: return std::tanh(x);
        default: return x;
    }
}

template <typename T, typename Kernel>
void activation_case(Kernel kernel, u32 number, u32 num_rows, u32 width, bool with_bias) {
    const std::string what = std::string("activation ") + std::to_string(number) + " " + Type<T>::NAME + " width " +
                             std::to_string(width) + " rows " + std::to_string(num_rows);
    Batch batch({num_rows});
    const size_t used = static_cast<size_t>(num_rows) * width;
    Memory<T> x = noise<T>(1, used, -8.0, 8.0), y(static_cast<size_t>(batch.token_capacity) * width);
    x[used - 1] = from_float<T>(NAN);
    x[0] = from_float<T>(-30000.0f);  // beyond every tail
    std::memcpy(y.data, x.data, used * sizeof(T));
    Memory<float> bias = noise<float>(2, width);
    const u32 blocks = static_cast<u32>((y.len + 2047) / 2048);
    emulate::launch(dim3(blocks, 1, 1), dim3(256, 1, 1), 0, [&] {
        kernel(y.data, batch.header.data, with_bias ? bias.data : nullptr, width, number);
    });
    for (size_t i = 0; i < used; i++) {
        expect(y, i, activation(number, value(x[i]) + (with_bias ? bias[i % width] : 0.0)), 1e-6, what);
    }
    expect_untouched(y, used, what);
}

template <typename T, typename Kernel>
void swiglu_case(Kernel kernel, u32 num_rows, u32 width) {
    const std::string what = std::string("swiglu ") + Type<T>::NAME + " width " + std::to_string(width);
    Batch batch({num_rows});
    Memory<T> x = noise<T>(1, static_cast<size_t>(batch.token_capacity) * 2 * width, -4.0, 4.0);
    Memory<T> out(static_cast<size_t>(batch.token_capacity) * width);
    const u32 blocks = static_cast<u32>((out.len + 2047) / 2048);
    emulate::launch(dim3(blocks, 1, 1), dim3(256, 1, 1), 0,
                    [&] { kernel(out.data, batch.header.data, x.data, width); });
    for (u32 r = 0; r < num_rows; r++) {
        for (u32 c = 0; c < width; c++) {
            const double gate = value(x[r * 2 * width + c]), up = value(x[r * 2 * width + width + c]);
            expect(out, r * width + c, activation(4, gate) * up, 1e-6, what);
        }
    }
    expect_untouched(out, static_cast<size_t>(num_rows) * width, what);
}

template <typename T, typename Activation, typename Swiglu>
void activation_cases(Activation activation, Swiglu swiglu) {
    for (u32 number = 0; number <= 5; number++) {
        for (u32 width : {1u, 7u, 8u, 33u, 384u, 1536u}) {
            for (u32 rows : {1u, 31u, 33u}) activation_case<T>(activation, number, rows, width, true);
            activation_case<T>(activation, number, 3, width, false);
        }
    }
    for (u32 width : {1u, 7u, 8u, 33u, 384u, 1536u}) {
        for (u32 rows : {1u, 31u, 33u}) swiglu_case<T>(swiglu, rows, width);
    }
}

// ---- pool ----------------------------------------------------------------------------------------------------------

// What the tokens are made of, besides noise.
enum class Fill { NOISE, ZERO, LARGE, TINY };

template <typename T, typename Out, typename Kernel>
void pool_case(Kernel kernel, u32 pooling, const std::vector<u32>& lens, u32 width, Fill fill, int bad_seq) {
    Batch batch(lens);
    const std::string what = std::string("pool ") + std::to_string(pooling) + " " + Type<T>::NAME + " to " +
                             Type<Out>::NAME + " width " + std::to_string(width) + " tokens " +
                             std::to_string(batch.total_tokens) + " fill " + std::to_string(static_cast<int>(fill));
    const double scale = fill == Fill::NOISE ? 1.0 : fill == Fill::ZERO ? 0.0 : fill == Fill::LARGE ? 3e38 : 1e-30;
    Memory<T> hidden = noise<T>(1, static_cast<size_t>(batch.token_capacity) * width, -scale, scale);
    Memory<u32> specs(2 * batch.seq_capacity);
    for (size_t s = 0; s < lens.size(); s++) {
        const u32 cuts[4] = {width, 1, (width + 1) / 2, width > 8 ? width - 5 : width};
        specs[2 * s] = cuts[s % 4];
        specs[2 * s + 1] = fill == Fill::LARGE || s % 2 == 0 ? 1 : 0;
    }
    if (bad_seq >= 0) hidden[static_cast<size_t>(batch.cu_seqlens[bad_seq]) * width] = from_float<T>(INFINITY);
    Memory<Out> out(static_cast<size_t>(batch.seq_capacity) * width);
    Memory<u32> not_finite(1);
    not_finite[0] = 0;
    const u32 shared = 4 * (width > 4096 ? width : 4096);
    emulate::launch(dim3(batch.seq_capacity, 1, 1), dim3(512, 1, 1), shared, [&] {
        kernel(out.data, batch.header.data, hidden.data, batch.cu_seqlens.data, specs.data, width, pooling,
               not_finite.data);
    });
    const u32 flag = bad_seq < 0 ? 0 : static_cast<u32>(bad_seq) + 1;
    if (not_finite[0] != flag) fail(what + ": not_finite is " + std::to_string(not_finite[0]));
    for (size_t s = 0; s < lens.size(); s++) {
        if (static_cast<int>(s) == bad_seq) continue;  // flagged; its values are nobody's
        const u32 begin = batch.cu_seqlens[s], len = lens[s], cut = specs[2 * s];
        std::vector<double> row(width, 0.0);
        double square = 0;
        for (u32 c = 0; c < cut; c++) {
            double sum = 0, weighted = 0, largest = -INFINITY;
            for (u32 i = 0; i < len; i++) {
                const double x = value(hidden[static_cast<size_t>(begin + i) * width + c]);
                sum += x / len;
                weighted += x * (i + 1) / (0.5 * len * (len + 1.0));
                largest = std::fmax(largest, x);
            }
            const double first = value(hidden[static_cast<size_t>(begin) * width + c]);
            const double last = value(hidden[static_cast<size_t>(begin + len - 1) * width + c]);
            const double poolings[5] = {first, sum, largest, last, weighted};
            row[c] = poolings[pooling];
            square += row[c] * row[c];
        }
        const double norm = specs[2 * s + 1] == 1 && square > 0 ? std::sqrt(square) : 1.0;
        for (u32 c = 0; c < width; c++) expect(out, s * width + c, row[c] / norm, 2e-6, what);
    }
    expect_untouched(out, lens.size() * width, what);
}

template <typename T, typename Out, typename Kernel>
void pool_cases(Kernel kernel) {
    for (u32 pooling = 0; pooling <= 4; pooling++) {
        for (u32 width : {1u, 8u, 33u, 384u, 768u, 1000u}) {
            for (const auto& lens : LENS) pool_case<T, Out>(kernel, pooling, lens, width, Fill::NOISE, -1);
        }
        pool_case<T, Out>(kernel, pooling, {1, 2, 3, 513}, 384, Fill::NOISE, -1);
        for (u32 width : {4104u, 8191u, 8192u}) pool_case<T, Out>(kernel, pooling, {3, 1}, width, Fill::NOISE, -1);
        pool_case<T, Out>(kernel, pooling, {3, 1, 2}, 384, Fill::ZERO, -1);
        // The first value of a sequence counts in every pooling but that of the last token.
        if (pooling != 3) pool_case<T, Out>(kernel, pooling, {3, 1, 2}, 384, Fill::NOISE, 1);
    }
    if (std::is_same<T, __nv_bfloat16>::value) {
        for (u32 pooling : {0u, 3u}) {
            pool_case<T, Out>(kernel, pooling, {3, 1, 2}, 384, Fill::LARGE, -1);
            pool_case<T, Out>(kernel, pooling, {3, 1, 2}, 384, Fill::TINY, -1);
        }
    }
}

}  // namespace

int main() {
    embedding_cases<__half>(embedding_f16);
    embedding_cases<__nv_bfloat16>(embedding_bf16);
    norm_cases<__half>();
    norm_cases<__nv_bfloat16>();
    activation_cases<__half>(bias_activation_f16, swiglu_f16);
    activation_cases<__nv_bfloat16>(bias_activation_bf16, swiglu_bf16);
    pool_cases<__half, float>(pool_f16_to_f32);
    pool_cases<__nv_bfloat16, float>(pool_bf16_to_f32);
    pool_cases<__half, __half>(pool_f16_to_f16);
    pool_cases<__nv_bfloat16, __nv_bfloat16>(pool_bf16_to_bf16);
    std::printf("row kernels: all equal\n");
}
