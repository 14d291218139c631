// Whether the emulator sees what it is there to see: one case a run, by name. Ends with 0 where a case that needs no fault
// goes well; the others end by the fault.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

extern "C" {
int cuInit(unsigned);
int cuDevicePrimaryCtxRetain(void**, int);
int cuCtxSetCurrent(void*);
int cuMemAllocAsync(uint64_t*, size_t, void*);
int cuMemFreeAsync(uint64_t, void*);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemsetD8Async(uint64_t, unsigned char, size_t, void*);
int cuMemcpyHtoDAsync_v2(uint64_t, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, uint64_t, size_t, void*);
int cuStreamCreate(void**, unsigned);
int cuStreamDestroy_v2(void*);
int cuStreamSynchronize(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuStreamBeginCapture_v2(void*, int);
int cuStreamEndCapture(void*, void**);
int cuEventCreate(void**, unsigned);
int cuEventRecord(void*, void*);
int cuMemAdvise_v2();
}

namespace {

constexpr size_t LEN = 1000;
constexpr int NUM_ROUNDS = 200;

void* new_stream() {
    void* stream = nullptr;
    cuStreamCreate(&stream, 1);
    return stream;
}

// One stream fills, another one copies out, `is_ordered` after an event. The rounds whose copy came too early.
int copies_too_early(uint64_t memory, void* host, bool is_ordered) {
    void *fills = new_stream(), *copies = new_stream(), *filled = nullptr;
    cuEventCreate(&filled, 0);
    int num_early = 0;
    for (int round = 0; round < NUM_ROUNDS; round++) {
        const unsigned char byte = static_cast<unsigned char>(round);
        cuMemsetD8Async(memory, byte, LEN, fills);
        cuEventRecord(filled, fills);
        if (is_ordered) cuStreamWaitEvent(copies, filled, 0);
        cuMemcpyDtoHAsync_v2(host, memory, LEN, copies);
        cuStreamSynchronize(copies);
        num_early += static_cast<unsigned char*>(host)[LEN - 1] != byte;
        cuStreamSynchronize(fills);
    }
    return num_early;
}

int check(const char* what, bool is_so) {
    if (!is_so) std::fprintf(stderr, "%s\n", what);
    return is_so ? 0 : 1;
}

}  // namespace

int main(int, char** arguments) {
    const std::string name = arguments[1];
    void *context = nullptr, *host = nullptr, *graph = nullptr;
    uint64_t memory = 0;
    cuInit(0);
    cuDevicePrimaryCtxRetain(&context, 0);
    cuCtxSetCurrent(context);
    void* stream = new_stream();
    cuMemAllocAsync(&memory, LEN, stream);
    cuMemHostAlloc(&host, LEN, 0);
    unsigned char* bytes = static_cast<unsigned char*>(host);
    cuMemcpyDtoHAsync_v2(host, memory, LEN, stream);
    cuStreamSynchronize(stream);
    if (check("new memory is not poisoned", bytes[0] == 0xff && bytes[LEN - 1] == 0xff)) return 1;

    if (name == "a fill beyond an allocation") cuMemsetD8Async(memory, 0, LEN + 1, stream);
    if (name == "a write beside an allocation") {
        reinterpret_cast<unsigned char*>(memory)[LEN] = 0;
        cuMemFreeAsync(memory, stream);
    }
    if (name == "a read far beyond an allocation") return reinterpret_cast<volatile unsigned char*>(memory)[LEN + 4096];
    if (name == "a use after a free") {
        cuMemFreeAsync(memory, stream);
        cuMemsetD8Async(memory, 0, LEN, stream);
    }
    if (name == "a second free") {
        cuMemFreeAsync(memory, stream);
        cuMemFreeAsync(memory, stream);
    }
    if (name == "a stream that is destroyed") {
        cuStreamDestroy_v2(stream);
        cuStreamSynchronize(stream);
    }
    if (name == "a function that is not emulated") cuMemAdvise_v2();
    cuStreamSynchronize(stream);

    if (name == "a wait that is there") {
        return check("a copy came before its event", copies_too_early(memory, host, true) == 0);
    }
    if (name == "a wait that is missing") {
        return check("no copy came too early", copies_too_early(memory, host, false) > 0);
    }
    if (name == "a limit of memory") {
        uint64_t more = 0;
        return check("more memory than there is", cuMemAllocAsync(&more, 1 << 20, stream) == 2) ||
               check("less memory than there is", cuMemAllocAsync(&more, 1 << 19, stream) == 0);
    }
    if (name == "a limit of an allocation") {
        uint64_t more = 0;
        return check("a larger one", cuMemAllocAsync(&more, 4097, stream) == 2) ||
               check("one as large", cuMemAllocAsync(&more, 4096, stream) == 0);
    }
    if (name == "a wait in a capture") {
        cuStreamBeginCapture_v2(stream, 1);
        return check("the wait is allowed", cuStreamSynchronize(stream) == 900) ||
               check("the capture is sound", cuStreamEndCapture(stream, &graph) == 901);
    }
    return 0;
}
