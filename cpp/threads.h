// A pool of persistent threads for fork-joins of a few microseconds.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace paring {

// Memory that a job reads.
struct Range {
    const char* from;
    size_t bytes;
};

// Workers spin for about a millisecond after the last job, then sleep. The calling thread takes
// part. Each thread has an equal share of the units, the same ones every time, so that jobs over the
// same data find it in their caches. Where others take a quarter longer, it takes over theirs one by
// one: a worker that the system has put aside holds a job up only if it had just taken one. Where
// that happens (other programs want the CPUs too) the pool uses fewer workers for a while. Results
// must therefore not depend on which thread runs a unit.
class Pool {
public:
    // `threads` counts the calling thread; 1 makes every job run in place. With `pin` worker i stays on
    // the i-th CPU that the process may use, and the first is left to whoever calls.
    explicit Pool(int threads, bool pin = false);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Held by whoever runs jobs: one owner at a time. In the child of a fork, where the workers and
    // the lock's former owner are gone, the pool starts afresh.
    std::unique_lock<std::mutex> enter();

    // What the next job that reads much will read, in order of its units: threads that wait fetch
    // the beginning of their share into their caches. The ranges must stay until the pool is gone.
    void expect(const std::vector<Range>& ranges);

    // Calls body(unit, thread) for every unit in [0, units), thread in [0, threads()), and returns
    // when all are done. `body` must not throw. Call only under enter().
    template <class Body>
    void run(int64_t units, const Body& body) {
        fork_join(
            [](const void* context, int64_t unit, int thread) {
                (*static_cast<const Body*>(context))(unit, thread);
            },
            &body, units);
    }

private:
    struct State;
    using Clock = std::chrono::steady_clock;
    using Task = void (*)(const void* context, int64_t unit, int thread);

    void start();
    void pin_worker(int thread);
    void fork_join(Task task, const void* context, int64_t units);
    void share_out(Task task, const void* context, int64_t first, int64_t units);
    bool alone();
    void weigh(Clock::duration spent, Clock::duration lost);

    int threads_;
    std::vector<int> cpus_;  // of the threads; empty if they are not pinned
    State* state_ = nullptr;
    int active_;  // threads that take part now, the caller included
    Clock::time_point resting_until_;
    Clock::duration rest_{};            // the last one's length
    Clock::duration spent_{}, lost_{};  // lately
};

}  // namespace paring
