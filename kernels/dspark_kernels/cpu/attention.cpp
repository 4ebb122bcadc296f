// Ragged paged attention in float32: prefill, decode and verification are rows of 1..n queries over their pages.
//
// First every token's queries and keys are normed and rotated and its K/V written to its slot; then each query attends over
// the keys it may see, in order, alone: neither the other queries nor the length of the row change its sums. The tokens of
// a drafted block see each other in both directions, and nothing of them is kept.
#include "attention.h"

#include <algorithm>
#include <type_traits>
#include <utility>

using namespace dspark;

namespace {

constexpr int MAX_HEADS = 4;    // query heads of one K/V head whose sums of values are computed together
constexpr int MAX_LINES = 12;   // queries' heads whose scores are computed together: sums in registers
constexpr int64_t CHUNK = 16;   // queries per task
constexpr int64_t STRETCH = 32; // keys whose values are used up for all queries of a task before the next ones are read
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

float* at_least(std::vector<float>& scratch, size_t count) {
    if (scratch.size() < count) scratch.resize(count);
    return scratch.data();
}

// Does `what` with a count of 1 to COUNTS as a constant.
template <class Do, int... COUNTS>
void with_count(int64_t count, Do what, std::integer_sequence<int, COUNTS...>) {
    (void)((count == COUNTS + 1 && (what(std::integral_constant<int, COUNTS + 1>()), true)) || ...);
}

// Some queries of one row over the keys of one K/V head. Keys are handled in blocks of LANES at whole multiples of LANES.
// A line is one query head of one query; a query's lines are neighbours.
class Task {
public:
    Task(const Attention& a, int64_t row, int64_t kv_head, int64_t begin, int64_t end)
        : a_(a), row_(row), kv_head_(kv_head), begin_(begin), end_(end),
          before_(a.contexts[row] - a.queries[row]), per_kv_(a.heads / a.kv_heads) {}

    void run() {
        int64_t stop = high(end_ - 1);
        first_block_ = low(begin_) / LANES;
        blocks_ = (stop + LANES - 1) / LANES - first_block_;
        thread_local std::vector<float> transposed, queries, scores, scales;
        thread_local std::vector<const float*> keys, values;
        transposed_ = at_least(transposed, a_.head_dim * LANES);
        queries_ = at_least(queries, lines() * a_.head_dim);
        scores_ = at_least(scores, lines() * blocks_ * LANES);
        scales_ = at_least(scales, lines());
        find(stop, keys, values);
        keys_ = keys.data();
        values_ = values.data();
        each_tile([&](auto count, int64_t line) { gather<count.value>(line); });
        for (int64_t block = 0; block < blocks_; block++) {  // a block of keys is used up while it is at hand
            fetch(keys_, (block + AHEAD) * LANES, LANES, a_.head_dim);
            for (int64_t d = 0; d < a_.head_dim; d += LANES) transpose(keys_ + block * LANES, d, transposed_ + d * LANES);
            each_tile([&](auto count, int64_t line) { score<count.value>(line, block); });
        }
        for (int64_t query = begin_; query < end_; query++) {
            for (int64_t head = 0; head < per_kv_; head++) soften(query, head);
        }
        for (int64_t at = 0; at < blocks_ * LANES; at += STRETCH) {
            fetch(values_, at + STRETCH, STRETCH, a_.value_dim);
            for (int64_t query = begin_; query < end_; query++) attend(query, at);
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
        size_t count = blocks_ * LANES;
        if (keys.size() < count) {
            keys.resize(count);
            values.resize(count);
        }
        int64_t skipped = first_block_ * LANES, at = 0, end = stop - skipped;
        int64_t stored = a_.block ? std::min(before_ - skipped, end) : end, offset = skipped % a_.page_size;
        const int64_t* page = a_.pages + row_ * a_.max_pages + skipped / a_.page_size;
        for (; at < stored; offset = 0, page++) {
            int64_t token = *page * a_.page_size + offset, until = std::min(at + a_.page_size - offset, stored);
            for (; at < until; at++, token++) {
                keys[at] = a_.keys + (token * a_.kv_heads + kv_head_) * a_.head_dim;
                values[at] = a_.values + (token * a_.kv_heads + kv_head_) * a_.value_dim;
            }
        }
        for (; at < end; at++) {  // a block's own tokens
            int64_t token = a_.first[row_] + skipped + at - before_;
            keys[at] = a_.k + token * a_.k_stride + kv_head_ * a_.head_dim;
            values[at] = a_.v + token * a_.v_stride + kv_head_ * a_.value_dim;
        }
        for (; at < blocks_ * LANES; at++) {
            keys[at] = keys[at - 1];
            values[at] = values[at - 1];
        }
    }

    // Keys and values of a head lie in short runs far apart, which the machine does not fetch ahead by itself.
    void fetch(const float* const* rows, int64_t at, int64_t count, int64_t width) const {
        int64_t end = std::min(at + count, blocks_ * LANES);
        for (; at < end; at++) {
            for (int64_t d = 0; d < width; d += LINE) prefetch(rows[at] + d);
        }
    }

    int64_t lines() const { return (end_ - begin_) * per_kv_; }

    // All lines in tiles of nearly equal height: does (how many, the first of them).
    template <class Do>
    void each_tile(Do what) const {
        int64_t tiles = (lines() + MAX_LINES - 1) / MAX_LINES;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t line = lines() * t / tiles, count = lines() * (t + 1) / tiles - line;
            with_count(count, [&](auto constant) { what(constant, line); }, std::make_integer_sequence<int, MAX_LINES>{});
        }
    }

