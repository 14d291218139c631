// A CUDA driver that computes on the host: what the parts of this folder share. README.md says what it is for.
//
// Device memory is host memory between pages that nobody may touch; a stream is a thread that works off a queue; a kernel
// is the host's build of kernels/*.cu. A call that does what the driver documents as an error returns the driver's
// status; what would be undefined, and what is not emulated, ends the process with a line that says what it was.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

// CUresult, as far as it is returned here.
enum Status : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

// Writes a line and ends the process: the caller did what no status stands for.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- settings.cpp: what a test asks for, and what it is told ------------------------------------------------------

// A number by its name, from the control file, else EREMOIS_TEST_CUDA_<NAME>, else `otherwise`.
uint64_t setting(const char* name, uint64_t otherwise);

// Adds to what the report will say under a name.
void count(const std::string& name, int64_t by = 1);
int64_t counted(const std::string& name);

// ---- context.cpp ---------------------------------------------------------------------------------------------------

// The primary context of a device.
struct Context {
    int device = 0;
    int num_retained = 0;
    // The sticky error: every later call that belongs to the context returns it, and nothing runs any more.
    std::atomic<int> error{SUCCESS};
    std::atomic<uint64_t> num_launched{0};
};

uint64_t num_devices();
Context* context_of(int device);
// That of the calling thread, or null.
Context* current_context();

// What most calls begin with: the driver must be initialised, a context current and not lost.
Status enter();

// ---- memory.cpp ----------------------------------------------------------------------------------------------------

constexpr int HOST = -1;

// One allocation. Its end lies at a page that nobody may touch, so that a byte beyond it ends the process; between the
// first page and its begin are marks, which are looked at when it is freed.
struct Block {
    enum State { RESERVED, OPEN, CLOSED };
    uintptr_t map = 0, begin = 0;
    size_t map_bytes = 0, num_bytes = 0;
    int device = HOST;
    uint64_t number = 0;
    std::atomic<int> state{RESERVED};
};

// An address range for which there is no memory yet. Null where the device's memory would be exceeded.
Block* reserve(int device, size_t num_bytes);
// Gives it memory, every byte 0xff: NaN in every float type.
void open_block(Block* block);
// Looks at the marks around it and takes the memory away. The addresses are never given out again.
void close_block(Block* block);
// Counts it as free. Apart from `close_block`, which happens in a stream's order.
void forget(Block* block);

// The block that an address lies in or before whose guard page it lies; null for any other memory.
Block* block_at(uintptr_t address);
// Ends the process unless the range lies in open memory of the device.
void check_range(const char* call, const char* operand, int device, const void* from, size_t num_bytes);
size_t free_bytes(int device);
size_t total_bytes();

// ---- stream.cpp ----------------------------------------------------------------------------------------------------

struct Op {
    std::string name;
    std::function<void()> run;
    // Counts for the faults that begin after so many launches.
    bool is_launch = false;
    // Runs on a lost context too: what others wait for must come.
    bool is_always = false;
};

struct Capture {
    std::vector<Op> ops;
    bool is_invalid = false;
    // Only what this thread does can spoil it.
    const void* thread = nullptr;
};

struct Stream {
    Context* context = nullptr;
    uint64_t number = 0;
    std::mutex mutex;
    std::condition_variable wake;
    std::deque<Op> queue;
    uint64_t num_enqueued = 0;
    bool is_closing = false;
    std::unique_ptr<Capture> capture;
    // Guarded by the progress lock, as whatever is waited for.
    uint64_t num_done = 0;
};

// One cuEventRecord.
struct Record {
    bool is_done = false;
    double seconds = 0;
};

struct Event {
    Context* context = nullptr;
    bool is_timed = true;
    std::shared_ptr<Record> last;
};

struct Graph {
    std::vector<Op> ops;
};

// The live objects of a kind, by the address that the caller holds. A handle that is not among them was destroyed or
// never made: the driver would follow it, here it is a fault.
template <typename T>
class Handles {
public:
    explicit Handles(const char* kind) : kind(kind) {}

    void* add(std::shared_ptr<T> object) {
        const std::lock_guard<std::mutex> lock(mutex);
        void* handle = object.get();
        live[handle] = std::move(object);
        count(std::string("live ") + kind);
        count(kind);
        return handle;
    }

    std::shared_ptr<T> get(const void* handle, const char* call) {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto found = live.find(const_cast<void*>(handle));
        if (found == live.end()) fault("%s: %p is none of the live %s", call, handle, kind);
        return found->second;
    }

    std::shared_ptr<T> remove(const void* handle, const char* call) {
        std::shared_ptr<T> object = get(handle, call);
        const std::lock_guard<std::mutex> lock(mutex);
        live.erase(const_cast<void*>(handle));
        count(std::string("live ") + kind, -1);
        return object;
    }

    std::vector<std::shared_ptr<T>> all() {
        const std::lock_guard<std::mutex> lock(mutex);
        std::vector<std::shared_ptr<T>> objects;
        for (const auto& entry : live) objects.push_back(entry.second);
        return objects;
    }

private:
    const char* kind;
    std::mutex mutex;
    std::unordered_map<void*, std::shared_ptr<T>> live;
};

Handles<Stream>& streams();

// The stream behind a handle. The default streams are not emulated: the engine has its own.
std::shared_ptr<Stream> stream_of(void* handle, const char* call);
// Puts work behind all other of the stream, or into its capture.
void enqueue(Stream& stream, Op op);
// Returns once what was enqueued before has run; the sticky error if there is one.
Status synchronize(Stream& stream);
// Whether the calling thread may not do this because it is capturing; the capture is spoilt then.
bool spoils_capture();

// ---- kernels.cpp ---------------------------------------------------------------------------------------------------

// Calls `run(first, last)` for parts of 0 to n - 1, on several threads where they are free.
void in_parts(uint64_t n, const std::function<void(uint64_t first, uint64_t last)>& run);

}  // namespace emulator
