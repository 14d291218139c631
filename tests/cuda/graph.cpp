// Capture of a stream, and graphs: lists of ops, run one after another.
#include "emulator.h"

namespace emulator {

void run_captured(Stream& stream, const Op& op);

namespace {

// CUstreamCaptureMode
constexpr int THREAD_LOCAL = 1;

// Its address tells the threads apart.
thread_local char this_thread;
// The captures that this thread has begun and not ended.
thread_local std::vector<std::weak_ptr<Stream>> captures;

Handles<Graph>& graphs() {
    static Handles<Graph>* graphs = new Handles<Graph>("graphs");
    return *graphs;
}

struct GraphExec {
    std::shared_ptr<const Graph> graph;
};

Handles<GraphExec>& graph_execs() {
    static Handles<GraphExec>* graph_execs = new Handles<GraphExec>("instantiated graphs");
    return *graph_execs;
}

}  // namespace

bool spoils_capture() {
    bool is_capturing = false;
    for (const auto& capture : captures) {
        const auto stream = capture.lock();
        if (stream == nullptr || stream->capture == nullptr) continue;
        stream->capture->is_invalid = true;
        is_capturing = true;
    }
    if (is_capturing) count("captures spoilt");
    return is_capturing;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

int cuStreamBeginCapture_v2(void* handle, int mode) {
    const auto stream = stream_of(handle, "cuStreamBeginCapture");
    if (mode != THREAD_LOCAL) fault("cuStreamBeginCapture: the mode %d is not emulated", mode);
    if (const int error = stream->context->error) return error;
    const std::lock_guard<std::mutex> lock(stream->mutex);
    if (stream->capture != nullptr) return INVALID_VALUE;
    stream->capture.reset(new Capture);
    stream->capture->thread = &this_thread;
    captures.push_back(stream);
    return SUCCESS;
}

int cuStreamEndCapture(void* handle, void** graph_handle) {
    const auto stream = stream_of(handle, "cuStreamEndCapture");
    *graph_handle = nullptr;
    std::unique_ptr<Capture> capture;
    {
        const std::lock_guard<std::mutex> lock(stream->mutex);
        if (stream->capture == nullptr) return INVALID_VALUE;
        if (stream->capture->thread != &this_thread) fault("cuStreamEndCapture: the capture was begun by another thread");
        capture = std::move(stream->capture);
    }
    captures.clear();
    if (const int error = stream->context->error) return error;
    if (capture->is_invalid) return CAPTURE_INVALIDATED;
    auto graph = std::make_shared<Graph>();
    graph->ops = std::move(capture->ops);
    *graph_handle = graphs().add(graph);
    return SUCCESS;
}

int cuStreamIsCapturing(void* handle, int* status) {
    const auto stream = stream_of(handle, "cuStreamIsCapturing");
    *status = stream->capture == nullptr ? 0 : stream->capture->is_invalid ? 2 : 1;
    return SUCCESS;
}

int cuGraphInstantiateWithFlags(void** exec_handle, void* graph_handle, unsigned long long flags) {
    if (const Status status = enter()) return status;
    if (flags != 0) fault("cuGraphInstantiateWithFlags: the flags %llu are not emulated", flags);
    auto exec = std::make_shared<GraphExec>();
    exec->graph = graphs().get(graph_handle, "cuGraphInstantiateWithFlags");
    *exec_handle = graph_execs().add(exec);
    return SUCCESS;
}

int cuGraphUpload(void* exec_handle, void* handle) {
    graph_execs().get(exec_handle, "cuGraphUpload");
    return stream_of(handle, "cuGraphUpload")->context->error;
}

int cuGraphLaunch(void* exec_handle, void* handle) {
    const auto graph = graph_execs().get(exec_handle, "cuGraphLaunch")->graph;
    const auto stream = stream_of(handle, "cuGraphLaunch");
    if (stream->capture != nullptr) fault("cuGraphLaunch: a graph in a capture is not emulated");
    if (const int error = stream->context->error) return error;
    Stream* raw = stream.get();  // it works off its queue before it goes
    const auto run = [graph, raw] {
        for (const Op& op : graph->ops) run_captured(*raw, op);
    };
    enqueue(*stream, {"graph", run, false, false});
    count("graph launches");
    return SUCCESS;
}

// One that still runs ends first: its ops are held by the queue.
int cuGraphExecDestroy(void* exec_handle) {
    graph_execs().remove(exec_handle, "cuGraphExecDestroy");
    return SUCCESS;
}

int cuGraphDestroy(void* graph_handle) {
    graphs().remove(graph_handle, "cuGraphDestroy");
    return SUCCESS;
}

}  // extern "C"
