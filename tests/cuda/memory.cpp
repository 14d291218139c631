// Device and pinned memory: host memory between guard pages, counted, poisoned, and never given out twice.
#include "emulator.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>

namespace emulator {
namespace {

constexpr size_t PAGE = 4096;
// What cudaMalloc aligns to, at least.
constexpr size_t ALIGNMENT = 256;
// Not 0xff, which is what a block is filled with, nor 0.
constexpr unsigned char MARK = 0xa5;
// Blocks of a process's life: the handler of a fault walks over them without a lock.
constexpr size_t MAX_BLOCKS = 1 << 16;

std::atomic<Block*> blocks[MAX_BLOCKS];
std::atomic<size_t> num_blocks{0};

struct Table {
    std::mutex mutex;
    std::map<uintptr_t, Block*> by_map;
    std::unordered_map<int, size_t> used;
};

Table& table() {
    static Table* table = new Table;
    return *table;
}

const char* state_of(const Block& block) {
    switch (block.state) {
        case Block::OPEN: return block.device == HOST ? "pinned" : "a device's";
        case Block::CLOSED: return "freed";
        default: return "not there yet in its stream's order";
    }
}

void describe(uintptr_t address, char* text, size_t len) {
    const size_t n = num_blocks.load();
    for (size_t i = 0; i < n; i++) {
        const Block* block = blocks[i].load();
        if (block == nullptr || address < block->map || address >= block->map + block->map_bytes) continue;
        std::snprintf(text, len, "cuda emulator: access at byte %lld of allocation %llu of %zu bytes, which is %s\n",
                      static_cast<long long>(address) - static_cast<long long>(block->begin),
                      static_cast<unsigned long long>(block->number), block->num_bytes, state_of(*block));
        return;
    }
    std::snprintf(text, len, "cuda emulator: access to %#zx, no device's memory\n", static_cast<size_t>(address));
}

struct sigaction previous;

void on_fault(int signal, siginfo_t* info, void* context) {
    char text[256];
    describe(reinterpret_cast<uintptr_t>(info->si_addr), text, sizeof text);
    if (write(2, text, std::strlen(text)) < 0) _exit(1);
    // Whoever was there before says the rest; the instruction is tried again on return.
    sigaction(signal, &previous, nullptr);
    (void)context;
}

void watch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &previous);
    });
}

const char* kind_of(int device) { return device == HOST ? "pinned" : "device"; }

}  // namespace

size_t total_bytes() { return setting("memory", uint64_t(8) << 30); }

size_t free_bytes(int device) {
    const size_t total = total_bytes();
    const std::lock_guard<std::mutex> lock(table().mutex);
    const size_t used = table().used[device];
    return used < total ? total - used : 0;
}

Block* reserve(int device, size_t num_bytes) {
    watch_faults();
    const size_t total = total_bytes();
    const size_t padded = (num_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const std::lock_guard<std::mutex> lock(table().mutex);
    size_t& used = table().used[device];
    if (device != HOST && (used + padded > total || padded > setting("refuse_above", ~uint64_t(0)))) {
        count("allocations refused");
        return nullptr;
    }
    const size_t inner = (padded + PAGE - 1) / PAGE * PAGE;
    void* map = mmap(nullptr, inner + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) fault("the host has no %zu bytes", inner);
    Block* block = new Block;
    block->map = reinterpret_cast<uintptr_t>(map);
    block->map_bytes = inner + 2 * PAGE;
    block->begin = block->map + PAGE + inner - padded;
    block->num_bytes = num_bytes;
    block->device = device;
    block->number = num_blocks.load();
    if (block->number >= MAX_BLOCKS) fault("more than %zu allocations", MAX_BLOCKS);
    blocks[block->number] = block;
    num_blocks++;
    table().by_map[block->map] = block;
    used += padded;
    const std::string kind = kind_of(device);
    count(kind + " allocations");
    count("live " + kind + " allocations");
    count("live " + kind + " bytes", static_cast<int64_t>(padded));
    return block;
}

void open_block(Block* block) {
    const uintptr_t inner = block->map + PAGE;
    if (mprotect(reinterpret_cast<void*>(inner), block->map_bytes - 2 * PAGE, PROT_READ | PROT_WRITE) != 0) {
        fault("the host has no %zu bytes", block->num_bytes);
    }
    std::memset(reinterpret_cast<void*>(inner), MARK, block->map_bytes - 2 * PAGE);
    std::memset(reinterpret_cast<void*>(block->begin), 0xff, block->num_bytes);
    block->state = Block::OPEN;
}

void close_block(Block* block) {
    const auto check = [&](uintptr_t from, uintptr_t to) {
        for (uintptr_t at = from; at < to; at++) {
            if (*reinterpret_cast<unsigned char*>(at) == MARK) continue;
            fault("a byte %lld from the begin of allocation %llu of %zu bytes was written",
                  static_cast<long long>(at - block->begin), static_cast<unsigned long long>(block->number),
                  block->num_bytes);
        }
    };
    check(block->map + PAGE, block->begin);
    check(block->begin + block->num_bytes, block->map + block->map_bytes - PAGE);
    block->state = Block::CLOSED;
    void* inner = reinterpret_cast<void*>(block->map + PAGE);
    madvise(inner, block->map_bytes - 2 * PAGE, MADV_DONTNEED);
    mprotect(inner, block->map_bytes - 2 * PAGE, PROT_NONE);
}

void forget(Block* block) {
    const size_t padded = (block->num_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const std::lock_guard<std::mutex> lock(table().mutex);
    table().used[block->device] -= padded;
    const std::string kind = kind_of(block->device);
    count("live " + kind + " allocations", -1);
    count("live " + kind + " bytes", -static_cast<int64_t>(padded));
}

Block* block_at(uintptr_t address) {
    const std::lock_guard<std::mutex> lock(table().mutex);
    auto next = table().by_map.upper_bound(address);
    if (next == table().by_map.begin()) return nullptr;
    Block* block = std::prev(next)->second;
    return address < block->map + block->map_bytes ? block : nullptr;
}

void check_range(const char* call, const char* operand, int device, const void* from, size_t num_bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(from);
    const Block* block = block_at(address);
    if (block == nullptr || block->device != device) {
        fault("%s: %s is at %p, which is no memory of %s %d", call, operand, from, kind_of(device), device);
    }
    if (block->state != Block::OPEN) {
        fault("%s: %s lies in allocation %llu, which is %s", call, operand,
              static_cast<unsigned long long>(block->number), state_of(*block));
    }
    if (address < block->begin || address + num_bytes > block->begin + block->num_bytes) {
        fault("%s: %s is %zu bytes from byte %lld of allocation %llu, which has %zu", call, operand, num_bytes,
              static_cast<long long>(address) - static_cast<long long>(block->begin),
              static_cast<unsigned long long>(block->number), block->num_bytes);
    }
}

}  // namespace emulator
