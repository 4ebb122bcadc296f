// Ragged paged attention in float32: prefill, decode and verification are rows of 1..n queries over their pages.
//
// First every token's queries and keys are normed and rotated and its K/V written to its slot; then each query attends over
// the keys it may see, in order, alone: neither the other queries nor the length of the row change its sums. The tokens of
// a drafted block see each other in both directions, and nothing of them is kept.
#include "attention.h"

#include <algorithm>
#include <type_traits>

using namespace dspark;

namespace {

constexpr int MAX_HEADS = 4;    // query heads of one K/V head that are computed together
constexpr int64_t CHUNK = 16;   // queries per task
constexpr int64_t AHEAD = 2;    // blocks of keys that are asked for before they are used
constexpr int64_t LINE = 16;    // floats of a cache line
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
        int64_t stop = high(end_ - 1), per_kv = a_.heads / a_.kv_heads;
        first_block_ = low(begin_) / LANES;
        blocks_ = (stop + LANES - 1) / LANES - first_block_;
        thread_local std::vector<float> transposed, scores;
        thread_local std::vector<const float*> keys, values;
        size_t columns = a_.head_dim * LANES, all = (end_ - begin_) * per_kv * blocks_ * LANES;
        if (transposed.size() < columns) transposed.resize(columns);
        if (scores.size() < all) scores.resize(all);
        find(stop, keys, values);
        keys_ = keys.data();
        values_ = values.data();
        transposed_ = transposed.data();
        scores_ = scores.data();
        for (int64_t block = 0; block < blocks_; block++) {  // a block of keys is used up while it is at hand
            fetch(keys_, (block + AHEAD) * LANES, LANES, a_.head_dim);
            for (int64_t d = 0; d < a_.head_dim; d += LANES) transpose(keys_ + block * LANES, d, transposed_ + d * LANES);
            for (int64_t query = begin_; query < end_; query++) {
                if (block < first(query) || block >= last(query)) continue;
                each_group([&](auto heads, int64_t head) { score<heads.value>(query, head, block); });
            }
        }
        for (int64_t query = begin_; query < end_; query++) {
            each_group([&](auto heads, int64_t head) { attend<heads.value>(query, head); });
        }
    }

