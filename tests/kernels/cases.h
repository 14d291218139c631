// What the programs here share: memory that is poisoned before it is written, values that look random, packed batches,
// and comparisons that end the program with 1 at the first wrong value.
#pragma once

#include "emulate.h"

#include <string>
#include <type_traits>

#include "common.cuh"

namespace {

// Values that look random and are the same on every run.
struct Noise {
    unsigned long long state;
    explicit Noise(unsigned long long seed) : state(seed * 2654435761u + 1) {}
    double next(double low, double high) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return low + (high - low) * static_cast<double>(state >> 40) / static_cast<double>(1 << 24);
    }
};

template <typename T>
struct Type;
template <>
struct Type<__half> {
    static constexpr const char* NAME = "f16";
    static constexpr double ROUNDING = 1.0 / 2048;  // half a unit in the last place of 11 bits
};
template <>
struct Type<__nv_bfloat16> {
    static constexpr const char* NAME = "bf16";
    static constexpr double ROUNDING = 1.0 / 256;
};
template <>
struct Type<float> {
    static constexpr const char* NAME = "f32";
    static constexpr double ROUNDING = 0.0;
};

template <typename T>
double value(T x) {
    return to_float(x);
}
inline double value(float x) { return x; }

// 16-byte aligned memory, as the launchers demand.
template <typename T>
struct Memory {
    T* data;
    size_t len;
    explicit Memory(size_t len) : len(len) {
        data = static_cast<T*>(std::aligned_alloc(64, (len * sizeof(T) + 127) / 64 * 64));
        std::memset(data, 0xff, len * sizeof(T));  // NaN in every float type
    }
    Memory(const Memory& other) : Memory(other.len) { std::memcpy(data, other.data, len * sizeof(T)); }
    Memory& operator=(const Memory&) = delete;
    ~Memory() { std::free(data); }
    T& operator[](size_t i) { return data[i]; }
    const T& operator[](size_t i) const { return data[i]; }
    bool is_poison(size_t i) const {
        const unsigned char* bytes = reinterpret_cast<const unsigned char*>(data + i);
        for (size_t b = 0; b < sizeof(T); b++) {
            if (bytes[b] != 0xff) return false;
        }
        return true;
    }
};

template <typename T>
Memory<T> noise(unsigned seed, size_t len, double low = -1.0, double high = 1.0) {
    Noise noise(seed);
    Memory<T> memory(len);
    for (size_t i = 0; i < len; i++) memory[i] = from_float<T>(static_cast<float>(noise.next(low, high)));
    return memory;
}

[[noreturn]] inline void fail(const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::exit(1);
}

template <typename T>
void expect(const Memory<T>& got, size_t i, double expected, double tolerance, const std::string& what) {
    const double g = value(got[i]);
    const double bound = Type<T>::ROUNDING * std::fabs(expected) + tolerance * std::fmax(1.0, std::fabs(expected));
    const bool same = std::isnan(expected) ? std::isnan(g) : g == expected || std::fabs(g - expected) <= bound;
    if (!same || got.is_poison(i)) {
        fail(what + ": value " + std::to_string(i) + ": got " + std::to_string(g) + ", expected " + std::to_string(expected));
    }
}

template <typename T>
void expect_untouched(const Memory<T>& got, size_t from, const std::string& what) {
    for (size_t i = from; i < got.len; i++) {
        if (!got.is_poison(i)) fail(what + ": value " + std::to_string(i) + " beyond the batch was written");
    }
}

// A packed batch in a bucket that is larger than it.
struct Batch {
    std::vector<u32> lens;
    Memory<u32> header{8};
    Memory<u32> cu_seqlens;
    u32 total_tokens = 0, token_capacity, seq_capacity;

    explicit Batch(std::vector<u32> lens) : lens(lens), cu_seqlens(lens.size() + 4) {
        u32 longest = 0;
        cu_seqlens[0] = 0;
        for (size_t s = 0; s < lens.size(); s++) {
            total_tokens += lens[s];
            longest = lens[s] > longest ? lens[s] : longest;
            cu_seqlens[s + 1] = total_tokens;
        }
        token_capacity = total_tokens + 5;
        seq_capacity = static_cast<u32>(lens.size()) + 3;
        const u32 words[8] = {total_tokens, static_cast<u32>(lens.size()), longest, 0, 0, 0, 0, 0};
        std::memcpy(header.data, words, sizeof words);
    }
};

const std::vector<std::vector<u32>> LENS = {{1}, {31, 32, 33}, {100, 1, 7}};

}  // namespace
