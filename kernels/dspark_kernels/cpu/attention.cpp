// Ragged paged attention in float32: prefill, decode and verification are rows of 1..n queries over their pages.
//
// First every token's queries and keys are normed and rotated and its K/V written to its slot; then each query attends over
// the keys it may see, in order, alone: neither the other queries nor the length of the row change its sums. The tokens of
// a drafted block see each other in both directions, and nothing of them is kept.
#include "attention.h"

#include <algorithm>

using namespace dspark;

namespace {

constexpr int MAX_HEADS = 4;    // query heads of one K/V head that are computed together
constexpr int64_t CHUNK = 16;   // queries per task
constexpr float NEVER = -INFINITY;

// Half-split rotation: x1 cos - x2 sin, x2 cos + x1 sin. head_dim / 2 need not fill vectors.
void rotate_head(float* x, const float* cosine, const float* sine, int64_t width) {
    int64_t half = width / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        Vec low = load(x + i), high = load(x + half + i);
        store(x + i, fma(high, load(sine + i), mul(low, load(cosine + i))));
        store(x + half + i, fma(low, load(sine + half + i), mul(high, load(cosine + half + i))));
    }
    for (; i < half; i++) {
        float low = x[i], high = x[half + i];
        x[i] = low * cosine[i] + high * sine[i];
        x[half + i] = high * cosine[half + i] + low * sine[half + i];
    }
}

void prepare(const Attention& a, int64_t token) {
    float* q = a.q + token * a.q_stride;
    float* k = a.k + token * a.k_stride;
    for (int64_t head = 0; head < a.heads + a.kv_heads; head++) {
        bool query = head < a.heads;
        float* x = query ? q + head * a.head_dim : k + (head - a.heads) * a.head_dim;
        const float* norm = query ? a.q_norm : a.k_norm;
        if (norm) rms_norm(x, norm, x, a.head_dim, a.eps);
        if (a.cosine) {
            int64_t at = a.positions[token] * a.table_stride;
            rotate_head(x, a.cosine + at, a.sine + at, a.head_dim);
        }
    }
    if (a.block) return;
    int64_t slot = a.slots[token];
    std::memcpy(a.keys + slot * a.kv_heads * a.head_dim, k, a.kv_heads * a.head_dim * sizeof(float));
    std::memcpy(a.values + slot * a.kv_heads * a.value_dim, a.v + token * a.v_stride,
                a.kv_heads * a.value_dim * sizeof(float));
}

// Some queries of one row over the keys of one K/V head. Keys are handled in blocks of LANES at whole multiples of LANES.
class Task {
public:
    Task(const Attention& a, int64_t row, int64_t kv_head, int64_t begin, int64_t end)
        : a_(a), row_(row), kv_head_(kv_head), begin_(begin), end_(end),
          before_(a.contexts[row] - a.queries[row]) {}

