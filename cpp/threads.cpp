#include "threads.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
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
constexpr int64_t kMostUnits = 0xffff;  // that a share can count
constexpr std::size_t kFetch = std::size_t{1} << 18;  // bytes that a thread fetches ahead: part of a second-level cache
constexpr std::size_t kFetchLines = 8;                // between two looks for work

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

// A thread's share of units [0, units): from here to where the next one's begins.
int64_t share_begin(int64_t units, int thread, int threads) { return units * thread / threads; }

// What a waiting thread will read of the next job, fetched a few lines at a time.
class Fetcher {
public:
    // False when there is nothing (more) to fetch.
    bool some(const std::vector<Range>* ranges, int thread, int threads) {
        if (ranges != ranges_) {
            const auto units = static_cast<int64_t>(ranges->size());
            ranges_ = ranges;
            range_ = static_cast<std::size_t>(share_begin(units, thread, threads));
            end_ = static_cast<std::size_t>(share_begin(units, thread + 1, threads));
            at_ = 0;
            left_ = kFetch;
        }
        for (std::size_t line = 0; line < kFetchLines && left_ > 0 && range_ < end_; ++line) {
            __builtin_prefetch((*ranges_)[range_].from + at_, 0, 2);
            at_ += kLine;
            left_ -= kLine;
            if (at_ < (*ranges_)[range_].bytes) continue;
            at_ = 0;
            ++range_;
        }
        return left_ > 0 && range_ < end_;
    }

private:
    const std::vector<Range>* ranges_ = nullptr;
    std::size_t range_ = 0, end_ = 0, at_ = 0, left_ = 0;
};

}  // namespace

// Every thread has a share of a job's units and takes them from its front; one without work takes from the back of
// others'. A share is one word: the job's number, and the first and the end of what nobody has taken yet. Units are taken
// by compare-and-swap, which only succeeds while the job is the same and unfinished; so what was read of the job before
// that was not being overwritten.
struct Pool::State {
    struct Thread {
        alignas(kLine) std::atomic<uint64_t> share{0};
        alignas(kLine) std::atomic<uint64_t> done{0};  // units, of all jobs
        std::atomic<bool> asleep{false};
        alignas(kLine) Fetcher fetcher;
        std::thread thread;
    };

    alignas(kLine) std::atomic<Task> task{nullptr};
    std::atomic<const void*> context{nullptr};
    std::atomic<int64_t> first{0};  // unit that shares count from
    std::atomic<int> active{0};
    std::atomic<const std::vector<Range>*> expected{nullptr};
    alignas(kLine) std::atomic<bool> stop{false};
    std::mutex owner;
    std::mutex sleep;
    std::condition_variable wake;
    uint64_t forks_seen = 0;
    uint64_t jobs = 0, issued = 0;  // the owner's: so many jobs, and units of them
    std::vector<Thread> threads;    // the caller's is the first

    explicit State(int count) : threads(static_cast<std::size_t>(count)) {}

    Thread& of(int thread) { return threads[static_cast<std::size_t>(thread)]; }

    static uint64_t packed(uint64_t job, int64_t begin, int64_t end) {
        return job << 32 | static_cast<uint64_t>(begin) << 16 | static_cast<uint64_t>(end);
    }

