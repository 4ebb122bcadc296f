// Few-row products with packed weights: y = x W^T in float32, with the norm before and what follows it fused in.
//
// One output of one row is a single chain of fused multiply-adds over the inputs in order. Tiles, threads, the other rows
// and the way the weight is stored (weights.h) cannot change it.
#include "product.h"

#include <algorithm>
#include <utility>
#include <vector>

using namespace dspark;

namespace {

constexpr int64_t CHUNK = 1 << 16;  // bytes of weights a thread takes at a time
constexpr int64_t DECODING_TILES = 6;

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

struct Work {  // one panel, for all rows
    const Product& p;
    const float* x;
    int64_t stride, panel;
    const char* weights;
};

template <class Weights, int ROWS>
void tile(const Work& w, int64_t row) {
    Vec sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = broadcast(0.0f);
    Weights weights(w.weights, w.p.group);
    const float* from = w.x + row * w.stride;
    for (int64_t start = 0; start < w.p.inputs; start += w.p.group) {
        weights.open();
        for (int64_t i = start; i < start + w.p.group; i++) {
            Vec low, high;
            weights.next(low, high);
            for (int r = 0; r < ROWS; r++) {
                Vec value = broadcast(from[r * w.stride + i]);
                sums[r][0] = fma(value, low, sums[r][0]);
                sums[r][1] = fma(value, high, sums[r][1]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) finish(w.p, row + r, w.panel, sums[r][0], sums[r][1]);
}

template <class Weights, int... ROWS>
void choose(const Work& w, int64_t row, int64_t rows, std::integer_sequence<int, ROWS...>) {
    constexpr void (*tiles[])(const Work&, int64_t) = {tile<Weights, ROWS + 1>...};
    tiles[rows - 1](w, row);
}

template <class Weights>
constexpr int tile_rows() {
    return (REGISTERS - Weights::SPARE) / 2;
}

// Tiles of nearly equal height: a remainder of one row would read the panel again for little work.
template <class Weights>
void all_rows(const Work& w) {
    constexpr int HIGHEST = tile_rows<Weights>();
    int64_t rows = w.p.rows, tiles = (rows + HIGHEST - 1) / HIGHEST;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t row = rows * t / tiles, stop = rows * (t + 1) / tiles;
        choose<Weights>(w, row, stop - row, std::make_integer_sequence<int, HIGHEST>{});
    }
}

// For many tiles it is cheaper to decode the panel once and keep it as floats (measured: 6 with AVX2, 7 with AVX-512).
template <class Weights>
void decoded(const Work& w) {
    if (w.p.rows <= DECODING_TILES * tile_rows<Weights>()) return all_rows<Weights>(w);
    thread_local std::vector<float> floats;
    floats.resize(w.p.inputs * PANEL);
    float* to = floats.data();
    Weights weights(w.weights, w.p.group);
    for (int64_t start = 0; start < w.p.inputs; start += w.p.group) {
        weights.open();
        for (int64_t i = start; i < start + w.p.group; i++, to += PANEL) {
            Vec low, high;
            weights.next(low, high);
            store(to, low);
            store(to + LANES, high);
        }
    }
    all_rows<Floats>({w.p, w.x, w.stride, w.panel, reinterpret_cast<const char*>(floats.data())});
}

void one_panel(const Work& w) {
    switch (w.p.storage) {
        case FLOAT32: return all_rows<Floats>(w);
        case BFLOAT16: return decoded<BFloats>(w);
        case FLOAT16: return decoded<HalfFloats>(w);
        case CODES4: return decoded<Codes<4>>(w);
        case CODES8: return decoded<Codes<8>>(w);
    }
}

}  // namespace

void dspark::run_product(const Product& p) {
    int64_t per_panel = p.epilogue == SWIGLU ? LANES : PANEL;
    int64_t panels = (p.outputs + per_panel - 1) / per_panel;
    int64_t bytes = panel_bytes(p.storage, p.inputs, p.group);
    const float* x = p.norm ? p.scratch : p.x;
    int64_t stride = p.norm ? p.inputs : p.x_stride;
    if (p.norm) {
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < p.rows; row++) {
            rms_norm(p.x + row * p.x_stride, p.norm, p.scratch + row * p.inputs, p.inputs, p.eps);
        }
    }
    // Neighbouring panels go to one thread: what it has prefetched beyond the end of one is the start of the next.
    int64_t share = std::clamp(CHUNK / bytes, int64_t(1), panels / 8 + 1);
#pragma omp for schedule(dynamic, share)
    for (int64_t panel = 0; panel < panels; panel++) one_panel({p, x, stride, panel, p.packed + panel * bytes});
}

extern "C" {

const char* dspark_isa() { return isa(); }
int64_t dspark_lanes() { return LANES; }

// Products that follow each other, each waiting for the one before.
void dspark_products(const Product* products, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < count; i++) run_product(products[i]);
}

}  // extern "C"
