// Tokens from rows of logits: the likeliest, or the one that wins once addressed Gumbel noise is added.
//
// Philox4x32-10 and the logarithm are those of noise.py, bit for bit: single IEEE operations, nothing fused. The loops
// over arrays of fixed size are there for the compiler to turn into vectors.
#include "draw.h"

using namespace dspark;

namespace {

constexpr int BLOCK = 64;  // columns looked at together
constexpr int GROUPS = BLOCK / 4;  // a Philox call serves four neighbouring tokens
constexpr float GUMBEL_MAX = 16.63553237915039f;  // no noise is larger

bool has_nan(const float* x, int64_t count) {
    int found = 0;
    for (int64_t i = 0; i < count; i++) found |= x[i] != x[i];
    return found;
}

// The first of the largest entries; the first NaN, and `nan` set, if there is one.
int64_t argmax(const float* x, int64_t count, bool& nan) {
    constexpr int64_t STEP = 8 * BLOCK;
    int64_t best_start = 0;
    float best = -INFINITY;
    nan = false;
    for (int64_t start = 0; start < count; start += STEP) {
        int64_t size = start + STEP < count ? STEP : count - start;
        if (has_nan(x + start, size)) {
            while (x[start] == x[start]) start++;
            nan = true;
            return start;
        }
        float top = largest(x + start, size);
        if (top > best) {
            best = top;
            best_start = start;
        }
    }
    while (x[best_start] != best) best_start++;  // found at once where every entry is -infinity
    return best_start;
}

struct Address {
    uint32_t key[2], position, stream;
};

// Philox4x32-10 at N counters; word w of call i goes to out[w][i].
template <int N>
void philox(const uint32_t* groups, const Address& at, uint32_t out[4][N]) {
    uint32_t *c0 = out[0], *c1 = out[1], *c2 = out[2], *c3 = out[3];
    for (int i = 0; i < N; i++) {
        c0[i] = groups[i];
        c1[i] = at.position;
        c2[i] = at.stream;
        c3[i] = 0;
    }
    uint32_t k0 = at.key[0], k1 = at.key[1];
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        for (int i = 0; i < N; i++) {
            uint64_t a = uint64_t(c0[i]) * 0xD2511F53u, b = uint64_t(c2[i]) * 0xCD9E8D57u;
            c0[i] = uint32_t(b >> 32) ^ c1[i] ^ k0;
            c2[i] = uint32_t(a >> 32) ^ c3[i] ^ k1;
            c1[i] = uint32_t(b);
            c3[i] = uint32_t(a);
        }
    }
}

// Cephes logf for normal positive numbers, as noise.log_np.
inline float logarithm(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    int32_t shifted = bits - 0x3F3504F3, mantissa = (shifted & 0x007FFFFF) + 0x3F3504F3;
    float exponent = static_cast<float>(shifted >> 23), f;
    std::memcpy(&f, &mantissa, 4);
    f -= 1.0f;
    float y = f * 7.0376836292e-2f + -1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f + -1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f + -1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f + -2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    float square = f * f;
    y = f * square * y;
    y = y + exponent * -2.12194440e-4f;
    y = y - 0.5f * square;
    return (f + y) + exponent * 0.693359375f;
}

// Random words to standard Gumbel noise, in place of 64 floats.
inline void gumbel(const uint32_t* words, float* out) {
    for (int i = 0; i < BLOCK; i++) {
        float uniform = (static_cast<float>(int32_t(words[i] >> 9)) + 0.5f) * 0x1p-23f;
        out[i] = -logarithm(-logarithm(uniform));
    }
}

void noise_of_run(int64_t first, const Address& at, float* out) {  // of tokens first..first + 63, first a multiple of 4
    uint32_t groups[GROUPS], words[4][GROUPS], ordered[BLOCK];
    for (int i = 0; i < GROUPS; i++) groups[i] = static_cast<uint32_t>(first >> 2) + i;
    philox<GROUPS>(groups, at, words);
    for (int i = 0; i < GROUPS; i++) {
        for (int lane = 0; lane < 4; lane++) ordered[4 * i + lane] = words[lane][i];
    }
    gumbel(ordered, out);
}

void noise_of(const int64_t* tokens, int count, const Address& at, float* out) {
    uint32_t groups[BLOCK] = {}, words[4][BLOCK], chosen[BLOCK] = {};
    for (int i = 0; i < count; i++) groups[i] = static_cast<uint32_t>(tokens[i] >> 2);
    philox<BLOCK>(groups, at, words);
    for (int i = 0; i < count; i++) chosen[i] = words[tokens[i] & 3][i];
    gumbel(chosen, out);
}

struct Best {
    float score;
    int64_t token;
};

// One block of a row: scores and the best so far. A block whose largest logit loses even with the largest noise is left
// out; division and addition round monotonically, so that is never wrong.
void contest(const float* x, int size, float temperature, const int64_t* ids, int64_t first, const Address& at,
             Best& best) {
    if (largest(x, size) / temperature + GUMBEL_MAX < best.score) return;
    float noise[BLOCK], score[BLOCK];
    if (ids) noise_of(ids, size, at, noise);
    else noise_of_run(first, at, noise);
    for (int i = 0; i < size; i++) score[i] = x[i] / temperature + noise[i];
    float top = largest(score, size);
    if (top < best.score) return;
    for (int i = 0; i < size; i++) {
        int64_t token = ids ? ids[i] : first + i;
        if (score[i] == top && (top > best.score || token < best.token)) best = {top, token};
    }
}

}  // namespace

int64_t dspark::draw_row(const Draw& d, int64_t row, int64_t later) {
    const float* x = d.logits + row * d.stride;
    const int64_t* ids = d.ids ? d.ids + row * d.ids_stride : nullptr;
    bool nan;
    int64_t column = argmax(x, d.width, nan);
    Best best{-INFINITY, ids ? ids[column] : column};
    if (nan || !(d.temperature[row] > d.greedy)) return best.token;
    uint64_t seed = static_cast<uint64_t>(d.seed[row]);
    Address at{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
               static_cast<uint32_t>(d.position[row] + later),
               static_cast<uint32_t>(d.stream)};
    auto block = [&](int64_t start) {
        int size = static_cast<int>(start + BLOCK < d.width ? BLOCK : d.width - start);
        contest(x + start, size, d.temperature[row], ids ? ids + start : nullptr, start, at, best);
    };
    block(column / BLOCK * BLOCK);  // where a high score is likely, which rules out others
    for (int64_t start = 0; start < d.width; start += BLOCK) block(start);
    return best.token;
}

extern "C" {

void dspark_argmax(const float* x, int64_t* out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        bool nan;
        out[row] = argmax(x + row * width, width, nan);
    }
}

void dspark_draw(const Draw* task) {
    const Draw& d = *task;
#pragma omp parallel for num_threads(d.threads) schedule(dynamic)
    for (int64_t row = 0; row < d.rows; row++) d.out[row] = draw_row(d, row);
}
}
