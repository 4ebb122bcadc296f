// A core for each of the threads that compute together.
#include <cstdint>

#ifdef __linux__
#include <omp.h>
#include <sched.h>
#endif

// Binds the calling thread and the others of its team to one of `cpus` [count] each. Returns how many were bound.
extern "C" int64_t dspark_bind(const int64_t* cpus, int64_t count) {
    int64_t bound = 0;
#ifdef __linux__
#pragma omp parallel num_threads(count) reduction(+ : bound)
    {
        int64_t thread = omp_get_thread_num();
        cpu_set_t one;
        CPU_ZERO(&one);
        if (thread < count && cpus[thread] < CPU_SETSIZE) {
            CPU_SET(cpus[thread], &one);
            bound += sched_setaffinity(0, sizeof one, &one) == 0;
        }
    }
#endif
    return bound;
}