    // The query heads of the K/V head, MAX_HEADS at a time: does (how many, the first of them).
    template <class Do>
    void each_group(Do what) const {
        for (int64_t head = 0; head < per_kv_; head += MAX_HEADS) {
            with_count(std::min<int64_t>(per_kv_ - head, MAX_HEADS), [&](auto constant) { what(constant, head); },
                       std::make_integer_sequence<int, MAX_HEADS>{});
        }
    }

    float* scores(int64_t line) const { return scores_ + line * blocks_ * LANES; }  // [keys of all blocks]

    // Where the line's queries or results are in a tensor with so many floats per token and head.
    int64_t place(int64_t line, int64_t token_stride, int64_t width) const {
        return (a_.first[row_] + begin_ + line / per_kv_) * token_stride + (kv_head_ * per_kv_ + line % per_kv_) * width;
    }

    // Lays the queries of a tile out in the order in which `score` reads them.
    template <int LINES>
    void gather(int64_t first_line) {
        float* to = queries_ + first_line * a_.head_dim;
        for (int line = 0; line < LINES; line++) {
            const float* q = a_.q + place(first_line + line, a_.q_stride, a_.head_dim);
            for (int64_t d = 0; d < a_.head_dim; d++) to[d * LINES + line] = q[d];
        }
    }

    // Each sum is one chain over the dimensions, whatever the tile. Keys that a line must not see get scores that nobody
    // reads.
    template <int LINES>
    void score(int64_t first_line, int64_t block) {
        int64_t earliest = begin_ + first_line / per_kv_, latest = begin_ + (first_line + LINES - 1) / per_kv_;
        if (first(earliest) > block || last(latest) <= block) return;
        const float* q = queries_ + first_line * a_.head_dim;
        Vec dot[LINES];
        for (int line = 0; line < LINES; line++) dot[line] = broadcast(0.0f);
        for (int64_t d = 0; d < a_.head_dim; d++, q += LINES) {
            Vec column = load(transposed_ + d * LANES);
            for (int line = 0; line < LINES; line++) dot[line] = fma(broadcast(q[line]), column, dot[line]);
        }
        for (int line = 0; line < LINES; line++) {
            float* to = scores(first_line + line) + block * LANES;
            store(to, mul(dot[line], broadcast(a_.scale)));
            if (a_.softcap > 0.0f) {
                for (int i = 0; i < LANES; i++) to[i] = a_.softcap * std::tanh(to[i] / a_.softcap);
            }
        }
    }

    // Turns the scores of keys the query sees into probabilities before they are multiplied with `scales_`, others into 0.
    void soften(int64_t query, int64_t head) {
        float* x = scores((query - begin_) * per_kv_ + head);
        int64_t from = first(query) * LANES, to = last(query) * LANES;
        mask(x, query, NEVER);
        Vec best = broadcast(NEVER);
        for (int64_t at = from; at < to; at += LANES) best = vmax(load(x + at), best);
        Vec top = broadcast(maximum(best));
        for (int64_t at = from; at < to; at += LANES) store(x + at, exponential(sub(load(x + at), top)));
        mask(x, query, 0.0f);
        Vec total = broadcast(0.0f);
        for (int64_t at = from; at < to; at += LANES) total = add(total, load(x + at));
        scales_[(query - begin_) * per_kv_ + head] = 1.0f / sum(total);
    }

