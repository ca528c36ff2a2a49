// Timing of kernels and of the memory, without Python or a decoder around them.
#include "bindings_kernels.h"

#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "kernels/packed.h"

namespace py = pybind11;

namespace paring {
namespace {

using namespace kernels;
using Memory = std::unique_ptr<void, decltype(&std::free)>;

Memory aligned(size_t bytes) {
    const size_t unit = size_t{2} << 20, size = round_up(bytes + 1, unit);
    Memory memory(std::aligned_alloc(unit, size), std::free);
    if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(memory.get(), size, MADV_HUGEPAGE);  // as packed weights have: a probe without them reads less
#endif
    std::memset(memory.get(), 0, size);
    return memory;
}

// Seconds of each of `passes` calls of work(thread) on all threads at once, started by spinning.
std::vector<double> timed(int threads, int passes, const std::function<void(int)>& work) {
    std::atomic<int> arrived{0};
    std::vector<double> seconds(static_cast<size_t>(passes));
    const auto body = [&](int thread) {
        for (int pass = 0; pass < passes; ++pass) {
            arrived.fetch_add(1);
            while (arrived.load() < threads * (2 * pass + 1)) {}
            const auto start = std::chrono::steady_clock::now();
            work(thread);
            arrived.fetch_add(1);
            while (arrived.load() < threads * (2 * pass + 2)) {}
            const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
            if (thread == 0) seconds[static_cast<size_t>(pass)] = took.count();
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
    body(0);
    for (std::thread& other : others) other.join();
    return seconds;
}

// Each pass runs every matrix once on m tokens; with enough matrices the weights come from memory.
std::vector<double> time_linear(const std::string& name, const std::vector<const PackedMatrix*>& matrices, int32_t m,
                                int threads, int passes) {
    if (matrices.empty() || m < 1 || threads < 1 || passes < 1) throw std::invalid_argument("nothing to time");
    const KernelRow& row = select_row(name);
    const PackedMatrix& first = *matrices.front();
    for (const PackedMatrix* w : matrices)
        if (w->layout != first.layout || w->n != first.n || w->k != first.k || !same_input(w->input, first.input))
            throw std::invalid_argument("the matrices differ in layout or shape");
    const RunFn run = row.run[static_cast<size_t>(first.layout)];
    if (run == nullptr) throw std::invalid_argument("row '" + name + "' does not run this layout");
    const size_t k = static_cast<size_t>(first.k), n = static_cast<size_t>(first.n), tokens = static_cast<size_t>(m);
    std::vector<float> x(tokens * k), y(tokens * n);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 2654435761U % 1000) / 500.0F - 1.0F;
    const Memory memory = aligned(tokens * activation_bytes(first.input, first.k));
    const Activations input = bind_activations(memory.get(), activation_bytes(first.input, first.k), first.input, x.data(), k, m, first.k);
    if (first.input.mode != InputMode::f32) row.quantize(input, 0, m);
    std::vector<Memory> scratch;
    for (int thread = 0; thread < threads; ++thread) scratch.push_back(aligned(run_scratch_bytes(first)));
    py::gil_scoped_release release;
    return timed(threads, passes, [&](int thread) {
        for (const PackedMatrix* w : matrices)
            run(*w, input, y.data(), n, split_panels(*w, thread, threads), split_panels(*w, thread + 1, threads),
                scratch[static_cast<size_t>(thread)].get());
    });
}

constexpr size_t kAhead = 192;  // words prefetched ahead, as the kernels do

// Each pass reads `bytes` of memory once, shared among the threads.
std::vector<double> time_reading(size_t bytes, int threads, int passes) {
    if (threads < 1 || passes < 1) throw std::invalid_argument("threads and passes must be at least 1");
    const size_t share = bytes / static_cast<size_t>(threads) / 256 * 32;
    const size_t words = share * static_cast<size_t>(threads);
    const Memory memory = aligned(words * 8);
    const auto* data = static_cast<const uint64_t*>(memory.get());
    std::atomic<uint64_t> sink{0};
    py::gil_scoped_release release;
    return timed(threads, passes, [&](int thread) {
        const uint64_t* at = data + share * static_cast<size_t>(thread);
        uint64_t sums[32] = {};
        for (size_t i = 0; i < share; i += 32) {
            for (size_t line = 0; line < 32; line += 8) __builtin_prefetch(at + i + kAhead + line);
            for (size_t lane = 0; lane < 32; ++lane) sums[lane] += at[i + lane];
        }
        for (uint64_t sum : sums) sink += sum;
    });
}

// Each pass sends one cache line `trips` times to another thread and back.
std::vector<double> time_exchange(int trips, int passes) {
    if (trips < 1 || passes < 1) throw std::invalid_argument("trips and passes must be at least 1");
    alignas(64) std::atomic<int> ball{0};
    py::gil_scoped_release release;
    return timed(2, passes, [&](int thread) {
        for (int trip = 0; trip < trips; ++trip) {
            while (ball.load(std::memory_order_acquire) != thread) {}
            ball.store(1 - thread, std::memory_order_release);
        }
    });
}

}  // namespace

void bind_timing(py::module_& module) {
    module.def("time_linear", &time_linear, py::arg("row"), py::arg("matrices"), py::arg("m") = 1,
               py::arg("threads") = 1, py::arg("passes") = 5,
               "Seconds of each pass over all matrices (equal in shape and layout).");
    module.def("time_reading", &time_reading, py::arg("bytes"), py::arg("threads") = 1, py::arg("passes") = 5,
               "Seconds of each pass of reading so many bytes of memory.");
    module.def("time_exchange", &time_exchange, py::arg("trips") = 10000, py::arg("passes") = 3,
               "Seconds of each pass of sending a cache line so often to another thread and back.");
}

}  // namespace paring
