#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "fault.h"

namespace paring {
namespace {

constexpr std::size_t kLine = 64;
constexpr auto kSpin = std::chrono::milliseconds(1);
constexpr int kMaxThreads = 1024;

std::atomic<uint64_t> forks{0};

// Guards the restart of a pool after a fork; held across the fork itself, so that the child finds
// it free.
std::mutex restart;

void before_fork() { restart.lock(); }
void after_fork() { restart.unlock(); }
void in_child() {
    forks.fetch_add(1, std::memory_order_relaxed);
    restart.unlock();
}

void watch_forks() {
    static const int once = pthread_atfork(before_fork, after_fork, in_child);
    (void)once;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

}  // namespace

// A ticket is a job's number (high half) and how many of its units nobody has taken yet (low half).
// A worker takes a unit by compare-and-swap, which only succeeds while the job is the same and
// unfinished; so what it read of the job before that was not being overwritten.
struct Pool::State {
    alignas(kLine) std::atomic<uint64_t> ticket{0};
    alignas(kLine) std::atomic<int64_t> done{0};
    alignas(kLine) std::atomic<Task> task{nullptr};
    std::atomic<const void*> context{nullptr};
    std::atomic<int64_t> units{0};
    alignas(kLine) std::atomic<int> asleep{0};
    std::atomic<bool> stop{false};
    std::mutex owner;
    std::mutex sleep;
    std::condition_variable wake;
    uint64_t forks_seen = 0;
    std::vector<std::thread> workers;

    // Takes and runs one unit; false when there is none.
    bool take(int thread) {
        uint64_t seen = ticket.load(std::memory_order_acquire);
        for (;;) {
            const uint32_t left = static_cast<uint32_t>(seen);
            if (left == 0) return false;
            const Task run = task.load(std::memory_order_relaxed);
            const void* with = context.load(std::memory_order_relaxed);
            const int64_t unit = units.load(std::memory_order_relaxed) - left;
            if (ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire)) {
                run(with, unit, thread);
                done.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
    }

    bool idle() const { return static_cast<uint32_t>(ticket.load()) == 0 && !stop.load(); }

    void work(int thread) {
        auto since = std::chrono::steady_clock::now();
        while (!stop.load(std::memory_order_relaxed)) {
            bool worked = false;
            while (take(thread)) worked = true;
            const auto now = std::chrono::steady_clock::now();
            if (worked) since = now;
            if (now - since < kSpin) {
                for (int i = 0; i < 8; ++i) relax();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleep);
            asleep.fetch_add(1);
            wake.wait(lock, [this] { return !idle(); });
            asleep.fetch_sub(1);
            since = std::chrono::steady_clock::now();
        }
    }

    void rouse() {
        // Sequentially consistent: either this sees the sleeper, or the sleeper sees the ticket.
        if (asleep.load() == 0) return;
        { std::lock_guard<std::mutex> lock(sleep); }
        wake.notify_all();
    }
};

Pool::Pool(int threads) : threads_(threads) {
    require(threads >= 1 && threads <= kMaxThreads, "threads is " + std::to_string(threads) +
                                                        "; give 1 to " +
                                                        std::to_string(kMaxThreads));
    watch_forks();
    start();
}

Pool::~Pool() {
    // After a fork the workers exist only in the parent; their state can't be joined, so it stays.
    if (state_->forks_seen != forks.load(std::memory_order_relaxed)) return;
    state_->stop.store(true);
    { std::lock_guard<std::mutex> lock(state_->sleep); }
    state_->wake.notify_all();
    for (std::thread& worker : state_->workers) worker.join();
    delete state_;
}

void Pool::start() {
    auto* state = new State;
    state->forks_seen = forks.load(std::memory_order_relaxed);
    state_ = state;
    state->workers.reserve(static_cast<std::size_t>(threads_ - 1));
    try {
        for (int thread = 1; thread < threads_; ++thread)
            state->workers.emplace_back([state, thread] { state->work(thread); });
    } catch (const std::system_error&) {
        // The system allows no more threads; those that started are enough to be right.
    }
}

std::unique_lock<std::mutex> Pool::enter() {
    {
        std::lock_guard<std::mutex> lock(restart);
        if (state_->forks_seen != forks.load(std::memory_order_relaxed)) start();
    }
    return std::unique_lock<std::mutex>(state_->owner);
}

void Pool::fork_join(Task task, const void* context, int64_t units) {
    State& state = *state_;
    state.task.store(task, std::memory_order_relaxed);
    state.context.store(context, std::memory_order_relaxed);
    state.units.store(units, std::memory_order_relaxed);
    state.done.store(0, std::memory_order_relaxed);
    const uint64_t job = (state.ticket.load(std::memory_order_relaxed) >> 32) + 1;
    state.ticket.store(job << 32 | static_cast<uint64_t>(units));
    state.rouse();
    while (state.take(0)) {
    }
    for (int turns = 0; state.done.load(std::memory_order_acquire) != units; ++turns) {
        if (turns < 2000)
            relax();
        else
            std::this_thread::yield();
    }
}

}  // namespace paring
