// Few-row products with packed weights: y = x W^T in float32, with the norm before and what follows it fused in.
//
// One output of one row is a single chain of fused multiply-adds over the inputs in order. Tiles, threads, the other rows
// and the way the weight is stored (weights.h) cannot change it.
#include "product.h"

#include <type_traits>
#include <utility>
#include <vector>

using namespace dspark;

namespace {

constexpr int64_t DECODING_TILES = 6;
constexpr int64_t NORMS_ALONE = 8;

// silu(gate) * up
inline Vec gated(Vec gate, Vec up) {
    Vec bottom = add(broadcast(1.0f), exponential(sub(broadcast(0.0f), gate)));
    return mul(div(gate, bottom), up);
}

void store_some(float* to, Vec v, int64_t count) {
    if (count >= LANES) return store(to, v);
    float lane[LANES];
    store(lane, v);
    for (int64_t i = 0; i < count; i++) to[i] = lane[i];
}

Vec load_some(const float* from, int64_t count) {
    if (count >= LANES) return load(from);
    float lane[LANES] = {};
    for (int64_t i = 0; i < count; i++) lane[i] = from[i];
    return load(lane);
}

// What becomes of the sums of one row and panel.
void finish(const Product& p, int64_t row, int64_t panel, Vec low, Vec high) {
    float* y = p.y + row * p.outputs;
    if (p.epilogue == SWIGLU) {  // a panel holds LANES gates and their LANES ups
        int64_t column = panel * LANES, count = p.outputs - column;
        if (p.bias) {
            low = add(low, load_some(p.bias + column, count));
            high = add(high, load_some(p.bias + p.outputs + column, count));
        }
        return store_some(y + column, gated(low, high), count);
    }
    for (int half = 0; half < 2; half++) {
        int64_t column = panel * PANEL + half * LANES, count = p.outputs - column;
        if (count <= 0) break;
        Vec value = half ? high : low;
        if (p.bias) value = add(value, load_some(p.bias + column, count));
        if (p.epilogue == RESIDUAL) value = add(load_some(p.residual + row * p.outputs + column, count), value);
        store_some(y + column, value, count);
    }
}

struct Work {  // a panel, or it and the next, for all rows
    const Product& p;
    const float* x;
    int64_t stride, panel;
    const char* weights;
    int64_t bytes;  // of a panel
};

template <class Weights, bool ONCE, int PANELS, int ROWS>
void tile(const Work& w, int64_t row) {
    Vec sums[ROWS][PANELS][2];
    Weights weights[PANELS];
    for (int n = 0; n < PANELS; n++) {
        weights[n] = Weights(w.weights + n * w.bytes, w.p.group);
        for (int r = 0; r < ROWS; r++) sums[r][n][0] = sums[r][n][1] = broadcast(0.0f);
    }
    const float* from = w.x + row * w.stride;
    for (int64_t start = 0; start < w.p.inputs; start += w.p.group) {
        for (int n = 0; n < PANELS; n++) weights[n].template open<ONCE>();
        for (int64_t i = start; i < start + w.p.group; i++) {
            for (int n = 0; n < PANELS; n++) {
                Vec low, high;
                weights[n].template next<ONCE>(low, high);
                for (int r = 0; r < ROWS; r++) {
                    Vec value = broadcast(from[r * w.stride + i]);
                    sums[r][n][0] = fma(value, low, sums[r][n][0]);
                    sums[r][n][1] = fma(value, high, sums[r][n][1]);
                }
            }
        }
    }
    for (int n = 0; n < PANELS; n++) {
        for (int r = 0; r < ROWS; r++) finish(w.p, row + r, w.panel + n, sums[r][n][0], sums[r][n][1]);
    }
}

template <class Weights, bool ONCE, int PANELS, int... ROWS>
void choose(const Work& w, int64_t row, int64_t rows, std::integer_sequence<int, ROWS...>) {
    constexpr void (*tiles[])(const Work&, int64_t) = {tile<Weights, ONCE, PANELS, ROWS + 1>...};
    tiles[rows - 1](w, row);
}

// The highest tile whose sums stay in registers.
template <class Weights>
constexpr int tile_rows(int panels = 1) {
    return (REGISTERS / panels - Weights::SPARE) / 2;
}

// Tiles of nearly equal height: a remainder of one row would read the panel again for little work.
template <class Weights>
void all_rows(const Work& w) {
    constexpr int HIGHEST = tile_rows<Weights>();
    int64_t rows = w.p.rows, tiles = (rows + HIGHEST - 1) / HIGHEST;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t row = rows * t / tiles, stop = rows * (t + 1) / tiles;
        auto heights = std::make_integer_sequence<int, HIGHEST>{};
        if (tiles == 1) choose<Weights, true, 1>(w, row, stop - row, heights);
        else choose<Weights, false, 1>(w, row, stop - row, heights);
    }
}

