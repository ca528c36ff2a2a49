// Many short jobs on the pool: every unit runs once, by a thread there is. `pool_stress THREADS JOBS`.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "threads.h"

int main(int, char** arguments) {
    const int threads = std::atoi(arguments[1]);
    const long jobs = std::atol(arguments[2]);
    const int most = 70000;  // more than a share can count
    std::vector<std::atomic<int>> runs(most);
    const std::vector<char> memory(1 << 20);
    std::vector<std::vector<paring::Range>> expected(3);  // before the pool, whose threads read them
    for (size_t i = 0; i < 8; ++i) expected[1].push_back({memory.data() + 1000 * i, 1000});
    for (size_t i = 0; i < 3; ++i) expected[2].push_back({memory.data(), size_t{1} << 20});
    paring::Pool pool(threads);
    unsigned random = 1;
    long wrong = 0;
    for (long job = 0; job < jobs; ++job) {
        const auto turn = pool.enter();
        random = random * 1664525 + 1013904223;
        const int units = static_cast<int>((random >> 8) % (job % 1000 == 999 ? most : 40));
        for (int i = 0; i < units; ++i) runs[i].store(0, std::memory_order_relaxed);
        pool.expect(expected[job % 3]);
        pool.run(units, [&](int64_t unit, int thread) {
            if (thread < 0 || thread >= threads) std::abort();
            runs[unit].fetch_add(1, std::memory_order_relaxed);
        });
        for (int i = 0; i < units; ++i) wrong += runs[i].load(std::memory_order_relaxed) != 1;
        if (job % 5000 == 4999) usleep(3000);  // workers fall asleep
    }
    std::printf("%ld units were not run once\n", wrong);
    return wrong != 0;
}
