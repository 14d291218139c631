// The calls that allocate, free, copy and fill.
#include "emulator.h"

#include <cstring>

namespace emulator {
namespace {

// The open pinned block that holds all of a host range, or null: then it is pageable.
Block* pinned(const void* host, size_t num_bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(host);
    Block* block = block_at(address);
    if (block == nullptr) return nullptr;
    if (block->device != HOST) fault("a host's operand of a copy is memory of device %d", block->device);
    if (block->state != Block::OPEN) fault("a host's operand of a copy is pinned memory that is freed");
    check_range("a copy", "the host's operand", HOST, host, num_bytes);
    return block;
}

Block* device_block(uint64_t pointer, const char* call) {
    Block* block = block_at(pointer);
    if (block == nullptr || block->device == HOST || block->begin != pointer) {
        fault("%s: %#llx is no allocation of a device", call, static_cast<unsigned long long>(pointer));
    }
    return block;
}

void refuse_capture(const Stream& stream, const char* call) {
    if (stream.capture != nullptr) fault("%s: in a capture it is not emulated", call);
}

// Freed twice, or freed while the first free is still in its stream's queue.
void forget_once(Block* block, const char* call) {
    static std::mutex mutex;
    static std::vector<bool> forgotten;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (forgotten.size() <= block->number) forgotten.resize(block->number + 1);
        if (forgotten[block->number]) fault("%s: allocation %s is freed twice", call, std::to_string(block->number).c_str());
        forgotten[block->number] = true;
    }
    forget(block);
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    if (const Status status = enter()) return status;
    *free = free_bytes(current_context()->device);
    *total = total_bytes();
    return SUCCESS;
}

// The memory is there once the stream has come to it, and not before.
int cuMemAllocAsync(uint64_t* pointer, size_t num_bytes, void* handle) {
    if (const Status status = enter()) return status;
    const auto stream = stream_of(handle, "cuMemAllocAsync");
    refuse_capture(*stream, "cuMemAllocAsync");
    if (num_bytes == 0) return INVALID_VALUE;
    Block* block = reserve(stream->context->device, num_bytes);
    if (block == nullptr) return OUT_OF_MEMORY;
    *pointer = block->begin;
    enqueue(*stream, {"alloc", [block] { open_block(block); }, false, false});
    return SUCCESS;
}

int cuMemFreeAsync(uint64_t pointer, void* handle) {
    const auto stream = stream_of(handle, "cuMemFreeAsync");
    refuse_capture(*stream, "cuMemFreeAsync");
    Block* block = device_block(pointer, "cuMemFreeAsync");
    if (const int error = stream->context->error) return error;
    forget_once(block, "cuMemFreeAsync");
    enqueue(*stream, {"free", [block] { close_block(block); }, false, false});
    return SUCCESS;
}

int cuMemHostAlloc(void** pointer, size_t num_bytes, unsigned flags) {
    if (const Status status = enter()) return status;
    if (spoils_capture()) return CAPTURE_UNSUPPORTED;
    if (num_bytes == 0 || flags > 7) return INVALID_VALUE;
    Block* block = reserve(HOST, num_bytes);
    open_block(block);
    *pointer = reinterpret_cast<void*>(block->begin);
    return SUCCESS;
}

int cuMemFreeHost(void* pointer) {
    Block* block = block_at(reinterpret_cast<uintptr_t>(pointer));
    if (block == nullptr || block->device != HOST || block->begin != reinterpret_cast<uintptr_t>(pointer)) {
        fault("cuMemFreeHost: %p is no pinned allocation", pointer);
    }
    if (spoils_capture()) return CAPTURE_UNSUPPORTED;
    forget_once(block, "cuMemFreeHost");
    close_block(block);
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t num_bytes, void* handle) {
    if (const Status status = enter()) return status;
    const auto stream = stream_of(handle, "cuMemcpyHtoDAsync");
    refuse_capture(*stream, "cuMemcpyHtoDAsync");
    const int device = stream->context->device;
    void* target = reinterpret_cast<void*>(to);
    if (pinned(from, num_bytes) != nullptr) {
        // Read when the stream comes to it: what the host writes until then is what arrives.
        {
            const std::lock_guard<std::mutex> lock(stream->mutex);
            if (!stream->queue.empty()) count("uploads behind other work");
        }
        const auto run = [=] {
            check_range("cuMemcpyHtoDAsync", "the device's operand", device, target, num_bytes);
            check_range("cuMemcpyHtoDAsync", "the host's operand", HOST, from, num_bytes);
            std::memcpy(target, from, num_bytes);
        };
        enqueue(*stream, {"upload", run, false, false});
        count("pinned uploads");
        return SUCCESS;
    }
    // The driver takes what is pageable before it returns.
    const auto* bytes = static_cast<const unsigned char*>(from);
    auto staged = std::make_shared<std::vector<unsigned char>>(bytes, bytes + num_bytes);
    const auto run = [=] {
        check_range("cuMemcpyHtoDAsync", "the device's operand", device, target, num_bytes);
        std::memcpy(target, staged->data(), num_bytes);
    };
    enqueue(*stream, {"pageable upload", run, false, false});
    count("pageable uploads");
    return SUCCESS;
}

int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t num_bytes, void* handle) {
    if (const Status status = enter()) return status;
    const auto stream = stream_of(handle, "cuMemcpyDtoHAsync");
    refuse_capture(*stream, "cuMemcpyDtoHAsync");
    const int device = stream->context->device;
    const void* source = reinterpret_cast<const void*>(from);
    const bool is_pinned = pinned(to, num_bytes) != nullptr;
    const auto run = [=] {
        check_range("cuMemcpyDtoHAsync", "the device's operand", device, source, num_bytes);
        if (is_pinned) check_range("cuMemcpyDtoHAsync", "the host's operand", HOST, to, num_bytes);
        std::memcpy(to, source, num_bytes);
    };
    enqueue(*stream, {"download", run, false, false});
    count(is_pinned ? "pinned downloads" : "pageable downloads");
    // Into pageable memory the driver copies before it returns.
    return is_pinned ? SUCCESS : synchronize(*stream);
}

int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t num_bytes, void* handle) {
    if (const Status status = enter()) return status;
    const auto stream = stream_of(handle, "cuMemsetD8Async");
    refuse_capture(*stream, "cuMemsetD8Async");
    const int device = stream->context->device;
    void* target = reinterpret_cast<void*>(to);
    const auto run = [=] {
        check_range("cuMemsetD8Async", "the operand", device, target, num_bytes);
        std::memset(target, byte, num_bytes);
    };
    enqueue(*stream, {"fill", run, false, false});
    return SUCCESS;
}

}  // extern "C"