// For many tiles it is cheaper to decode the panel once and keep it as floats (measured: 6 with AVX2, 7 with AVX-512).
template <class Weights>
void decoded(const Work& w) {
    if (std::is_same_v<Weights, Floats> || w.p.rows <= DECODING_TILES * tile_rows<Weights>()) return all_rows<Weights>(w);
    thread_local std::vector<float> floats;
    floats.resize(w.p.inputs * PANEL);
    float* to = floats.data();
    Weights weights(w.weights, w.p.group);
    for (int64_t start = 0; start < w.p.inputs; start += w.p.group) {
        weights.template open<true>();
        for (int64_t i = start; i < start + w.p.group; i++, to += PANEL) {
            Vec low, high;
            weights.template next<true>(low, high);
            store(to, low);
            store(to + LANES, high);
        }
    }
    all_rows<Floats>({w.p, w.x, w.stride, w.panel, reinterpret_cast<const char*>(floats.data()), 0});
}

// One row has too few sums for the arithmetic to keep up with the memory: each waits for its last addition. So a few rows
// take two panels at a time.
template <class Weights>
void all_panels(Member& member, const Product& p, const float* x, int64_t stride, int64_t panels) {
    constexpr int PAIRED = Weights::PAIRS ? tile_rows<Weights>(2) : 0;
    int64_t bytes = panel_bytes(p.storage, p.inputs, p.group), step = p.rows <= PAIRED ? 2 : 1;
    // Neighbouring panels go to one thread: what it has prefetched beyond the end of one is the start of the next.
    member.share((panels + step - 1) / step, [&](int64_t part) {
        int64_t panel = part * step;
        Work work{p, x, stride, panel, p.packed + panel * bytes, bytes};
        if constexpr (PAIRED > 0) {
            if (step == 2 && panel + 1 < panels) {
                return choose<Weights, true, 2>(work, 0, p.rows, std::make_integer_sequence<int, PAIRED>{});
            }
        }
        decoded<Weights>(work);
    });
}

// Normed rows of x. Of few rows every thread makes all for itself, sooner than it could wait for the others.
const float* normed_rows(Member& member, const Product& p) {
    bool alone = p.rows <= NORMS_ALONE;
    thread_local std::vector<float> mine;
    if (alone) mine.resize(p.rows * p.inputs);
    float* out = alone ? mine.data() : p.scratch;
    auto norm = [&](int64_t row) { rms_norm(p.x + row * p.x_stride, p.norm, out + row * p.inputs, p.inputs, p.eps); };
    if (alone) {
        for (int64_t row = 0; row < p.rows; row++) norm(row);
    } else {
        member.share(p.rows, norm);
    }
    return out;
}

}  // namespace

void dspark::run_product(Member& member, const Product& p) {
    int64_t per_panel = p.epilogue == SWIGLU ? LANES : PANEL;
    int64_t panels = (p.outputs + per_panel - 1) / per_panel;
    const float* x = p.x;
    int64_t stride = p.x_stride;
    if (p.norm) {
        stride = p.inputs;
        x = normed_rows(member, p);
    }
    with_reader(p.storage, [&](auto reader) { all_panels<decltype(reader)>(member, p, x, stride, panels); });
}

extern "C" {

const char* dspark_isa() { return isa(); }
int64_t dspark_lanes() { return LANES; }

// Products that follow each other, each waiting for the one before.
void dspark_products(const Product* products, int64_t count, int64_t threads) {
    parallel(threads, [&](Member& member) {
        for (int64_t i = 0; i < count; i++) run_product(member, products[i]);
    });
}

}  // extern "C"
