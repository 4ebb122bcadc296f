// Top-k and top-p as one threshold per row: the smallest logit that they keep.
//
// Sorting is not needed to know where a running sum over the sorted row first reaches a mark: sums of buckets by the
// logits' leading bits say in which one that is, then those of the bits that follow. All in integers, so the order in
// which a row is read does not matter.
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr float MASS_SCALE = 0x1p40f;  // as in sampling.py
constexpr int BITS = 11, BUCKETS = 1 << BITS;

struct Filter {  // mirrored by native.py
    const float *logits, *probs;  // [rows, width]; probs: their softmax
    const int64_t* top_k;         // [rows], 0 is off
    const float* top_p;           // [rows], 1 is off
    float* out;                   // [rows]
    int64_t rows, width, threads;
};

struct Entry {
    uint32_t key;
    int64_t mass;
};

struct Row {
    std::vector<Entry> all, some;  // its entries; room for as many
};

// Keys are ordered as the numbers are; both zeros have the same, and NaN the largest.
uint32_t key_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return UINT32_MAX;
    if (bits == 0x80000000u) bits = 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

float number_of(uint32_t key) {
    uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

int64_t mass_of(float probability) { return probability == probability ? int64_t(probability * MASS_SCALE) : 0; }

// The key at which the sum of weights, from the largest key down, first reaches `need`; the smallest key if none does.
template <class Weight>
uint32_t reach(Row& row, double need, Weight weight) {
    const Entry* entries = row.all.data();  // those that it may be among
    size_t count = row.all.size();
    int64_t before = 0;  // weights of larger keys than theirs
    for (int shift = 32 - BITS;; shift = shift > BITS ? shift - BITS : 0) {
        int64_t sums[BUCKETS] = {};
        bool any[BUCKETS] = {};
        auto bucket = [&](size_t i) { return entries[i].key >> shift & (BUCKETS - 1); };
        for (size_t i = 0; i < count; i++) {
            sums[bucket(i)] += weight(entries[i]);
            any[bucket(i)] = true;
        }
        int64_t reached = before;
        uint32_t found = 0;
        for (int b = BUCKETS - 1; b >= 0; b--) {
            if (!any[b]) continue;
            found = b;
            before = reached;
            reached += sums[b];
            if (static_cast<double>(reached) >= need) break;
        }
        size_t kept = 0;
        for (size_t i = 0; i < count; i++) {
            if (bucket(i) == found) row.some[kept++] = entries[i];
        }
        entries = row.some.data();
        count = kept;
        if (shift == 0) return entries[0].key;
    }
}

float threshold(const Filter& f, int64_t row) {
    thread_local Row entries;
    entries.all.resize(f.width);
    entries.some.resize(f.width);
    const float *x = f.logits + row * f.width, *p = f.probs + row * f.width;
    for (int64_t i = 0; i < f.width; i++) entries.all[i] = {key_of(x[i]), mass_of(p[i])};
    float found = -std::numeric_limits<float>::infinity();
    double total = MASS_SCALE;
    if (f.top_k[row] > 0) {
        double rank = static_cast<double>(f.top_k[row] < f.width ? f.top_k[row] : f.width);
        uint32_t least = reach(entries, rank, [](const Entry&) { return int64_t(1); });
        int64_t kept = 0;
        for (const Entry& e : entries.all) kept += e.key >= least ? e.mass : 0;
        total = static_cast<double>(kept);
        found = number_of(least);
    }
    if (f.top_p[row] < 1.0f) {  // a share of `total` is reached before anything that top-k drops
        double need = total * static_cast<double>(f.top_p[row]);
        found = number_of(reach(entries, need, [](const Entry& e) { return e.mass; }));
    }
    return found;
}

}  // namespace

extern "C" void dspark_filter(const Filter* task) {
    const Filter& f = *task;
#pragma omp parallel for num_threads(f.threads) schedule(dynamic)
    for (int64_t row = 0; row < f.rows; row++) f.out[row] = threshold(f, row);
}
