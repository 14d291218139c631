// Modules and launches: the kernels of kernels/*.cu as the host's compiler has them, found by name.
//
// A module is what nvcc made of an op, and must be: its image is looked at for the names of the kernels. What runs is the
// host's build, block by block on ../kernels/emulate.h.
#include "emulate.h"
#include "emulator.h"

#include <thread>
#include <tuple>

#include "../../kernels/activation.cu"
#include "../../kernels/attention.cu"
#include "../../kernels/embedding.cu"
#include "../../kernels/norm.cu"
#include "../../kernels/pool.cu"

namespace emulator {
namespace {

constexpr uint32_t FATBIN = 0xba55ed50;
constexpr unsigned MAX_THREADS = 1024, MAX_GRID_YZ = 65535;
// Without asking for more by an attribute of the function.
constexpr unsigned MAX_SHARED_BYTES = 48 << 10;

// The head of a fatbin.
struct ImageHead {
    uint32_t magic;
    uint16_t version, head_bytes;
    uint64_t num_bytes;
};

struct Pointer {
    const void* address;
    size_t operand;
};

// A launch's call with its arguments, which are copied: the caller's may be gone when it runs.
struct Call {
    std::function<void()> body;
    std::vector<Pointer> pointers;
};

template <typename T>
void note_pointer(std::vector<Pointer>& pointers, size_t operand, T* pointer) {
    if (pointer != nullptr) pointers.push_back({pointer, operand});
}
template <typename T>
void note_pointer(std::vector<Pointer>&, size_t, T) {}

template <typename... Args, size_t... I>
Call call_of(void (*kernel)(Args...), void** arguments, std::index_sequence<I...>) {
    const auto values = std::make_tuple(*static_cast<Args*>(arguments[I])...);
    Call call;
    (note_pointer(call.pointers, I, std::get<I>(values)), ...);
    call.body = [kernel, values] { std::apply(kernel, values); };
    return call;
}

struct Kernel {
    std::string name;
    std::function<Call(void** arguments)> bind;
};

template <typename... Args>
Kernel kernel(const char* name, void (*function)(Args...)) {
    return {name, [function](void** arguments) { return call_of(function, arguments, std::index_sequence_for<Args...>()); }};
}

#define KERNEL(NAME) kernel(#NAME, NAME)

const std::vector<Kernel>& kernels() {
    static const std::vector<Kernel>* kernels = new std::vector<Kernel>{
        KERNEL(embedding_f16),      KERNEL(embedding_bf16),      KERNEL(add_layer_norm_f16),  KERNEL(add_layer_norm_bf16),
        KERNEL(add_rms_norm_f16),   KERNEL(add_rms_norm_bf16),   KERNEL(bias_activation_f16), KERNEL(bias_activation_bf16),
        KERNEL(swiglu_f16),         KERNEL(swiglu_bf16),         KERNEL(pool_f16_to_f16),     KERNEL(pool_bf16_to_bf16),
        KERNEL(pool_f16_to_f32),    KERNEL(pool_bf16_to_f32),    KERNEL(attention_f16_32),    KERNEL(attention_f16_64),
        KERNEL(attention_f16_96),   KERNEL(attention_f16_128),   KERNEL(attention_bf16_32),   KERNEL(attention_bf16_64),
        KERNEL(attention_bf16_96),  KERNEL(attention_bf16_128),
    };
    return *kernels;
}

struct Module {
    Context* context;
    std::string image;
    // By kernel; their addresses are what the caller holds.
    std::unordered_map<std::string, std::unique_ptr<struct Function>> functions;
};

struct Function {
    Module* module;
    const Kernel* kernel;
};

Handles<Module>& modules() {
    static Handles<Module>* modules = new Handles<Module>("modules");
    return *modules;
}

// Threads that take parts of a grid. One grid has them at a time; another one meanwhile does all of its parts itself.
class Helpers {
public:
    Helpers() {
        const unsigned num_cores = std::thread::hardware_concurrency();
        num_helpers = num_cores < 2 ? 0 : num_cores > 8 ? 7 : num_cores - 1;
        for (unsigned i = 0; i < num_helpers; i++) std::thread([this] { work(); }).detach();
    }

