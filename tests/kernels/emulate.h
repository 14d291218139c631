// CUDA's words and types for a plain C++ compiler: kernels/*.cu run as they stand, one block after another.
//
// The threads of a block are fibers of one operating-system thread; each runs until it waits at a barrier or for its
// warp. Blocks may run on several operating-system threads at once, each with a machine and shared memory of its own.
// So a program is deterministic, a kernel that waits for ever is found, and so is a use of what no thread wrote:
// dynamic shared memory is poisoned before each block. What is not found: races that need true concurrency, misaligned
// loads, reads out of bounds (build with -fsanitize=address for those), and time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// A thread of the operating system runs one block at a time, so one variable serves all of its blocks.
#define __shared__ static thread_local
#define SHARED_FLOATS(name) float* name = reinterpret_cast<float*>(emulate::dynamic_shared())

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulate {

constexpr unsigned WARP_SIZE = 32;
constexpr size_t STACK_BYTES = 128 * 1024;

// Fibers that wait for each other: those of a block, or of a warp.
struct Barrier {
    unsigned live = 0, arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    // What each lane hands to the others, by turns: nobody can be two exchanges ahead.
    uint64_t slots[2][WARP_SIZE];
    // The operands of a matrix product: four registers of a, two of b, two values each.
    float fragments[WARP_SIZE][12];
};

// A copy to shared memory that may not have happened yet.
struct Copy {
    void* to;
    const void* from;
    bool is_there;
};

// A place that __builtin_longjmp goes back to: of a length that is GCC's and Clang's.
typedef void* Place[5];

struct Fiber {
    Place here;
    ucontext_t start;
    std::unique_ptr<char[]> stack;
    bool is_started = false, is_finished = true;
    dim3 thread_idx;
    unsigned linear = 0;
    // Groups of copies under way, the oldest first; the last one is not ended yet.
    std::vector<std::vector<Copy>> copies;
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    Barrier block;
    Fiber* current = nullptr;
    Place scheduler;
    std::function<void()> body;
    dim3 grid_dim, block_dim, block_idx;
    std::vector<uint64_t> shared;
    // Rises whenever a fiber gets past something.
    uint64_t progress = 0;
};

// That of the calling thread. A bare pointer, because the way to a `thread_local` object with a constructor asks each time
// whether it was constructed, and every switch between fibers goes this way.
inline Machine& machine() {
    static __thread Machine* machine = nullptr;
    if (machine == nullptr) {
        static thread_local std::unique_ptr<Machine> owner(new Machine);
        machine = owner.get();
    }
    return *machine;
}

__attribute__((noinline)) inline void yield() {
    // The compiler's own, and not swapcontext: a system call a switch would make the tests ten times as slow. Neither
    // function may be inlined, a place is left for that of another function alone.
    Machine& m = machine();
    if (__builtin_setjmp(m.current->here) == 0) __builtin_longjmp(m.scheduler, 1);
}

inline void release_if_complete(Barrier& barrier) {
    if (barrier.arrived > 0 && barrier.arrived == barrier.live) {
        barrier.arrived = 0;
        barrier.generation++;
        machine().progress++;
    }
}

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    barrier.arrived++;
    release_if_complete(barrier);
    while (barrier.generation == generation) yield();
}

inline Warp& warp() { return machine().warps[machine().current->linear / WARP_SIZE]; }
inline unsigned lane() { return machine().current->linear % WARP_SIZE; }
inline void* dynamic_shared() { return machine().shared.data(); }

inline void fiber_main() {
    for (;;) {
        machine().body();
        // A thread that has returned is waited for by nobody.
        machine().current->is_finished = true;
        machine().progress++;
        machine().block.live--;
        release_if_complete(machine().block);
        warp().barrier.live--;
        release_if_complete(warp().barrier);
        yield();
    }
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
    machine().current = &fiber;
    if (__builtin_setjmp(machine().scheduler) != 0) return;
    if (fiber.is_started) __builtin_longjmp(fiber.here, 1);
    fiber.is_started = true;
    setcontext(&fiber.start);
}

inline void run_block(unsigned num_threads) {
    Machine& m = machine();
    m.block = Barrier{num_threads, 0, 0};
    m.warps.assign((num_threads + WARP_SIZE - 1) / WARP_SIZE, Warp());
    for (unsigned t = 0; t < num_threads; t++) {
        Fiber& fiber = *m.fibers[t];
        fiber.is_finished = false;
        fiber.linear = t;
        fiber.copies.assign(1, {});
        fiber.thread_idx = dim3(t % m.block_dim.x, t / m.block_dim.x % m.block_dim.y, t / m.block_dim.x / m.block_dim.y);
        m.warps[t / WARP_SIZE].barrier.live++;
    }
    bool is_running = true;
    while (is_running) {
        const uint64_t before = m.progress;
        is_running = false;
        for (unsigned t = 0; t < num_threads; t++) {
            if (m.fibers[t]->is_finished) continue;
            is_running = true;
            resume(*m.fibers[t]);
        }
        if (is_running && m.progress == before) {
            std::fprintf(stderr, "block %u: its threads wait for each other for ever\n", m.block_idx.x);
            std::_Exit(1);
        }
    }
}