    void run() {
        int64_t stop = high(end_ - 1);
        first_block_ = low(begin_) / LANES;
        int64_t blocks = (stop + LANES - 1) / LANES - first_block_;
        thread_local std::vector<float> transposed, scores;
        thread_local std::vector<const float*> values;
        if (transposed.size() < static_cast<size_t>(blocks * a_.head_dim * LANES)) {
            transposed.resize(blocks * a_.head_dim * LANES);
        }
        if (scores.size() < static_cast<size_t>(blocks * LANES * MAX_HEADS)) scores.resize(blocks * LANES * MAX_HEADS);
        values.clear();
        for (int64_t at = first_block_ * LANES; at < stop; at++) values.push_back(value(at));
        values_ = values.data();
        transposed_ = transposed.data();
        scores_ = scores.data();
        for (int64_t block = 0; block < blocks; block++) transpose(block, stop);
        int64_t per_kv = a_.heads / a_.kv_heads;
        for (int64_t query = begin_; query < end_; query++) {
            for (int64_t head = 0; head < per_kv; head += MAX_HEADS) {
                int64_t first = kv_head_ * per_kv + head;
                switch (std::min<int64_t>(per_kv - head, MAX_HEADS)) {
                    case 1: attend<1>(query, first); break;
                    case 2: attend<2>(query, first); break;
                    case 3: attend<3>(query, first); break;
                    default: attend<4>(query, first);
                }
            }
        }
    }

private:
    int64_t low(int64_t query) const {  // first key the query sees
        int64_t position = before_ + query;
        return a_.window ? std::max<int64_t>(0, position + 1 - a_.window) : 0;
    }
    int64_t high(int64_t query) const { return a_.block ? a_.contexts[row_] : before_ + query + 1; }  // beyond the last
    int64_t slot(int64_t key) const {
        return a_.pages[row_ * a_.max_pages + key / a_.page_size] * a_.page_size + key % a_.page_size;
    }
    const float* key(int64_t at) const {
        if (a_.block && at >= before_) return a_.k + token(at) * a_.k_stride + kv_head_ * a_.head_dim;
        return a_.keys + (slot(at) * a_.kv_heads + kv_head_) * a_.head_dim;
    }
    const float* value(int64_t at) const {
        if (a_.block && at >= before_) return a_.v + token(at) * a_.v_stride + kv_head_ * a_.value_dim;
        return a_.values + (slot(at) * a_.kv_heads + kv_head_) * a_.value_dim;
    }
    int64_t token(int64_t at) const { return a_.first[row_] + at - before_; }

    // [LANES keys, head_dim] -> [head_dim, LANES keys]; keys from `stop` on repeat the last one and are masked later.
    void transpose(int64_t block, int64_t stop) {
        float* to = transposed_ + block * a_.head_dim * LANES;
        const float* from[LANES];
        for (int64_t lane = 0; lane < LANES; lane++) {
            from[lane] = key(std::min((first_block_ + block) * LANES + lane, stop - 1));
        }
        for (int64_t d = 0; d < a_.head_dim; d += LANES) dspark::transpose(from, d, to + d * LANES);
    }

    template <int HEADS>
    void attend(int64_t query, int64_t first_head) {
        int64_t begin = low(query), end = high(query);
        int64_t from = begin / LANES - first_block_, to = (end + LANES - 1) / LANES - first_block_;
        const float* q = a_.q + (a_.first[row_] + query) * a_.q_stride + first_head * a_.head_dim;
        for (int64_t block = from; block < to; block++) score<HEADS>(q, block);
        float scale[HEADS];
        for (int head = 0; head < HEADS; head++) scale[head] = 1.0f / soften(head, from, to, begin, end);
        float* out = a_.out + ((a_.first[row_] + query) * a_.heads + first_head) * a_.value_dim;
        int64_t d = 0;
        for (; d + 4 * LANES <= a_.value_dim; d += 4 * LANES) weigh<HEADS, 4>(out, d, begin, end, scale);
        for (; d < a_.value_dim; d += LANES) weigh<HEADS, 1>(out, d, begin, end, scale);
    }

    float* scores(int head, int64_t block) { return scores_ + (block * MAX_HEADS + head) * LANES; }

    template <int HEADS>
    void score(const float* q, int64_t block) {
        const float* k = transposed_ + block * a_.head_dim * LANES;
        Vec dot[HEADS];
        for (int head = 0; head < HEADS; head++) dot[head] = broadcast(0.0f);
        for (int64_t d = 0; d < a_.head_dim; d++) {
            Vec column = load(k + d * LANES);
            for (int head = 0; head < HEADS; head++) {
                dot[head] = fma(broadcast(q[head * a_.head_dim + d]), column, dot[head]);
            }
        }
        for (int head = 0; head < HEADS; head++) {
            float* to = scores(head, block);
            store(to, mul(dot[head], broadcast(a_.scale)));
            if (a_.softcap > 0.0f) {
                for (int i = 0; i < LANES; i++) to[i] = a_.softcap * std::tanh(to[i] / a_.softcap);
            }
        }
    }

