// How the threads of a parallel region share out a loop.
//
// OpenMP's dynamic schedule sets up every loop under a lock and counts its parts in one place: with loops of 20
// microseconds, and cores that are far from each other, a tenth of the time. Its static one waits for the slowest, and
// on a busy machine there is always one. Here each thread goes through a share of its own, counting where nobody else
// writes, and then takes over what others have not begun.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dspark {

class Team {  // of one parallel region
public:
    explicit Team(int64_t threads) : cursors_(threads > 0 ? threads : 1) {}

    // The next part of a thread's share [first, stop) of the region's n-th loop, `stop` if there is none left.
    int64_t take(int64_t thread, uint64_t loop, int64_t first, int64_t stop) {
        std::atomic<uint64_t>& at = cursors_[thread].at;
        uint64_t seen = at.load(std::memory_order_relaxed);
        while (true) {
            int64_t next = seen >> 32 == loop ? static_cast<int64_t>(seen & UINT32_MAX) : first;
            if (next >= stop) return stop;
            if (at.compare_exchange_weak(seen, loop << 32 | (next + 1), std::memory_order_relaxed)) return next;
        }
    }

private:
    struct alignas(64) Cursor {  // a cache line each
        std::atomic<uint64_t> at{0};  // number of the loop, next part of it
    };
    std::vector<Cursor> cursors_;
};

// One thread of a region. All go through the same loops in the same order.
class Member {
public:
    explicit Member(Team& team) : team_(team) {
#ifdef _OPENMP
        index_ = omp_get_thread_num();
        size_ = omp_get_num_threads();
#endif
    }

    int64_t index() const { return index_; }
    int64_t size() const { return size_; }

    // what(part) for parts 0..parts - 1 (fewer than 2^32), each by one thread; ends with a barrier.
    template <class Do>
    void share(int64_t parts, Do what) {
        loop_++;
        for (int64_t k = 0; k < size_; k++) {
            int64_t owner = (index_ + k) % size_, first = parts * owner / size_, stop = parts * (owner + 1) / size_;
            for (int64_t part; (part = team_.take(owner, loop_, first, stop)) < stop;) what(part);
        }
        wait();
    }

    // For all others to get here.
    void wait() {
#pragma omp barrier
    }

private:
    Team& team_;
    int64_t index_ = 0, size_ = 1;
    uint64_t loop_ = 0;
};

// A parallel region: `what` with every member of a team of so many threads.
template <class Do>
void parallel(int64_t threads, Do what) {
    Team team(threads);
#pragma omp parallel num_threads(threads)
    {
        Member member(team);
        what(member);
    }
}

}  // namespace dspark
