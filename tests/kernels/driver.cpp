// The kernels' C interface without Python, for machines that are emulated: fixed inputs, one line per case with the bits of
// the results and their largest error against plain arithmetic in double.
#include "attention.h"
#include "draw.h"
#include "product.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

using namespace dspark;

extern "C" {
struct Source {  // as in pack.cpp
    const void* values;
    const void *scales, *minima;
    int64_t storage, group, outputs, inputs, gated;
};
const char* dspark_isa();
int64_t dspark_packed_size(const Source*);
void dspark_pack(const Source*, char*);
void dspark_products(const Product*, int64_t, int64_t);
void dspark_attention(const Attention*);
void dspark_argmax(const float*, int64_t*, int64_t, int64_t, int64_t);
void dspark_draw(const Draw*);
struct Filter {  // as in filter.cpp
    const float *logits, *probs;
    const int64_t* top_k;
    const float* top_p;
    float* out;
    int64_t rows, width, threads;
};
void dspark_filter(const Filter*);
}

namespace {

struct Random {  // xorshift64*
    uint64_t state = 88172645463325252u;
    uint32_t word() {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return static_cast<uint32_t>(state * 2685821657736338717u >> 32);
    }
    float number() { return static_cast<float>(static_cast<int32_t>(word() >> 8) - (1 << 23)) * 0x1p-22f; }  // [-2, 2)
    std::vector<float> numbers(int64_t count) {
        std::vector<float> all(count);
        for (float& x : all) x = number();
        return all;
    }
};

template <class T>
uint64_t bits_of(const std::vector<T>& x, uint64_t hash = 14695981039346656037u) {  // FNV-1a
    const auto* bytes = reinterpret_cast<const unsigned char*>(x.data());
    for (size_t i = 0; i < x.size() * sizeof(T); i++) hash = (hash ^ bytes[i]) * 1099511628211u;
    return hash;
}

void tell(const char* name, int64_t number, uint64_t bits, double error) {
    std::printf("%s-%" PRId64 " %016" PRIx64 " %.3g\n", name, number, bits, error);
}

struct Weight {  // of every storage: what it holds, what that stands for
    int64_t outputs, inputs, storage, group;
    bool gated;
    std::vector<uint16_t> halves;
    std::vector<uint8_t> codes;
    std::vector<float> floats, scales, minima;
    std::vector<char> packed;
};

double half_value(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return h & 0x8000 ? -size : size;
}

Weight weight_of(Random& random, int64_t storage, bool gated, int64_t outputs, int64_t inputs) {
    Weight w{outputs, inputs, storage, inputs, gated, {}, {}, {}, {}, {}, {}};
    int64_t count = outputs * inputs;
    w.floats = random.numbers(count);
    const void* values = w.floats.data();
    if (storage == BFLOAT16 || storage == FLOAT16) {
        for (int64_t i = 0; i < count; i++) {
            uint32_t word = random.word();  // float16: all exponents below 2^2, denormals among them
            uint16_t half = static_cast<uint16_t>(storage == FLOAT16 ? (word & 0x83ff) | word % 17 << 10 : 0);
            if (storage == BFLOAT16) {
                std::memcpy(&word, &w.floats[i], 4);
                half = static_cast<uint16_t>(word >> 16);
                word = static_cast<uint32_t>(half) << 16;
                std::memcpy(&w.floats[i], &word, 4);
            } else {
                w.floats[i] = static_cast<float>(half_value(half));
            }
            w.halves.push_back(half);
        }
        values = w.halves.data();
    } else if (storage != FLOAT32) {
        bool eight = storage == CODES8 || storage == HALF_CODES8;
        w.group = 32;
        w.scales.resize(count / 32), w.minima.resize(count / 32);
        for (float& x : w.scales) x = static_cast<float>(random.word() % 64) * 0x1p-10f;
        for (float& x : w.minima) x = static_cast<float>(random.word() % 64) * -0x1p-7f;
        if (storage >= HALF_CODES4) {  // float16 below 2^-6, denormals among them
            for (auto* numbers : {&w.scales, &w.minima}) {
                for (float& x : *numbers) {
                    w.halves.push_back(static_cast<uint16_t>(random.word() & 0x23ff));
                    x = static_cast<float>(half_value(w.halves.back()));
                }
            }
        }
        for (int64_t i = 0; i < count; i++) {
            int code = static_cast<int>(random.word() & (eight ? 255 : 15));
            if (eight) w.codes.push_back(static_cast<uint8_t>(code));
            else if (i % 2) w.codes.back() = static_cast<uint8_t>(w.codes.back() | code << 4);
            else w.codes.push_back(static_cast<uint8_t>(code));
            if (eight && code > 127) code -= 256;
            w.floats[i] = static_cast<float>(code) * w.scales[i / 32] + w.minima[i / 32];
        }
        values = w.codes.data();
    }
    const void *scales = w.scales.data(), *minima = w.minima.data();
    if (storage >= HALF_CODES4) scales = w.halves.data(), minima = w.halves.data() + count / w.group;
    Source source{values, scales, minima, storage, w.group, outputs, inputs, gated};
    w.packed.resize(dspark_packed_size(&source));
    dspark_pack(&source, w.packed.data());
    return w;
}

void products(bool with_norm) {
    Random random;
    constexpr int64_t outputs = 70, inputs = 96, most = 90;
    std::vector<float> x = random.numbers(most * inputs), norm = random.numbers(inputs), bias = random.numbers(outputs);
    std::vector<float> residual = random.numbers(most * outputs), scratch(most * inputs);
    std::vector<double> normed(x.begin(), x.end());
    for (int64_t row = 0; with_norm && row < most; row++) {
        double squares = 0;
        for (int64_t i = 0; i < inputs; i++) squares += normed[row * inputs + i] * normed[row * inputs + i];
        for (int64_t i = 0; i < inputs; i++) normed[row * inputs + i] *= norm[i] / std::sqrt(squares / inputs + 1e-5f);
    }
    for (int64_t storage = FLOAT32; storage <= HALF_CODES8; storage++) {
        for (int64_t gated = 0; gated < 2; gated++) {
            Weight w = weight_of(random, storage, gated, outputs, inputs);
            int64_t wide = gated ? outputs / 2 : outputs;
            uint64_t bits = 0;
            double error = 0;
            for (int64_t rows : {1, 2, 5, 6, 7, 15, 90}) {
                std::vector<float> y(rows * wide);
                Product p{x.data(), with_norm ? norm.data() : nullptr, w.packed.data(), bias.data(), residual.data(), y.data(),
                          scratch.data(), storage, w.group, rows, inputs, wide, inputs, gated ? SWIGLU : RESIDUAL, 1e-5f};
                dspark_products(&p, 1, 2);
                bits = bits_of(y, bits ^ 14695981039346656037u);
                for (int64_t i = 0; i < rows * wide; i++) {
                    int64_t row = i / wide, column = i % wide;
                    auto sum = [&](int64_t output) {
                        double all = bias[output];
                        for (int64_t j = 0; j < inputs; j++) all += normed[row * inputs + j] * w.floats[output * inputs + j];
                        return all;
                    };
                    double gate = sum(column), want = gate + residual[i];
                    if (gated) want = gate / (1 + std::exp(-gate)) * sum(wide + column);
                    error = std::max(error, std::abs(y[i] - want) / (1 + std::abs(want)));
                }
            }
            tell(with_norm ? "normed" : "product", 2 * storage + gated, bits, error);
        }
    }
}

constexpr int64_t HEADS = 6, KV_HEADS = 2, DIM = 32, PAGE = 5, POSITIONS = 64;

void attention(int64_t window, bool block) {
    Random random;
    constexpr int64_t width = HEADS + 2 * KV_HEADS;
    std::vector<int64_t> queries = {1, 3, 17}, contexts = {33, 40, 17}, first, slots, positions, pages(3 * 8);
    for (int64_t i = 0; i < 24; i++) pages[i] = (i * 7 + 3) % 24;
    int64_t tokens = 0;
    for (int64_t row = 0; row < 3; row++) {
        first.push_back(tokens);
        tokens += queries[row];
        for (int64_t at = contexts[row] - queries[row]; at < contexts[row]; at++) {
            positions.push_back(at);
            slots.push_back(pages[row * 8 + at / PAGE] * PAGE + at % PAGE);
        }
    }
    std::vector<float> qkv = random.numbers(tokens * width * DIM), table = random.numbers(POSITIONS * 2 * DIM);
    std::vector<float> keys = random.numbers(24 * PAGE * KV_HEADS * DIM), values = random.numbers(24 * PAGE * KV_HEADS * DIM);
    std::vector<float> norm = random.numbers(DIM), out(tokens * HEADS * DIM);
    std::vector<double> told(qkv.begin(), qkv.end());  // queries and keys normed and turned, then values
    for (int64_t i = 0; i < tokens * width; i++) {
        if (i % width >= HEADS + KV_HEADS) continue;
        double *x = &told[i * DIM], squares = 0;
        for (int64_t d = 0; d < DIM; d++) squares += x[d] * x[d];
        for (int64_t d = 0; d < DIM; d++) x[d] *= norm[d] / std::sqrt(squares / DIM + 1e-5f);
        const float *cosine = &table[positions[i / width] * 2 * DIM], *sine = cosine + DIM;
        for (int64_t d = 0; d < DIM / 2; d++) {
            double low = x[d], high = x[d + DIM / 2];
            x[d] = low * cosine[d] + high * sine[d];
            x[d + DIM / 2] = high * cosine[d + DIM / 2] + low * sine[d + DIM / 2];
        }
    }
    Attention a{};
    a.q = qkv.data(), a.k = a.q + HEADS * DIM, a.v = a.k + KV_HEADS * DIM;
    a.q_stride = a.k_stride = a.v_stride = width * DIM;
    a.q_norm = a.k_norm = norm.data();
    a.cosine = table.data(), a.sine = a.cosine + DIM, a.table_stride = 2 * DIM;
    a.positions = positions.data(), a.slots = slots.data(), a.pages = pages.data();
    a.first = first.data(), a.queries = queries.data(), a.contexts = contexts.data();
    a.keys = keys.data(), a.values = values.data(), a.out = out.data();
    a.tokens = tokens, a.rows = 3, a.max_pages = 8, a.page_size = PAGE;
    a.heads = HEADS, a.kv_heads = KV_HEADS, a.head_dim = a.value_dim = DIM;
    a.window = window, a.block = block, a.threads = 2, a.scale = 0.2f, a.eps = 1e-5f;
    dspark_attention(&a);
    double error = 0;
    for (int64_t row = 0; row < 3; row++) {
        int64_t before = contexts[row] - queries[row];
        for (int64_t i = 0; i < queries[row] * HEADS; i++) {
            int64_t token = first[row] + i / HEADS, head = i % HEADS, kv = head / (HEADS / KV_HEADS), own = before + i / HEADS;
            std::vector<double> want(DIM, 0.0);
            double total = 0;
            for (int64_t at = 0; at < (block ? contexts[row] : own + 1); at++) {
                if (window && at + window <= own) continue;
                int64_t stored = ((pages[row * 8 + at / PAGE] * PAGE + at % PAGE) * KV_HEADS + kv) * DIM;
                int64_t fresh = ((first[row] + at - before) * width + HEADS + kv) * DIM;
                double score = 0;
                for (int64_t d = 0; d < DIM; d++) {
                    score += told[(token * width + head) * DIM + d] * (at < before ? keys[stored + d] : told[fresh + d]);
                }
                double weight = std::exp(score * 0.2f);
                total += weight;
                for (int64_t d = 0; d < DIM; d++) {
                    want[d] += weight * (at < before ? values[stored + d] : told[fresh + KV_HEADS * DIM + d]);
                }
            }
            for (int64_t d = 0; d < DIM; d++) {
                error = std::max(error, std::abs(out[(token * HEADS + head) * DIM + d] - want[d] / total));
            }
        }
    }
    tell("attention", 2 * window + block, bits_of(values, bits_of(keys, bits_of(out))), error);
}

void draws() {
    Random random;
    constexpr int64_t rows = 40;
    for (int64_t width : {1, 63, 64, 1003}) {
        std::vector<float> logits = random.numbers(rows * width), temperature = random.numbers(rows);
        std::vector<int64_t> seed, position, best(rows), drawn(rows);
        for (int64_t row = 0; row < rows; row++) {
            temperature[row] += 1.5f;  // some of them negative: greedy
            seed.push_back(static_cast<int64_t>(random.word()) << 31 ^ random.word());
            position.push_back(random.word() >> 1);
        }
        dspark_argmax(logits.data(), best.data(), rows, width, 2);
        Draw d{logits.data(), temperature.data(), nullptr, seed.data(), position.data(), drawn.data(), rows, width, width, 0,
               1, 2, 1e-5f};
        dspark_draw(&d);
        double wrong = 0;
        for (int64_t row = 0; row < rows; row++) {
            const float* x = &logits[row * width];
            int64_t want = 0;
            for (int64_t i = 1; i < width; i++) want = x[i] > x[want] ? i : want;
            wrong += best[row] != want || (temperature[row] <= 1e-5f && drawn[row] != want);
        }
        tell("draw", width, bits_of(drawn, bits_of(best)), wrong);
    }
}

// Thresholds of top-k, then top-p, against what sorting says; probabilities are exact multiples of the masses.
void filters() {
    Random random;
    constexpr int64_t rows = 12;
    for (int64_t width : {1, 64, 1003}) {
        std::vector<float> logits = random.numbers(rows * width), probs(rows * width), top_p, found(rows);
        std::vector<int64_t> top_k;
        for (float& x : logits) x = std::round(x * 64.0f) / 16.0f;  // ties, and zeros of both signs
        for (int64_t i = 0; i < rows * width; i++) {
            probs[i] = std::exp2(std::floor(logits[i])) / static_cast<float>(256 * (1 << 10));
        }
        for (int64_t row = 0; row < rows; row++) {
            top_k.push_back(row % 3 ? 1 + random.word() % width : 0);
            top_p.push_back(row % 4 ? static_cast<float>(random.word() % 1000) / 1000.0f : 1.0f);
        }
        Filter f{logits.data(), probs.data(), top_k.data(), top_p.data(), found.data(), rows, width, 2};
        dspark_filter(&f);
        double wrong = 0;
        for (int64_t row = 0; row < rows; row++) {
            std::vector<std::pair<float, double>> sorted;
            for (int64_t i = 0; i < width; i++) sorted.push_back({logits[row * width + i], probs[row * width + i]});
            std::sort(sorted.begin(), sorted.end(), [](auto& a, auto& b) { return a.first > b.first; });
            float want = top_k[row] ? sorted[top_k[row] - 1].first : -INFINITY;
            double total = top_k[row] ? 0.0 : 1.0, sum = 0.0;
            for (auto& [x, p] : sorted) total += top_k[row] && x >= want ? p : 0.0;
            float least = want;
            if (top_p[row] < 1.0f) {
                want = sorted.back().first;
                for (auto& [x, p] : sorted) {
                    sum += x >= least ? p : 0.0;
                    if (sum >= total * static_cast<double>(top_p[row])) {
                        want = x;
                        break;
                    }
                }
            }
            wrong += want != found[row];
        }
        tell("filter", width, bits_of(found), wrong);
    }
}

}  // namespace

int main() {
    std::printf("isa %s\n", dspark_isa());
    products(false);
    products(true);
    for (int64_t window : {0, 7}) attention(window, false);
    attention(0, true);
    draws();
    filters();
}
