// cuBLASLt's products, and as much of cuBLAS and cuRAND as opening a device touches.
//
// A value of the result is one sum in f32 whose order depends on nothing but its depth: a row has the same bits in every
// batch, bucket and algorithm. So a test may compare for equality where the real library would differ in the last place.
#include "emulate.h"
#include "emulator.h"

#include <cstring>

#include "common.cuh"

namespace emulator {
namespace {

// cublasStatus_t
constexpr int OK = 0, BLAS_INVALID_VALUE = 7, BLAS_EXECUTION_FAILED = 13, BLAS_NOT_SUPPORTED = 15;
// cudaDataType_t, cublasComputeType_t, cublasOperation_t, cublasLtEpilogue_t
constexpr int R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68, OP_N = 0, OP_T = 1;
constexpr int EPILOGUE_RELU = 2, EPILOGUE_BIAS = 4, EPILOGUE_GELU = 32, EPILOGUE_DEFAULT = 1;
// cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t
constexpr int DESC_TRANSA = 3, DESC_TRANSB = 4, DESC_EPILOGUE = 7, DESC_BIAS_POINTER = 8, PREFERENCE_MAX_WORKSPACE_BYTES = 1;

constexpr size_t VERSION = 130100;
// Words of an algorithm: this, its number, and the product it was proposed for.
constexpr uint64_t ALGORITHM = 0x656d756c61746564;
// By number: what it wants of the workspace. The last one is proposed and then does not run, as happens.
constexpr size_t ALGORITHM_BYTES[] = {0, 256 << 10, 1 << 20};
constexpr int NUM_ALGORITHMS = 3, BROKEN_ALGORITHM = 2;

struct Library {};

struct Desc {
    int operation_a = OP_N, operation_b = OP_N, epilogue = EPILOGUE_DEFAULT;
    uint64_t bias = 0;
};

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};

struct Preference {
    uint64_t max_bytes = 0;
};

struct Algorithm {
    uint64_t data[8];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

template <typename T>
Handles<T>& live(const char* kind) {
    static Handles<T>* handles = new Handles<T>(kind);
    return *handles;
}

Handles<Library>& libraries() { return live<Library>("cuBLASLt handles"); }
Handles<Desc>& descs() { return live<Desc>("cuBLASLt descriptors"); }
Handles<Layout>& layouts() { return live<Layout>("cuBLASLt layouts"); }
Handles<Preference>& preferences() { return live<Preference>("cuBLASLt preferences"); }

// y[rows, columns] = x[rows, depth] weight[columns, depth]^T as the engine asks for it, in cuBLASLt's words.
struct Product {
    uint64_t rows, columns, depth;
    int type, epilogue;
    uint64_t key() const {
        uint64_t key = 14695981039346656037ull;
        for (uint64_t word : {rows, columns, depth, static_cast<uint64_t>(type), static_cast<uint64_t>(epilogue)}) {
            key = (key ^ word) * 1099511628211ull;
        }
        return key;
    }
};

bool fits(const Algorithm& algorithm, const Product& product) {
    const uint64_t* words = algorithm.data;
    return words[0] == ALGORITHM && words[1] < NUM_ALGORITHMS && words[2] == product.key();
}

// Errors: a status for what cuBLASLt would refuse; a fault for what it would compute and this does not.
int product_of(const void* desc_handle, const void* weight_handle, const void* x_handle, const void* c_handle,
               const void* y_handle, Product& product, const char* call) {
    const auto desc = descs().get(desc_handle, call);
    const auto weight = layouts().get(weight_handle, call), x = layouts().get(x_handle, call);
    const auto y = layouts().get(y_handle, call);
    if (c_handle != y_handle) fault("%s: an operand C of another layout than D is not emulated", call);
    if (desc->operation_a != OP_T || desc->operation_b != OP_N) fault("%s: only A transposed is emulated", call);
    if (weight->rows != x->rows || weight->columns != y->rows || x->columns != y->columns) return BLAS_INVALID_VALUE;
    for (const auto& layout : {weight, x, y}) {
        if (layout->type != y->type) fault("%s: operands of different types are not emulated", call);
        if (layout->stride != static_cast<int64_t>(layout->rows)) fault("%s: gaps between columns are not emulated", call);
    }
    if (y->type != R_16F && y->type != R_16BF) fault("%s: the type %d is not emulated", call, y->type);
    const int after = desc->epilogue & ~EPILOGUE_BIAS;
    if (after != EPILOGUE_DEFAULT && after != EPILOGUE_RELU && after != EPILOGUE_GELU && desc->epilogue != EPILOGUE_BIAS) {
        fault("%s: the epilogue %d is not emulated", call, desc->epilogue);
    }
    product = {x->columns, y->rows, x->rows, y->type, desc->epilogue};
    return OK;
}

template <typename T>
T rounded(float x);
template <>
__half rounded(float x) { return __float2half_rn(x); }
template <>
__nv_bfloat16 rounded(float x) { return __float2bfloat16_rn(x); }

// Both 2-byte types to f32 by their bits.
template <typename T>
const float* table() {
    static const float* table = [] {
        float* values = new float[1 << 16];
        for (uint32_t bits = 0; bits < 1 << 16; bits++) values[bits] = to_float(T{static_cast<uint16_t>(bits)});
        return values;
    }();
    return table;
}

template <typename T>
void widen(const T* from, size_t len, float* to) {
    const float* values = table<T>();
    for (size_t i = 0; i < len; i++) to[i] = values[from[i].bits];
}

// 4 x 4 sums over the depth. Those beyond the operands' ends are computed on repeated rows and dropped, so that every
// sum goes through the same instructions.
constexpr uint64_t TILE = 4;
void dot_tile(const float* const (&x)[TILE], const float* const (&w)[TILE], uint64_t depth, float (&sums)[TILE][TILE]) {
    constexpr uint64_t LANES = 16;
    typedef float Lanes __attribute__((vector_size(LANES * 4)));
    Lanes acc[TILE][TILE] = {};
    for (uint64_t k = 0; k < depth; k += LANES) {
        Lanes left[TILE], right[TILE];
        for (uint64_t i = 0; i < TILE; i++) std::memcpy(&left[i], x[i] + k, sizeof(Lanes));
        for (uint64_t j = 0; j < TILE; j++) std::memcpy(&right[j], w[j] + k, sizeof(Lanes));
        for (uint64_t i = 0; i < TILE; i++) {
            for (uint64_t j = 0; j < TILE; j++) acc[i][j] += left[i] * right[j];
        }
    }
    for (uint64_t i = 0; i < TILE; i++) {
        for (uint64_t j = 0; j < TILE; j++) {
            sums[i][j] = 0;
            for (uint64_t lane = 0; lane < LANES; lane++) sums[i][j] += acc[i][j][lane];
        }
    }
}

float finish(float value, int epilogue) {
    if (epilogue & EPILOGUE_RELU) return value < 0 ? 0 : value;
    if (epilogue & EPILOGUE_GELU) {
        return 0.5f * value * (1 + std::tanh(0.79788456f * (value + 0.044715f * value * value * value)));
    }
    return value;
}

template <typename T>
void multiply(const Product& product, const void* weight_values, const void* x_values, const void* bias_values, void* y_values) {
    const T *weight = static_cast<const T*>(weight_values), *x = static_cast<const T*>(x_values);
    const T* bias = static_cast<const T*>(bias_values);
    T* y = static_cast<T*>(y_values);
    // Whole vectors of the tile's depth; the rest is zeros.
    const uint64_t depth = (product.depth + 15) / 16 * 16;
    std::vector<float> wide_x(product.rows * depth);
    for (uint64_t row = 0; row < product.rows; row++) widen(x + row * product.depth, product.depth, &wide_x[row * depth]);
    in_parts((product.columns + TILE - 1) / TILE, [&](uint64_t first, uint64_t last) {
        std::vector<float> wide_weight(TILE * depth);
        for (uint64_t tile = first; tile < last; tile++) {
            const float* w[TILE];
            for (uint64_t j = 0; j < TILE; j++) {
                const uint64_t column = std::min(tile * TILE + j, product.columns - 1);
                widen(weight + column * product.depth, product.depth, &wide_weight[j * depth]);
                w[j] = &wide_weight[j * depth];
            }
            for (uint64_t row = 0; row < product.rows; row += TILE) {
                const float* rows[TILE];
                for (uint64_t i = 0; i < TILE; i++) rows[i] = &wide_x[std::min(row + i, product.rows - 1) * depth];
                float sums[TILE][TILE];
                dot_tile(rows, w, depth, sums);
                for (uint64_t i = 0; i < TILE && row + i < product.rows; i++) {
                    for (uint64_t j = 0; j < TILE && tile * TILE + j < product.columns; j++) {
                        const uint64_t column = tile * TILE + j;
                        const float value = sums[i][j] + (bias == nullptr ? 0.0f : to_float(bias[column]));
                        y[(row + i) * product.columns + column] = rounded<T>(finish(value, product.epilogue));
                    }
                }
            }
        }
    });
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

size_t cublasLtGetVersion() { return VERSION; }

int cublasLtCreate(void** handle) {
    if (enter() != SUCCESS) return 1;  // CUBLAS_STATUS_NOT_INITIALIZED
    *handle = libraries().add(std::make_shared<Library>());
    return OK;
}

int cublasLtDestroy(void* handle) {
    libraries().remove(handle, "cublasLtDestroy");
    return OK;
}

int cublasLtMatrixLayoutCreate(void** handle, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    if (rows == 0 || columns == 0 || stride < static_cast<int64_t>(rows)) return BLAS_INVALID_VALUE;
    *handle = layouts().add(std::make_shared<Layout>(Layout{type, rows, columns, stride}));
    return OK;
}

int cublasLtMatrixLayoutDestroy(void* handle) {
    layouts().remove(handle, "cublasLtMatrixLayoutDestroy");
    return OK;
}

int cublasLtMatmulDescCreate(void** handle, int compute_type, int scale_type) {
    if (compute_type != COMPUTE_32F || scale_type != R_32F) fault("cublasLtMatmulDescCreate: only sums in f32 are emulated");
    *handle = descs().add(std::make_shared<Desc>());
    return OK;
}

int cublasLtMatmulDescDestroy(void* handle) {
    descs().remove(handle, "cublasLtMatmulDescDestroy");
    return OK;
}

int cublasLtMatmulDescSetAttribute(void* handle, int attribute, const void* value, size_t num_bytes) {
    const auto desc = descs().get(handle, "cublasLtMatmulDescSetAttribute");
    const auto set = [&](auto& field) {
        if (num_bytes != sizeof field) return BLAS_INVALID_VALUE;
        std::memcpy(&field, value, sizeof field);
        return OK;
    };
    switch (attribute) {
        case DESC_TRANSA: return set(desc->operation_a);
        case DESC_TRANSB: return set(desc->operation_b);
        case DESC_EPILOGUE: return set(desc->epilogue);
        case DESC_BIAS_POINTER: return set(desc->bias);
        default: fault("cublasLtMatmulDescSetAttribute: the attribute %d is not emulated", attribute);
    }
}

int cublasLtMatmulPreferenceCreate(void** handle) {
    *handle = preferences().add(std::make_shared<Preference>());
    return OK;
}

int cublasLtMatmulPreferenceDestroy(void* handle) {
    preferences().remove(handle, "cublasLtMatmulPreferenceDestroy");
    return OK;
}

int cublasLtMatmulPreferenceSetAttribute(void* handle, int attribute, const void* value, size_t num_bytes) {
    const auto preference = preferences().get(handle, "cublasLtMatmulPreferenceSetAttribute");
    if (attribute != PREFERENCE_MAX_WORKSPACE_BYTES) {
        fault("cublasLtMatmulPreferenceSetAttribute: the attribute %d is not emulated", attribute);
    }
    if (num_bytes != sizeof preference->max_bytes) return BLAS_INVALID_VALUE;
    std::memcpy(&preference->max_bytes, value, num_bytes);
    return OK;
}

int cublasLtMatmulAlgoGetHeuristic(void* library, void* desc, void* weight, void* x, void* c, void* y, void* preference,
                                   int num_wanted, Heuristic* found, int* num_found) {
    libraries().get(library, "cublasLtMatmulAlgoGetHeuristic");
    Product product{};
    if (const int status = product_of(desc, weight, x, c, y, product, "cublasLtMatmulAlgoGetHeuristic")) return status;
    const uint64_t max_bytes = preferences().get(preference, "cublasLtMatmulAlgoGetHeuristic")->max_bytes;
    count("algorithms asked for");
    *num_found = 0;
    for (int i = 0; i < NUM_ALGORITHMS && *num_found < num_wanted; i++) {
        if (ALGORITHM_BYTES[i] > max_bytes) continue;
        found[(*num_found)++] = {{{ALGORITHM, static_cast<uint64_t>(i), product.key()}}, ALGORITHM_BYTES[i], OK, 1.0f, {}};
    }
    return *num_found == 0 ? BLAS_NOT_SUPPORTED : OK;
}

int cublasLtMatmulAlgoCheck(void* library, void* desc, void* weight, void* x, void* c, void* y, const Algorithm* algorithm,
                            Heuristic* checked) {
    libraries().get(library, "cublasLtMatmulAlgoCheck");
    Product product{};
    if (const int status = product_of(desc, weight, x, c, y, product, "cublasLtMatmulAlgoCheck")) return status;
    count("algorithms checked");
    if (!fits(*algorithm, product)) return BLAS_NOT_SUPPORTED;
    *checked = {*algorithm, ALGORITHM_BYTES[algorithm->data[1]], OK, 1.0f, {}};
    return OK;
}

int cublasLtMatmul(void* library, void* desc_handle, const float* alpha, const void* weight, void* weight_layout,
                   const void* x, void* x_layout, const float* beta, const void*, void* c_layout, void* y, void* y_layout,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream_handle) {
    constexpr const char* CALL = "cublasLtMatmul";
    libraries().get(library, CALL);
    const auto stream = stream_of(stream_handle, CALL);
    if (enter() != SUCCESS || stream->context != current_context()) return BLAS_EXECUTION_FAILED;
    Product product{};
    const int status = product_of(desc_handle, weight_layout, x_layout, c_layout, y_layout, product, CALL);
    if (status != OK) return status;
    if (*alpha != 1.0f || *beta != 0.0f) fault("%s: factors other than 1 and 0 are not emulated", CALL);
    if (algorithm == nullptr) fault("%s: a product without an algorithm is not emulated", CALL);
    const uint64_t number = algorithm->data[1];
    if (!fits(*algorithm, product) || number == BROKEN_ALGORITHM) return BLAS_NOT_SUPPORTED;
    const size_t used_bytes = ALGORITHM_BYTES[number];
    if (used_bytes > workspace_bytes) return BLAS_INVALID_VALUE;
    // The descriptor is read now: the next product of its shape has another bias.
    const bool has_bias = (product.epilogue & EPILOGUE_BIAS) != 0;
    const void* bias = has_bias ? reinterpret_cast<const void*>(descs().get(desc_handle, CALL)->bias) : nullptr;
    const int device = stream->context->device;
    const auto run = [=] {
        check_range(CALL, "A", device, weight, product.columns * product.depth * 2);
        check_range(CALL, "B", device, x, product.rows * product.depth * 2);
        check_range(CALL, "D", device, y, product.rows * product.columns * 2);
        if (has_bias) check_range(CALL, "the bias", device, bias, product.columns * 2);
        if (used_bytes > 0) {
            check_range(CALL, "the workspace", device, workspace, used_bytes);
            std::memset(workspace, 0xff, used_bytes);  // whoever keeps something there shall see
        }
        if (product.type == R_16F) {
            multiply<__half>(product, weight, x, bias, y);
        } else {
            multiply<__nv_bfloat16>(product, weight, x, bias, y);
        }
    };
    enqueue(*stream, {"products", run, true, false});
    return OK;
}

// candle makes both when it opens a device, and the engine uses neither.
int cublasCreate_v2(void** handle) { return cublasLtCreate(handle); }
int cublasDestroy_v2(void* handle) { return cublasLtDestroy(handle); }
int cublasSetStream_v2(void* handle, void*) {
    libraries().get(handle, "cublasSetStream");
    return OK;
}
int curandCreateGenerator(void** handle, int) { return cublasLtCreate(handle); }
int curandDestroyGenerator(void* handle) { return cublasLtDestroy(handle); }
int curandSetStream(void* handle, void*) {
    libraries().get(handle, "curandSetStream");
    return OK;
}
int curandSetPseudoRandomGeneratorSeed(void* handle, unsigned long long) {
    libraries().get(handle, "curandSetPseudoRandomGeneratorSeed");
    return OK;
}

}  // extern "C"