private:
    int64_t low(int64_t query) const {  // first key the query sees
        int64_t position = before_ + query;
        return a_.window ? std::max<int64_t>(0, position + 1 - a_.window) : 0;
    }
    int64_t first(int64_t query) const { return low(query) / LANES - first_block_; }  // block with keys it sees
    int64_t last(int64_t query) const { return (high(query) + LANES - 1) / LANES - first_block_; }  // beyond
    int64_t high(int64_t query) const { return a_.block ? a_.contexts[row_] : before_ + query + 1; }  // beyond the last

    // Where the keys and values from the first block on lie, the last one repeated until its block is full. Pages are
    // walked along: a division per key would take longer than all else that is done for it.
    void find(int64_t stop, std::vector<const float*>& keys, std::vector<const float*>& values) const {
        keys.clear();
        values.clear();
        int64_t at = first_block_ * LANES, stored = a_.block ? std::min(before_, stop) : stop;
        const int64_t* page = a_.pages + row_ * a_.max_pages + at / a_.page_size;
        for (int64_t offset = at % a_.page_size; at < stored; offset = 0, page++) {
            int64_t slot = *page * a_.page_size + offset, count = std::min(a_.page_size - offset, stored - at);
            const float* k = a_.keys + (slot * a_.kv_heads + kv_head_) * a_.head_dim;
            const float* v = a_.values + (slot * a_.kv_heads + kv_head_) * a_.value_dim;
            for (int64_t i = 0; i < count; i++) {
                keys.push_back(k + i * a_.kv_heads * a_.head_dim);
                values.push_back(v + i * a_.kv_heads * a_.value_dim);
            }
            at += count;
        }
        for (; at < stop; at++) {  // a block's own tokens
            int64_t token = a_.first[row_] + at - before_;
            keys.push_back(a_.k + token * a_.k_stride + kv_head_ * a_.head_dim);
            values.push_back(a_.v + token * a_.v_stride + kv_head_ * a_.value_dim);
        }
        for (; at % LANES; at++) {
            keys.push_back(keys.back());
            values.push_back(values.back());
        }
    }

    // Keys and values of a head lie in short runs far apart, which the machine does not fetch ahead by itself.
    void fetch(const float* const* rows, int64_t at, int64_t count, int64_t width) const {
        int64_t end = std::min(at + count, blocks_ * LANES);
        for (; at < end; at++) {
            for (int64_t d = 0; d < width; d += LINE) prefetch(rows[at] + d);
        }
    }

    // The query heads of the K/V head, MAX_HEADS at a time: does (how many, the first of them).
    template <class Do>
    void each_group(Do what) const {
        int64_t per_kv = a_.heads / a_.kv_heads;
        for (int64_t head = 0; head < per_kv; head += MAX_HEADS) {
            switch (std::min<int64_t>(per_kv - head, MAX_HEADS)) {
                case 1: what(std::integral_constant<int, 1>(), head); break;
                case 2: what(std::integral_constant<int, 2>(), head); break;
                case 3: what(std::integral_constant<int, 3>(), head); break;
                default: what(std::integral_constant<int, 4>(), head);
            }
        }
    }

    float* scores(int64_t query, int64_t head) const {  // [keys of all blocks]
        return scores_ + ((query - begin_) * (a_.heads / a_.kv_heads) + head) * blocks_ * LANES;
    }

    template <int HEADS>
    void score(int64_t query, int64_t first_head, int64_t block) {
        const float* q = a_.q + (a_.first[row_] + query) * a_.q_stride
                         + (kv_head_ * (a_.heads / a_.kv_heads) + first_head) * a_.head_dim;
        Vec dot[HEADS];
        for (int head = 0; head < HEADS; head++) dot[head] = broadcast(0.0f);
        for (int64_t d = 0; d < a_.head_dim; d++) {
            Vec column = load(transposed_ + d * LANES);
            for (int head = 0; head < HEADS; head++) {
                dot[head] = fma(broadcast(q[head * a_.head_dim + d]), column, dot[head]);
            }
        }
        for (int head = 0; head < HEADS; head++) {
            float* to = scores(query, first_head + head) + block * LANES;
            store(to, mul(dot[head], broadcast(a_.scale)));
            if (a_.softcap > 0.0f) {
                for (int i = 0; i < LANES; i++) to[i] = a_.softcap * std::tanh(to[i] / a_.softcap);
            }
        }
    }

    template <int HEADS>
    void attend(int64_t query, int64_t first_head) {
        float scale[HEADS];
        for (int head = 0; head < HEADS; head++) scale[head] = 1.0f / soften(query, first_head + head);
        int64_t at = (a_.first[row_] + query) * a_.heads + kv_head_ * (a_.heads / a_.kv_heads) + first_head;
        float* out = a_.out + at * a_.value_dim;
        const float* weights = scores(query, first_head);
        int64_t d = 0;
        for (; d + 4 * LANES <= a_.value_dim; d += 4 * LANES) weigh<HEADS, 4>(query, weights, out, d, scale);
        for (; d < a_.value_dim; d += LANES) weigh<HEADS, 1>(query, weights, out, d, scale);
    }

    // Turns the scores of keys the query sees into exponentials, others in its blocks into 0. Returns their sum.
    float soften(int64_t query, int64_t head) {
        float* x = scores(query, head);
        int64_t from = first(query) * LANES, to = last(query) * LANES;
        mask(x, query, NEVER);
        Vec best = broadcast(NEVER);
        for (int64_t at = from; at < to; at += LANES) best = vmax(load(x + at), best);
        Vec top = broadcast(maximum(best));
        for (int64_t at = from; at < to; at += LANES) store(x + at, exponential(sub(load(x + at), top)));
        mask(x, query, 0.0f);
        Vec total = broadcast(0.0f);
        for (int64_t at = from; at < to; at += LANES) total = add(total, load(x + at));
        return sum(total);
    }

    void mask(float* x, int64_t query, float with) const {
        int64_t begin = low(query) - first_block_ * LANES, end = high(query) - first_block_ * LANES;
        for (int64_t at = first(query) * LANES; at < begin; at++) x[at] = with;
        for (int64_t at = end; at < last(query) * LANES; at++) x[at] = with;
    }

    // out[d..] = sum over keys, in order, of probability * value; weights [heads, keys of all blocks]
    template <int HEADS, int WIDTH>
    void weigh(int64_t query, const float* weights, float* out, int64_t d, const float* scale) {
        Vec sums[HEADS][WIDTH];
        for (int head = 0; head < HEADS; head++) {
            for (int i = 0; i < WIDTH; i++) sums[head][i] = broadcast(0.0f);
        }
        int64_t begin = low(query) - first_block_ * LANES, end = high(query) - first_block_ * LANES;
        for (int64_t at = begin; at < end; at++) {
            if (d == 0) fetch(values_, at + AHEAD * LANES, 1, a_.value_dim);
            Vec columns[WIDTH];
            for (int i = 0; i < WIDTH; i++) columns[i] = load(values_[at] + d + i * LANES);
            for (int head = 0; head < HEADS; head++) {
                Vec weight = broadcast(weights[head * blocks_ * LANES + at]);
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
    int64_t first_block_ = 0, blocks_ = 0;
    float* transposed_ = nullptr;
    float* scores_ = nullptr;
    const float* const* keys_ = nullptr;
    const float* const* values_ = nullptr;
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
