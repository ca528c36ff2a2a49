#include "threads.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "fault.h"
#include "kernels/memory.h"

namespace paring {
namespace {

constexpr std::size_t kLine = 64;
constexpr auto kSpin = std::chrono::milliseconds(1);
constexpr auto kEager = std::chrono::microseconds(20);  // then a spinning worker lets others run
constexpr auto kLate = std::chrono::microseconds(50);
constexpr auto kLeast = std::chrono::milliseconds(1);  // of time lost before workers rest
constexpr auto kShortest = std::chrono::milliseconds(5), kLongest = std::chrono::milliseconds(160);
constexpr auto kWindow = std::chrono::milliseconds(20);
constexpr int kMaxThreads = 1024;

std::atomic<uint64_t> forks{0};

// Guards the restart of a pool after a fork; held across the fork itself, so that the child finds
// it free.
std::mutex restart;

void before_fork() {
    restart.lock();
    kernels::lock_shared_memory();
}
void after_fork() {
    kernels::unlock_shared_memory();
    restart.unlock();
}
void in_child() {
    forks.fetch_add(1, std::memory_order_relaxed);
    after_fork();
}

void watch_forks() {
    static const int once = pthread_atfork(before_fork, after_fork, in_child);
    (void)once;
}

// The CPUs for so many pinned threads, in order.
std::vector<int> pinned_cpus(int threads) {
    std::vector<int> cpus;
#if defined(__linux__)
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    require(sched_getaffinity(0, sizeof allowed, &allowed) == 0,
            "pin: the system does not tell which CPUs the process may use; leave it out");
    for (int cpu = 0; cpu < CPU_SETSIZE && static_cast<int>(cpus.size()) < threads; ++cpu)
        if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
    require(static_cast<int>(cpus.size()) == threads,
            "pin needs a CPU for each of " + std::to_string(threads) + " threads, but the process may use " +
                std::to_string(cpus.size()) + "; ask for fewer threads, or leave pin out");
#else
    (void)threads;
    require(false, "pin works on Linux alone; leave it out");
#endif
    return cpus;
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
    struct alignas(kLine) Worker {
        std::atomic<bool> asleep{false};
        std::thread thread;
    };

    alignas(kLine) std::atomic<uint64_t> ticket{0};
    alignas(kLine) std::atomic<int64_t> done{0};
    alignas(kLine) std::atomic<Task> task{nullptr};
    std::atomic<const void*> context{nullptr};
    std::atomic<int64_t> units{0};
    std::atomic<int> active{0};
    alignas(kLine) std::atomic<bool> stop{false};
    std::mutex owner;
    std::mutex sleep;
    std::condition_variable wake;
    uint64_t forks_seen = 0;
    std::vector<Worker> workers;  // of threads 1, 2, ...

    explicit State(int threads) : workers(static_cast<std::size_t>(threads - 1)) {}

    // Takes and runs one unit; false when there is none.
    bool take(int thread) {
        uint64_t seen = ticket.load(std::memory_order_acquire);
        for (;;) {
            const uint32_t left = static_cast<uint32_t>(seen);
            if (left == 0 || thread >= active.load(std::memory_order_relaxed)) return false;
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

    bool wanted(int thread) const {
        return stop.load() ||
               (static_cast<uint32_t>(ticket.load()) != 0 && thread < active.load());
    }

    void work(int thread) {
        Worker& self = workers[static_cast<std::size_t>(thread - 1)];
        auto since = Clock::now();
        while (!stop.load(std::memory_order_relaxed)) {
            bool worked = false;
            while (take(thread)) worked = true;
            const auto now = Clock::now();
            if (worked) since = now;
            if (now - since < kSpin) {
                if (now - since > kEager) std::this_thread::yield();
                for (int i = 0; i < 8; ++i) relax();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleep);
            self.asleep.store(true);
            wake.wait(lock, [&] { return wanted(thread); });
            self.asleep.store(false);
            since = Clock::now();
        }
    }

    // Sequentially consistent: either this sees the sleeper, or the sleeper sees the ticket.
    void rouse() {
        bool asleep = false;
        for (int i = 0; i + 1 < active.load(std::memory_order_relaxed); ++i)
            asleep |= workers[static_cast<std::size_t>(i)].asleep.load();
        if (!asleep) return;
        { std::lock_guard<std::mutex> lock(sleep); }
        wake.notify_all();
    }
};

Pool::Pool(int threads, bool pin) : threads_(threads), active_(threads) {
    require(threads >= 1 && threads <= kMaxThreads, "threads is " + std::to_string(threads) +
                                                        "; give 1 to " +
                                                        std::to_string(kMaxThreads));
    if (pin) cpus_ = pinned_cpus(threads);
    watch_forks();
    start();
}

Pool::~Pool() {
    // After a fork the workers exist only in the parent; their state can't be joined, so it stays.
    if (state_->forks_seen != forks.load(std::memory_order_relaxed)) return;
    state_->stop.store(true);
    { std::lock_guard<std::mutex> lock(state_->sleep); }
    state_->wake.notify_all();
    for (State::Worker& worker : state_->workers)
        if (worker.thread.joinable()) worker.thread.join();
    delete state_;
}

void Pool::start() {
    auto* state = new State(threads_);
    state->forks_seen = forks.load(std::memory_order_relaxed);
    state_ = state;
    try {
        for (int thread = 1; thread < threads_; ++thread) {
            state->workers[static_cast<std::size_t>(thread - 1)].thread =
                std::thread([state, thread] { state->work(thread); });
            if (!cpus_.empty()) pin_worker(thread);
        }
    } catch (const std::system_error&) {
        // The system allows no more threads; those that started are enough to be right.
    }
}

// A CPU may have gone since the pool was made; the worker then runs wherever the system puts it.
void Pool::pin_worker([[maybe_unused]] int thread) {
#if defined(__linux__)
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(cpus_[static_cast<std::size_t>(thread)], &only);
    auto& worker = state_->workers[static_cast<std::size_t>(thread - 1)].thread;
    pthread_setaffinity_np(worker.native_handle(), sizeof only, &only);
#endif
}

std::unique_lock<std::mutex> Pool::enter() {
    {
        std::lock_guard<std::mutex> lock(restart);
        if (state_->forks_seen != forks.load(std::memory_order_relaxed)) start();
    }
    return std::unique_lock<std::mutex>(state_->owner);
}

// Whether this job is the caller's alone, because the workers cost more than they gave of late.
bool Pool::alone() {
    if (active_ < threads_ && Clock::now() >= resting_until_) {
        ++active_;
        resting_until_ = Clock::now() + rest_;
    }
    return active_ == 1;
}

// Weighs the time lost in waiting for late workers against all the time of jobs, over the last some
// milliseconds. When a third is lost, half the workers rest, each time for longer; a rare late
// worker on a quiet machine changes nothing.
void Pool::weigh(Clock::duration spent, Clock::duration lost) {
    spent_ += spent;
    lost_ += lost;
    if (lost_ > kLeast && 3 * lost_ > spent_) {
        active_ = active_ / 2 > 1 ? active_ / 2 : 1;
        rest_ = rest_ == rest_.zero() ? kShortest : rest_ < kLongest ? 2 * rest_ : kLongest;
        resting_until_ = Clock::now() + rest_;
        spent_ = lost_ = Clock::duration::zero();
    } else if (spent_ > kWindow) {
        rest_ = rest_ > kShortest ? rest_ / 2 : Clock::duration::zero();
        spent_ /= 2;
        lost_ /= 2;
    }
}

void Pool::fork_join(Task task, const void* context, int64_t units) {
    if (threads_ == 1 || units <= 1 || alone()) {
        for (int64_t unit = 0; unit < units; ++unit) task(context, unit, 0);
        return;
    }
    State& state = *state_;
    const auto began = Clock::now();
    state.task.store(task, std::memory_order_relaxed);
    state.context.store(context, std::memory_order_relaxed);
    state.units.store(units, std::memory_order_relaxed);
    state.active.store(active_, std::memory_order_relaxed);
    state.done.store(0, std::memory_order_relaxed);
    const uint64_t job = (state.ticket.load(std::memory_order_relaxed) >> 32) + 1;
    state.ticket.store(job << 32 | static_cast<uint64_t>(units));
    state.rouse();
    while (state.take(0)) {
    }
    const auto finished = Clock::now();
    // Units are shared out finely, so a worker in time needs much less than the caller did.
    const auto late = finished + (finished - began) / 2 + kLate;
    auto now = finished;
    while (state.done.load(std::memory_order_acquire) != units) {
        if (now > late)
            std::this_thread::yield();
        else
            for (int i = 0; i < 8; ++i) relax();
        now = Clock::now();
    }
    weigh(now - began, now > late ? now - late : Clock::duration::zero());
}

}  // namespace paring