    void run(uint64_t n, const std::function<void(uint64_t, uint64_t)>& part) {
        const std::unique_lock<std::mutex> mine(owner, std::try_to_lock);
        if (!mine.owns_lock() || num_helpers == 0 || n < 2) return part(0, n);
        {
            const std::lock_guard<std::mutex> lock(mutex);
            job = &part;
            num_parts = n < 4 * (num_helpers + 1) ? n : 4 * (num_helpers + 1);
            next_part = 0;
            len = n;
            num_left = num_parts;
        }
        wake.notify_all();
        std::unique_lock<std::mutex> lock(mutex);
        while (take(lock)) {
        }
        finished.wait(lock, [&] { return num_left == 0; });
        job = nullptr;
    }

private:
    // Does one part without the lock; false if none is left.
    bool take(std::unique_lock<std::mutex>& lock) {
        if (job == nullptr || next_part == num_parts) return false;
        const uint64_t i = next_part++, first = len * i / num_parts, last = len * (i + 1) / num_parts;
        const auto* part = job;
        lock.unlock();
        (*part)(first, last);
        lock.lock();
        if (--num_left == 0) finished.notify_all();
        return true;
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            while (take(lock)) {
            }
            wake.wait(lock);
        }
    }

    std::mutex owner, mutex;
    std::condition_variable wake, finished;
    unsigned num_helpers = 0;
    const std::function<void(uint64_t, uint64_t)>* job = nullptr;
    uint64_t num_parts = 0, next_part = 0, num_left = 0, len = 0;
};

}  // namespace

void in_parts(uint64_t n, const std::function<void(uint64_t first, uint64_t last)>& run) {
    static Helpers* helpers = new Helpers;
    helpers->run(n, run);
}

}  // namespace emulator

using namespace emulator;

extern "C" {

int cuModuleLoadData(void** handle, const void* image) {
    if (const Status status = enter()) return status;
    if (spoils_capture()) return CAPTURE_UNSUPPORTED;
    ImageHead head;
    std::memcpy(&head, image, sizeof head);
    // Text would be PTX, as candle's own kernels are, for which there is no host's build.
    if (head.magic != FATBIN) fault("cuModuleLoadData: an image that is no fatbin is not emulated");
    auto module = std::make_shared<Module>();
    module->context = current_context();
    module->image.assign(static_cast<const char*>(image), head.head_bytes + head.num_bytes);
    *handle = modules().add(module);
    return SUCCESS;
}

int cuModuleUnload(void* handle) { return modules().remove(handle, "cuModuleUnload")->context->error; }

int cuModuleGetFunction(void** handle, void* module_handle, const char* name) {
    const auto module = modules().get(module_handle, "cuModuleGetFunction");
    if (const int error = module->context->error) return error;
    for (const Kernel& kernel : kernels()) {
        if (kernel.name != name) continue;
        // As a whole word among the names of the image.
        if (module->image.find('\0' + kernel.name + '\0') == std::string::npos) return NOT_FOUND;
        auto& function = module->functions[kernel.name];
        if (function == nullptr) function.reset(new Function{module.get(), &kernel});
        *handle = function.get();
        return SUCCESS;
    }
    fault("cuModuleGetFunction: the kernel %s has no host's build in tests/cuda/kernels.cpp", name);
}

int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void* stream_handle, void** arguments, void** extra) {
    if (const Status status = enter()) return status;
    const auto stream = stream_of(stream_handle, "cuLaunchKernel");
    const Function* function = static_cast<Function*>(handle);
    if (function->module->context != stream->context) return INVALID_HANDLE;
    if (arguments == nullptr || extra != nullptr) fault("cuLaunchKernel: arguments in `extra` are not emulated");
    const uint64_t num_threads = uint64_t(block_x) * block_y * block_z;
    const bool is_block = num_threads >= 1 && num_threads <= MAX_THREADS && block_z <= 64 && shared_bytes <= MAX_SHARED_BYTES;
    const auto is_size = [](unsigned size, unsigned most) { return size >= 1 && size <= most; };
    const bool is_grid = is_size(grid_x, ~0u >> 1) && is_size(grid_y, MAX_GRID_YZ) && is_size(grid_z, MAX_GRID_YZ);
    if (!is_block || !is_grid) return INVALID_VALUE;
    const Kernel* kernel = function->kernel;
    const int device = stream->context->device;
    const dim3 grid(grid_x, grid_y, grid_z), block(block_x, block_y, block_z);
    const auto call = std::make_shared<const Call>(kernel->bind(arguments));
    const auto run = [=] {
        for (const Pointer& pointer : call->pointers) {
            const std::string operand = "operand " + std::to_string(pointer.operand);
            check_range(kernel->name.c_str(), operand.c_str(), device, pointer.address, 1);
        }
        in_parts(uint64_t(grid.x) * grid.y * grid.z, [&](uint64_t first, uint64_t last) {
            emulate::run_blocks(grid, block, shared_bytes, call->body, first, last);
        });
    };
    enqueue(*stream, {"kernel " + kernel->name, run, true, false});
    return SUCCESS;
}

}  // extern "C"
