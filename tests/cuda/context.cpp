// Devices, their primary contexts, and the words for errors.
#include "emulator.h"

#include <cstdio>
#include <cstring>

namespace emulator {
namespace {

constexpr int DRIVER_VERSION = 13000;
constexpr const char* NAME = "Emulated GPU";
constexpr size_t MAX_DEVICES = 8;

std::atomic<bool> is_initialised{false};
std::mutex retaining;
thread_local Context* current = nullptr;

struct Word {
    int status;
    const char* name;
    const char* text;
};

constexpr Word WORDS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
};

const Word& word_of(int status) {
    for (const Word& word : WORDS) {
        if (word.status == status) return word;
    }
    fault("the status %d is none that is returned here", status);
}

bool is_device(int device) { return device >= 0 && static_cast<uint64_t>(device) < num_devices(); }

}  // namespace

uint64_t num_devices() {
    static const uint64_t num_devices = setting("devices", 1);
    if (num_devices > MAX_DEVICES) fault("more than %zu devices are not emulated", MAX_DEVICES);
    return num_devices;
}

Context* context_of(int device) {
    static Context contexts[MAX_DEVICES];
    contexts[device].device = device;
    return &contexts[device];
}

Context* current_context() { return current; }

Status enter() {
    if (!is_initialised) return NOT_INITIALIZED;
    // A context that nobody retains has ended, and its address is nobody's.
    if (current == nullptr || current->num_retained == 0) return INVALID_CONTEXT;
    return static_cast<Status>(current->error.load());
}

}  // namespace emulator

using namespace emulator;

extern "C" {

int cuInit(unsigned flags) {
    if (flags != 0) return INVALID_VALUE;
    if (num_devices() == 0) return NO_DEVICE;
    is_initialised = true;
    return SUCCESS;
}

int cuDriverGetVersion(int* version) {
    *version = DRIVER_VERSION;
    return SUCCESS;
}

int cuGetErrorName(int status, const char** name) {
    *name = word_of(status).name;
    return SUCCESS;
}

int cuGetErrorString(int status, const char** text) {
    *text = word_of(status).text;
    return SUCCESS;
}

int cuDeviceGetCount(int* num) {
    if (!is_initialised) return NOT_INITIALIZED;
    *num = static_cast<int>(num_devices());
    return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
    if (!is_initialised) return NOT_INITIALIZED;
    if (!is_device(ordinal)) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

int cuDeviceGetName(char* name, int len, int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    std::snprintf(name, static_cast<size_t>(len), "%s", NAME);
    return SUCCESS;
}

int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    std::memset(uuid, 0, 16);
    uuid[15] = static_cast<unsigned char>(device);
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t* num_bytes, int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    *num_bytes = total_bytes();
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    switch (attribute) {
        case 75: *value = 9; return SUCCESS;   // COMPUTE_CAPABILITY_MAJOR
        case 76: *value = 0; return SUCCESS;   // COMPUTE_CAPABILITY_MINOR
        case 115: *value = 1; return SUCCESS;  // MEMORY_POOLS_SUPPORTED
        default: fault("cuDeviceGetAttribute: the attribute %d is not emulated", attribute);
    }
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    if (!is_initialised) return NOT_INITIALIZED;
    if (!is_device(device)) return INVALID_DEVICE;
    const std::lock_guard<std::mutex> lock(retaining);
    Context* retained = context_of(device);
    if (retained->num_retained++ == 0) {
        retained->error = SUCCESS;
        count("live contexts");
    }
    *context = retained;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    const std::lock_guard<std::mutex> lock(retaining);
    Context* released = context_of(device);
    if (released->num_retained == 0) return INVALID_CONTEXT;
    if (--released->num_retained == 0) count("live contexts", -1);
    return SUCCESS;
}

int cuCtxSetCurrent(void* context) {
    current = static_cast<Context*>(context);
    return SUCCESS;
}

int cuCtxGetCurrent(void** context) {
    *context = current;
    return SUCCESS;
}

int cuCtxSynchronize() {
    if (const Status status = enter()) return status;
    if (spoils_capture()) return CAPTURE_UNSUPPORTED;
    for (const auto& stream : streams().all()) {
        if (stream->context != current) continue;
        if (const Status status = synchronize(*stream)) return status;
    }
    return SUCCESS;
}

}  // extern "C"
