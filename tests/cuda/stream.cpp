// Streams and events: queues that threads work off, in order each and without any order between them but events'.
#include "emulator.h"

#include <chrono>
#include <random>
#include <thread>

namespace emulator {
namespace {

constexpr unsigned NON_BLOCKING = 1;
constexpr unsigned DISABLE_TIMING = 2;

// All that is waited for changes under one lock: whoever waits looks again at each change.
struct Progress {
    std::mutex mutex;
    std::condition_variable changed;
};

Progress& progress() {
    static Progress* progress = new Progress;
    return *progress;
}

template <typename Change>
void announce(Change change) {
    {
        const std::lock_guard<std::mutex> lock(progress().mutex);
        change();
    }
    progress().changed.notify_all();
}

// Waits until `is_done`, or until the context is lost.
template <typename IsDone>
Status wait_until(const Context& context, IsDone is_done) {
    std::unique_lock<std::mutex> lock(progress().mutex);
    progress().changed.wait(lock, [&] { return is_done() || context.error != SUCCESS; });
    return static_cast<Status>(context.error.load());
}

Handles<Event>& events() {
    static Handles<Event>* events = new Handles<Event>("events");
    return *events;
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Sleeps before one op in four, up to `delay_us`: an order that nothing enforces comes out another way then.
void delay(uint64_t stream) {
    const uint64_t delay_us = setting("delay_us", 0);
    if (delay_us == 0) return;
    static thread_local std::minstd_rand random(static_cast<unsigned>(setting("seed", 1) * 1000 + stream));
    const uint64_t drawn = random() % (4 * delay_us);
    if (drawn < delay_us) std::this_thread::sleep_for(std::chrono::microseconds(drawn));
}

// The faults that a test asked for: `fail_after` and `hang_after` launches of the context, counted from its begin.
void inject(Context& context) {
    const uint64_t launch = context.num_launched++;
    const uint64_t device = setting("fault_device", 0);
    if (static_cast<uint64_t>(context.device) != device) return;
    if (launch >= setting("fail_after", ~uint64_t(0))) {
        count("injected failures");
        announce([&] { context.error = ILLEGAL_ADDRESS; });
    }
    if (launch >= setting("hang_after", ~uint64_t(0))) {
        count("injected hangs");
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

void execute(Context& context, uint64_t stream, const Op& op) {
    if (context.error == SUCCESS) {
        delay(stream);
        if (op.is_launch) inject(context);
    }
    if (context.error != SUCCESS && !op.is_always) return;
    op.run();
    if (op.is_launch) count(op.name);
}

void work(const std::shared_ptr<Stream>& stream) {
    for (;;) {
        Op op;
        {
            std::unique_lock<std::mutex> lock(stream->mutex);
            stream->wake.wait(lock, [&] { return !stream->queue.empty() || stream->is_closing; });
            if (stream->queue.empty()) break;
            op = std::move(stream->queue.front());
            stream->queue.pop_front();
        }
        execute(*stream->context, stream->number, op);
        announce([&] { stream->num_done++; });
    }
    count("live stream threads", -1);
}

}  // namespace

Handles<Stream>& streams() {
    static Handles<Stream>* streams = new Handles<Stream>("streams");
    return *streams;
}

std::shared_ptr<Stream> stream_of(void* handle, const char* call) {
    // Null, and CU_STREAM_LEGACY and CU_STREAM_PER_THREAD, which are 1 and 2.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) fault("%s: the default streams are not emulated", call);
    return streams().get(handle, call);
}

void enqueue(Stream& stream, Op op) {
    {
        const std::lock_guard<std::mutex> lock(stream.mutex);
        if (stream.capture != nullptr) {
            stream.capture->ops.push_back(std::move(op));
            return;
        }
        stream.queue.push_back(std::move(op));
        stream.num_enqueued++;
    }
    stream.wake.notify_one();
}

Status synchronize(Stream& stream) {
    uint64_t num_enqueued = 0;
    {
        const std::lock_guard<std::mutex> lock(stream.mutex);
        if (stream.capture != nullptr) {
            stream.capture->is_invalid = true;
            return CAPTURE_UNSUPPORTED;
        }
        num_enqueued = stream.num_enqueued;
    }
    return wait_until(*stream.context, [&] { return stream.num_done >= num_enqueued; });
}

void run_captured(Stream& stream, const Op& op) { execute(*stream.context, stream.number, op); }

}  // namespace emulator

using namespace emulator;

extern "C" {

int cuStreamCreate(void** handle, unsigned flags) {
    if (const Status status = enter()) return status;
    if (flags != NON_BLOCKING) fault("cuStreamCreate: a stream that waits for the default stream is not emulated");
    static std::atomic<uint64_t> num_streams{0};
    auto stream = std::make_shared<Stream>();
    stream->context = current_context();
    stream->number = num_streams++;
    *handle = streams().add(stream);
    count("live stream threads");
    std::thread(work, stream).detach();
    return SUCCESS;
}

// What is enqueued still runs, as the driver has it.
int cuStreamDestroy_v2(void* handle) {
    const auto stream = streams().remove(handle, "cuStreamDestroy");
    {
        const std::lock_guard<std::mutex> lock(stream->mutex);
        if (stream->capture != nullptr) fault("cuStreamDestroy: the stream is capturing");
        stream->is_closing = true;
    }
    stream->wake.notify_one();
    return stream->context->error;
}

int cuStreamSynchronize(void* handle) {
    const auto stream = stream_of(handle, "cuStreamSynchronize");
    if (spoils_capture()) return CAPTURE_UNSUPPORTED;
    return synchronize(*stream);
}

int cuStreamWaitEvent(void* handle, void* event_handle, unsigned flags) {
    const auto stream = stream_of(handle, "cuStreamWaitEvent");
    const auto event = events().get(event_handle, "cuStreamWaitEvent");
    if (flags != 0) return INVALID_VALUE;
    if (stream->capture != nullptr) fault("cuStreamWaitEvent: a wait in a capture is not emulated");
    if (const int error = stream->context->error) return error;
    // The record as it is now: a later one does not move what is waited for.
    const std::shared_ptr<Record> record = event->last;
    if (record == nullptr) return SUCCESS;
    const Context* from = event->context;
    enqueue(*stream, {"wait", [record, from] { wait_until(*from, [&] { return record->is_done; }); }, false, false});
    return SUCCESS;
}

int cuEventCreate(void** handle, unsigned flags) {
    if (const Status status = enter()) return status;
    auto event = std::make_shared<Event>();
    event->context = current_context();
    event->is_timed = (flags & DISABLE_TIMING) == 0;
    *handle = events().add(event);
    return SUCCESS;
}

int cuEventDestroy_v2(void* handle) { return events().remove(handle, "cuEventDestroy")->context->error; }

int cuEventRecord(void* handle, void* stream_handle) {
    const auto event = events().get(handle, "cuEventRecord");
    const auto stream = stream_of(stream_handle, "cuEventRecord");
    if (event->context != stream->context) return INVALID_HANDLE;
    if (stream->capture != nullptr) fault("cuEventRecord: a record in a capture is not emulated");
    if (const int error = stream->context->error) return error;
    auto record = std::make_shared<Record>();
    event->last = record;
    const auto run = [record] {
        announce([&] {
            record->seconds = now();
            record->is_done = true;
        });
    };
    enqueue(*stream, {"record", run, false, true});
    return SUCCESS;
}

int cuEventQuery(void* handle) {
    const auto event = events().get(handle, "cuEventQuery");
    if (spoils_capture()) return CAPTURE_UNSUPPORTED;
    const std::lock_guard<std::mutex> lock(progress().mutex);
    if (const int error = event->context->error) return error;
    return event->last == nullptr || event->last->is_done ? SUCCESS : NOT_READY;
}

int cuEventSynchronize(void* handle) {
    const auto event = events().get(handle, "cuEventSynchronize");
    if (spoils_capture()) return CAPTURE_UNSUPPORTED;
    const std::shared_ptr<Record> record = event->last;
    return wait_until(*event->context, [&] { return record == nullptr || record->is_done; });
}

int cuEventElapsedTime_v2(float* milliseconds, void* from_handle, void* to_handle) {
    const auto from = events().get(from_handle, "cuEventElapsedTime"), to = events().get(to_handle, "cuEventElapsedTime");
    if (!from->is_timed || !to->is_timed || from->last == nullptr || to->last == nullptr) return INVALID_HANDLE;
    const std::lock_guard<std::mutex> lock(progress().mutex);
    if (!from->last->is_done || !to->last->is_done) return NOT_READY;
    *milliseconds = static_cast<float>((to->last->seconds - from->last->seconds) * 1e3);
    return SUCCESS;
}

int cuEventElapsedTime(float* milliseconds, void* from, void* to) { return cuEventElapsedTime_v2(milliseconds, from, to); }

}  // extern "C"
