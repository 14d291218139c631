// What a test asks of the emulator by environment or file, what it is told, and how faults are said.
#include "emulator.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>

namespace emulator {

void fault(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "cuda emulator: %s\n", text);
    std::fflush(stderr);
    std::abort();
}

namespace {

std::string variable(const char* name) {
    std::string variable = "EREMOIS_TEST_CUDA_";
    for (const char* c = name; *c != 0; c++) variable += static_cast<char>(std::toupper(*c));
    const char* value = std::getenv(variable.c_str());
    return value == nullptr ? "" : value;
}

uint64_t number(const std::string& text, const char* name) {
    char* end = nullptr;
    const uint64_t value = std::strtoull(text.c_str(), &end, 10);
    if (text.empty() || *end != 0) fault("the setting %s is no number: %s", name, text.c_str());
    return value;
}

// The lines `name = number` of a file that may be written while the process runs, by rename.
class Control {
public:
    bool find(const char* name, uint64_t& value) {
        static const std::string path = variable("control");
        if (path.empty()) return false;
        const std::lock_guard<std::mutex> lock(mutex);
        struct stat found {};
        if (stat(path.c_str(), &found) != 0) return false;
        const auto key = std::make_pair(found.st_ino, found.st_mtim.tv_sec * 1000000000LL + found.st_mtim.tv_nsec);
        if (key != read) {
            values.clear();
            if (FILE* file = std::fopen(path.c_str(), "r")) {
                char line_name[64], line_value[64];
                while (std::fscanf(file, " %63[a-z_] = %63[0-9]", line_name, line_value) == 2) {
                    values[line_name] = number(line_value, line_name);
                }
                if (!std::feof(file)) fault("%s: a line is not `name = number`", path.c_str());
                std::fclose(file);
            }
            read = key;
        }
        const auto entry = values.find(name);
        if (entry == values.end()) return false;
        value = entry->second;
        return true;
    }

private:
    std::mutex mutex;
    std::pair<ino_t, long long> read{0, 0};
    std::map<std::string, uint64_t> values;
};

// Leaked on purpose: threads of streams outlive the statics of this library.
Control& control() {
    static Control* control = new Control;
    return *control;
}

// All counters, as records of a file that is mapped: they are there however the process ends.
class Counters {
public:
    Counters() {
        const std::string path = variable("report");
        const int file = path.empty() ? -1 : open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
        const int kind = path.empty() ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
        const size_t num_bytes = MAX_RECORDS * sizeof(Record);
        if (!path.empty() && ftruncate(file, num_bytes) != 0) fault("%s cannot be written", path.c_str());
        void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, kind, file, 0);
        if (memory == MAP_FAILED) fault("the report %s cannot be mapped", path.c_str());
        records = static_cast<Record*>(memory);
    }

    int64_t& of(const std::string& name) {
        const auto found = places.find(name);
        if (found != places.end()) return records[found->second].value;
        const size_t place = places.size();
        if (place == MAX_RECORDS || name.size() >= sizeof records[place].name) fault("no room for the counter %s", name.c_str());
        std::memcpy(records[place].name, name.data(), name.size());
        places[name] = place;
        return records[place].value;
    }

    std::mutex mutex;

private:
    struct Record {
        char name[56];
        int64_t value;
    };
    static constexpr size_t MAX_RECORDS = 256;
    Record* records = nullptr;
    std::map<std::string, size_t> places;
};

Counters& counters() {
    static Counters* counters = new Counters;
    return *counters;
}

// At the end of a process that ends by itself: a stream that was destroyed still has frees to do. One that hangs never
// ends.
struct End {
    ~End() {
        for (int i = 0; i < 10000 && counted("live stream threads") > counted("live streams"); i++) {
            if (counted("injected hangs") > 0) break;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
} end;

}  // namespace

uint64_t setting(const char* name, uint64_t otherwise) {
    uint64_t value = 0;
    if (control().find(name, value)) return value;
    const std::string text = variable(name);
    return text.empty() ? otherwise : number(text, name);
}

void count(const std::string& name, int64_t by) {
    const std::lock_guard<std::mutex> lock(counters().mutex);
    counters().of(name) += by;
}

int64_t counted(const std::string& name) {
    const std::lock_guard<std::mutex> lock(counters().mutex);
    return counters().of(name);
}

}  // namespace emulator

// What the list of all of CUDA's functions calls for those that nobody here defines.
extern "C" void emulator_unemulated(const char* name) { emulator::fault("%s is not emulated", name); }