    void mask(float* x, int64_t query, float with) const {
        int64_t begin = low(query) - first_block_ * LANES, end = high(query) - first_block_ * LANES;
        for (int64_t at = first(query) * LANES; at < begin; at++) x[at] = with;
        for (int64_t at = end; at < last(query) * LANES; at++) x[at] = with;
    }

    // Adds the values of a stretch of keys to the query's results, which go on from stretch to stretch in `out`.
    void attend(int64_t query, int64_t stretch) {
        int64_t first_key = low(query) - first_block_ * LANES, last_key = high(query) - first_block_ * LANES;
        int64_t begin = std::max(first_key, stretch), end = std::min(last_key, stretch + STRETCH);
        if (begin >= end) return;
        Keys keys{begin, end, begin == first_key, end == last_key};
        each_group([&](auto heads, int64_t head) {
            int64_t line = (query - begin_) * per_kv_ + head, d = 0;
            for (; d + 4 * LANES <= a_.value_dim; d += 4 * LANES) weigh<heads.value, 4>(line, d, keys);
            for (; d < a_.value_dim; d += LANES) weigh<heads.value, 1>(line, d, keys);
        });
    }

    struct Keys {  // from `begin` to before `end`; whether they are a query's first and last
        int64_t begin, end;
        bool first, last;
    };

    // out[d..] = sum over keys, in order, of probability * value
    template <int HEADS, int WIDTH>
    void weigh(int64_t line, int64_t d, Keys keys) {
        float* out = a_.out + place(line, a_.heads * a_.value_dim, a_.value_dim) + d;
        Vec sums[HEADS][WIDTH];
        for (int head = 0; head < HEADS; head++) {
            for (int i = 0; i < WIDTH; i++) {
                sums[head][i] = keys.first ? broadcast(0.0f) : load(out + head * a_.value_dim + i * LANES);
            }
        }
        const float* weights = scores(line);
        for (int64_t at = keys.begin; at < keys.end; at++) {
            Vec columns[WIDTH];
            for (int i = 0; i < WIDTH; i++) columns[i] = load(values_[at] + d + i * LANES);
            for (int head = 0; head < HEADS; head++) {
                Vec weight = broadcast(weights[head * blocks_ * LANES + at]);
                for (int i = 0; i < WIDTH; i++) sums[head][i] = fma(weight, columns[i], sums[head][i]);
            }
        }
        for (int head = 0; head < HEADS; head++) {
            Vec scale = broadcast(scales_[line + head]);
            for (int i = 0; i < WIDTH; i++) {
                store(out + head * a_.value_dim + i * LANES, keys.last ? mul(sums[head][i], scale) : sums[head][i]);
            }
        }
    }

    const Attention& a_;
    int64_t row_, kv_head_, begin_, end_, before_, per_kv_;
    int64_t first_block_ = 0, blocks_ = 0;
    float* transposed_ = nullptr;
    float* queries_ = nullptr;
    float* scores_ = nullptr;
    float* scales_ = nullptr;
    const float* const* keys_ = nullptr;
    const float* const* values_ = nullptr;
};

}  // namespace

std::vector<int64_t> dspark::chunk_starts(const Attention& a) {
    std::vector<int64_t> starts(a.rows + 1, 0);
    for (int64_t row = 0; row < a.rows; row++) starts[row + 1] = starts[row] + (a.queries[row] + CHUNK - 1) / CHUNK;
    return starts;
}

void dspark::run_prepare(Member& member, const Attention& a) {
    member.share(a.tokens, [&](int64_t token) { prepare(a, token); });
}

void dspark::run_attention(Member& member, const Attention& a, const std::vector<int64_t>& starts) {
    run_prepare(member, a);
    member.share(starts[a.rows] * a.kv_heads, [&](int64_t index) {
        int64_t chunk = index / a.kv_heads, kv_head = index % a.kv_heads;
        int64_t row = std::upper_bound(starts.begin(), starts.end(), chunk) - starts.begin() - 1;
        int64_t begin = (chunk - starts[row]) * CHUNK, end = std::min(begin + CHUNK, a.queries[row]);
        Task(a, row, kv_head, begin, end).run();
    });
}

extern "C" void dspark_attention(const Attention* attention) {
    std::vector<int64_t> starts = chunk_starts(*attention);
    parallel(attention->threads, [&](Member& member) { run_attention(member, *attention, starts); });
}