    // Turns scores of blocks [from, to) into exponentials, 0 outside keys [begin, end). Returns their sum.
    float soften(int head, int64_t from, int64_t to, int64_t begin, int64_t end) {
        mask(head, from, to, begin, end, NEVER);
        Vec best = broadcast(NEVER);
        for (int64_t block = from; block < to; block++) best = vmax(load(scores(head, block)), best);
        Vec top = broadcast(maximum(best));
        for (int64_t block = from; block < to; block++) {
            store(scores(head, block), exponential(sub(load(scores(head, block)), top)));
        }
        mask(head, from, to, begin, end, 0.0f);
        Vec total = broadcast(0.0f);
        for (int64_t block = from; block < to; block++) total = add(total, load(scores(head, block)));
        return sum(total);
    }

    void mask(int head, int64_t from, int64_t to, int64_t begin, int64_t end, float with) {
        for (int64_t key = (first_block_ + from) * LANES; key < begin; key++) scores(head, from)[key % LANES] = with;
        for (int64_t key = end; key < (first_block_ + to) * LANES; key++) scores(head, to - 1)[key % LANES] = with;
    }

    // out[d..] = sum over keys, in order, of probability * value
    template <int HEADS, int WIDTH>
    void weigh(float* out, int64_t d, int64_t begin, int64_t end, const float* scale) {
        Vec sums[HEADS][WIDTH];
        for (int head = 0; head < HEADS; head++) {
            for (int i = 0; i < WIDTH; i++) sums[head][i] = broadcast(0.0f);
        }
        for (int64_t at = begin; at < end; at++) {
            const float* v = values_[at - first_block_ * LANES] + d;
            Vec columns[WIDTH];
            for (int i = 0; i < WIDTH; i++) columns[i] = load(v + i * LANES);
            for (int head = 0; head < HEADS; head++) {
                Vec weight = broadcast(scores(head, at / LANES - first_block_)[at % LANES]);
                for (int i = 0; i < WIDTH; i++) sums[head][i] = fma(weight, columns[i], sums[head][i]);
            }
        }
        for (int head = 0; head < HEADS; head++) {
            for (int i = 0; i < WIDTH; i++) {
                store(out + head * a_.value_dim + d + i * LANES, mul(sums[head][i], broadcast(scale[head])));
            }
        }
    }

    const Attention& a_;
    int64_t row_, kv_head_, begin_, end_, before_;
    int64_t first_block_ = 0;
    float* transposed_ = nullptr;
    float* scores_ = nullptr;
    const float** values_ = nullptr;
};

}  // namespace

std::vector<int64_t> dspark::chunk_starts(const Attention& a) {
    std::vector<int64_t> starts(a.rows + 1, 0);
    for (int64_t row = 0; row < a.rows; row++) starts[row + 1] = starts[row] + (a.queries[row] + CHUNK - 1) / CHUNK;
    return starts;
}

void dspark::run_prepare(const Attention& a) {
#pragma omp for
    for (int64_t token = 0; token < a.tokens; token++) prepare(a, token);
}

void dspark::run_attention(const Attention& a, const std::vector<int64_t>& starts) {
    run_prepare(a);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < starts[a.rows] * a.kv_heads; index++) {
        int64_t chunk = index / a.kv_heads, kv_head = index % a.kv_heads;
        int64_t row = std::upper_bound(starts.begin(), starts.end(), chunk) - starts.begin() - 1;
        int64_t begin = (chunk - starts[row]) * CHUNK, end = std::min(begin + CHUNK, a.queries[row]);
        Task(a, row, kv_head, begin, end).run();
    }
}

extern "C" void dspark_attention(const Attention* attention) {
    std::vector<int64_t> starts = chunk_starts(*attention);
#pragma omp parallel num_threads(attention->threads)
    run_attention(*attention, starts);
}
