// Index of the largest entry of each row: the lowest on ties, the first NaN if there is one.
#include "simd.h"

using namespace dspark;

namespace {

constexpr int64_t BLOCK = 32 * LANES;

bool has_nan(const float* x, int64_t count) {
    int found = 0;
    for (int64_t i = 0; i < count; i++) found |= x[i] != x[i];
    return found;
}

float largest(const float* x, int64_t count) {
    float best = -INFINITY;
    int64_t i = 0;
    if (count >= LANES) {
        Vec all = load(x);
        for (i = LANES; i + LANES <= count; i += LANES) all = vmax(load(x + i), all);
        best = maximum(all);
    }
    for (; i < count; i++) best = x[i] > best ? x[i] : best;
    return best;
}

int64_t argmax(const float* x, int64_t count) {
    int64_t best_block = 0;
    float best = -INFINITY;
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t size = start + BLOCK < count ? BLOCK : count - start;
        if (has_nan(x + start, size)) {
            while (x[start] == x[start]) start++;
            return start;
        }
        float top = largest(x + start, size);
        if (top > best) {
            best = top;
            best_block = start;
        }
    }
    while (x[best_block] != best) best_block++;  // found at once where every entry is -infinity
    return best_block;
}

}  // namespace

extern "C" void dspark_argmax(const float* x, int64_t* out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) out[row] = argmax(x + row * width, width);
}