    // Takes one unit of a thread's share and runs it; false when none is left.
    bool take(int from, int thread) {
        std::atomic<uint64_t>& share = of(from).share;
        uint64_t seen = share.load(std::memory_order_acquire);
        for (;;) {
            const auto begin = static_cast<int64_t>(seen >> 16 & kMostUnits), end = static_cast<int64_t>(seen & kMostUnits);
            if (begin == end) return false;
            const Task run = task.load(std::memory_order_relaxed);
            const void* with = context.load(std::memory_order_relaxed);
            const int64_t unit = first.load(std::memory_order_relaxed) + (from == thread ? begin : end - 1);
            const uint64_t rest = from == thread ? seen + (1 << 16) : seen - 1;
            if (!share.compare_exchange_weak(seen, rest, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            run(with, unit, thread);
            std::atomic<uint64_t>& done = of(thread).done;
            done.store(done.load(std::memory_order_relaxed) + 1, std::memory_order_release);
            return true;
        }
    }

    // Its own share, then what is left of others'. These get some time first: what their units read is in their caches.
    void work_off(int thread, Clock::time_point began) {
        while (take(thread, thread)) {
        }
        const auto finished = Clock::now();
        const auto patient = finished + (finished - began) / 4;
        const int others = active.load(std::memory_order_relaxed);
        for (int i = 1; i < others; ++i) {
            const int from = (thread + i) % others;
            while (has_work(from)) {
                if (has_work(thread)) return;  // of the next job
                if (Clock::now() < patient)
                    relax();
                else
                    take(from, thread);
            }
        }
    }

    bool fetch(int thread) {
        const auto* ranges = expected.load(std::memory_order_relaxed);
        const int shares = active.load(std::memory_order_relaxed);
        return ranges && thread < shares && of(thread).fetcher.some(ranges, thread, shares);
    }

    bool has_work(int thread) {
        const uint64_t share = of(thread).share.load();
        return (share >> 16 & kMostUnits) != (share & kMostUnits);
    }

    void work(int thread) {
        Thread& self = of(thread);
        auto since = Clock::now(), now = since;
        while (!stop.load(std::memory_order_relaxed)) {
            if (has_work(thread)) {
                work_off(thread, now);
                since = Clock::now();
            }
            now = Clock::now();
            const auto spun = now - since;
            if (spun < kSpin) {
                if (fetch(thread)) continue;
                if (spun > kEager) std::this_thread::yield();
                for (int i = 0; i < 8; ++i) relax();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleep);
            self.asleep.store(true);
            wake.wait(lock, [&] { return stop.load() || has_work(thread); });
            self.asleep.store(false);
            since = now = Clock::now();
        }
    }

    // Sequentially consistent: either this sees the sleeper, or the sleeper sees its share.
    void rouse(int count) {
        std::atomic_thread_fence(std::memory_order_seq_cst);
        bool asleep = false;
        for (int i = 1; i < count; ++i) asleep |= of(i).asleep.load();
        if (!asleep) return;
        { std::lock_guard<std::mutex> lock(sleep); }
        wake.notify_all();
    }

    bool finished() const {
        uint64_t sum = 0;
        for (const Thread& thread : threads) sum += thread.done.load(std::memory_order_acquire);
        return sum == issued;
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
    for (State::Thread& worker : state_->threads)
        if (worker.thread.joinable()) worker.thread.join();
    delete state_;
}

void Pool::start() {
    auto* state = new State(threads_);
    state->forks_seen = forks.load(std::memory_order_relaxed);
    state_ = state;
    try {
        for (int thread = 1; thread < threads_; ++thread) {
            state->of(thread).thread = std::thread([state, thread] { state->work(thread); });
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
    pthread_setaffinity_np(state_->of(thread).thread.native_handle(), sizeof only, &only);
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

void Pool::expect(const std::vector<Range>& ranges) {
    state_->expected.store(&ranges, std::memory_order_relaxed);
}

void Pool::fork_join(Task task, const void* context, int64_t units) {
    if (threads_ == 1 || units <= 1 || alone()) {
        for (int64_t unit = 0; unit < units; ++unit) task(context, unit, 0);
        return;
    }
    for (int64_t first = 0; first < units; first += kMostUnits)
        share_out(task, context, first, std::min<int64_t>(units - first, kMostUnits));
}

void Pool::share_out(Task task, const void* context, int64_t first, int64_t units) {
    State& state = *state_;
    const auto began = Clock::now();
    state.task.store(task, std::memory_order_relaxed);
    state.context.store(context, std::memory_order_relaxed);
    state.first.store(first, std::memory_order_relaxed);
    state.active.store(active_, std::memory_order_relaxed);
    state.issued += static_cast<uint64_t>(units);
    ++state.jobs;
    for (int thread = active_; thread-- > 0;) {
        const int64_t begin = share_begin(units, thread, active_), end = share_begin(units, thread + 1, active_);
        state.of(thread).share.store(State::packed(state.jobs, begin, end), std::memory_order_release);
    }
    state.rouse(active_);
    state.work_off(0, began);
    const auto finished = Clock::now();
    // Units are small, so a worker in time needs much less than the caller did.
    const auto late = finished + (finished - began) / 2 + kLate;
    auto now = finished;
    while (!state.finished()) {
        if (now > late)
            std::this_thread::yield();
        else if (!state.fetch(0))
            for (int i = 0; i < 8; ++i) relax();
        now = Clock::now();
    }
    weigh(now - began, now > late ? now - late : Clock::duration::zero());
}

}  // namespace paring