// Runs `body`, a call of a kernel, as each thread of the blocks `first` to `last - 1` of a grid, counted with x fastest.
inline void run_blocks(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, uint64_t first,
                       uint64_t last) {
    Machine& m = machine();
    m.grid_dim = grid;
    m.block_dim = block;
    m.body = body;
    const unsigned num_threads = block.x * block.y * block.z;
    while (m.fibers.size() < num_threads) {
        std::unique_ptr<Fiber> fiber(new Fiber);
        fiber->stack.reset(new char[STACK_BYTES]);
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = fiber->stack.get();
        fiber->start.uc_stack.ss_size = STACK_BYTES;
        fiber->start.uc_link = nullptr;
        makecontext(&fiber->start, fiber_main, 0);
        m.fibers.push_back(std::move(fiber));
    }
    for (uint64_t i = first; i < last; i++) {
        m.block_idx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        m.shared.assign((shared_bytes + 7) / 8, ~uint64_t(0));
        run_block(num_threads);
    }
}

// All blocks of a grid, one after another.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
    run_blocks(grid, block, shared_bytes, body, 0, uint64_t(grid.x) * grid.y * grid.z);
}

// What the lane `from` hands in; a lane beyond the warp hands in the caller's own.
template <typename T>
T exchange(T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "a lane hands over 8 bytes at most");
    Warp& w = warp();
    uint64_t* slots = w.slots[w.barrier.generation % 2];
    std::memcpy(&slots[lane()], &value, sizeof(T));
    wait(w.barrier);
    if (from < WARP_SIZE) std::memcpy(&value, &slots[from], sizeof(T));
    return value;
}

}  // namespace emulate

#define threadIdx (emulate::machine().current->thread_idx)
#define blockIdx (emulate::machine().block_idx)
#define blockDim (emulate::machine().block_dim)
#define gridDim (emulate::machine().grid_dim)

inline void __syncthreads() { emulate::wait(emulate::machine().block); }
inline void __syncwarp(unsigned = ~0u) { emulate::wait(emulate::warp().barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned lanes) {
    return emulate::exchange(value, emulate::lane() ^ lanes);
}

inline unsigned atomicMax(unsigned* address, unsigned value) {
    unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

// ---- 2-byte types --------------------------------------------------------------------------------------------------

struct __half {
    uint16_t bits;
};

struct __nv_bfloat16 {
    uint16_t bits;
};

namespace emulate {

inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

}  // namespace emulate

inline float __half2float(__half h) {
    const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(float(fraction), -24), emulate::of_bits(sign | 0x3f800000));
    if (exponent == 31) return emulate::of_bits(sign | 0x7f800000 | fraction << 13);
    return emulate::of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
    uint32_t bits = emulate::to_bits(x);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {0x7fff};                              // NaN, as the device writes it
    if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};            // from 65520 on: infinity
    if (bits < 0x38800000) {                                             // below 2^-14: steps of 2^-24
        return {uint16_t(sign | unsigned(std::nearbyint(std::ldexp(double(std::fabs(x)), 24))))};
    }
    bits -= 112u << 23;
    bits += 0xfff + (bits >> 13 & 1);
    return {uint16_t(sign | bits >> 13)};
}

inline float __bfloat162float(__nv_bfloat16 b) { return emulate::of_bits(uint32_t(b.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = emulate::to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- tensor cores: the plain forms of kernels/tensor_cores.cuh -------------------------------------------------------

namespace emulate {

template <typename T>
float half_of(uint32_t bits, unsigned which) {
    T value;
    value.bits = uint16_t(bits >> 16 * which);
    return to_float(value);
}

}  // namespace emulate

// Fragments as PTX lays them out for m16n8k16.
template <typename T>
void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulate::Warp& w = emulate::warp();
    const unsigned lane = emulate::lane();
    // Each value is turned into a float once, by who hands it in.
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    for (unsigned i = 0; i < 12; i++) w.fragments[lane][i] = emulate::half_of<T>(mine[i / 2], i % 2);
    emulate::wait(w.barrier);
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = c[i];
        for (unsigned k = 0; k < 16; k++) {
            const float a_value = w.fragments[row % 8 * 4 + k % 8 / 2][2 * (row / 8 + k / 8 * 2) + k % 2];
            const float b_value = w.fragments[column * 4 + k % 8 / 2][2 * (4 + k / 8) + k % 2];
            sum += a_value * b_value;
        }
        c[i] = sum;
    }
    emulate::wait(w.barrier);  // everybody has read
}

inline void load_matrices(unsigned (&to)[4], const void* row) {
    const unsigned lane = emulate::lane();
    for (unsigned m = 0; m < 4; m++) {
        const char* from = emulate::exchange(static_cast<const char*>(row), m * 8 + lane / 4);
        std::memcpy(&to[m], from + lane % 4 * 4, 4);
    }
}

inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
    const unsigned lane = emulate::lane();
    for (unsigned m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (unsigned i = 0; i < 2; i++) {
            const char* from = emulate::exchange(static_cast<const char*>(row), m * 8 + lane % 4 * 2 + i);
            std::memcpy(&pair[i], from + lane / 4 * 2, 2);
        }
        std::memcpy(&to[m], pair, 4);
    }
}

// Happens as late as the rules allow: who reads without waiting reads what was there before.
inline void copy_async_16(void* to, const void* from, bool is_there) {
    emulate::machine().current->copies.back().push_back({to, from, is_there});
}

inline void commit_copies() { emulate::machine().current->copies.emplace_back(); }

template <int PENDING>
void wait_copies() {
    auto& groups = emulate::machine().current->copies;
    while (groups.size() > static_cast<size_t>(PENDING) + 1) {
        for (const emulate::Copy& copy : groups.front()) {
            if (copy.is_there) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        }
        groups.erase(groups.begin());
    }
}
