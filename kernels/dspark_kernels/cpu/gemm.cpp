// Few-row products with packed float32 weights: y = x W^T, with the norm before and what follows it fused in.
//
// A weight [outputs, inputs] is stored as panels of PANEL outputs: [panel][input][PANEL]. One output of one row is a single
// chain of fused multiply-adds over the inputs in order. Tiles, threads and the other rows cannot change it.
#include "simd.h"

#include <utility>

using namespace dspark;

namespace {

constexpr int64_t PREFETCH = 512;  // floats ahead of the weight stream

enum Epilogue : int64_t { PLAIN, RESIDUAL, SWIGLU };

struct Product {  // mirrored by native.py
    const float* x;         // [rows, inputs], rows x_stride apart
    const float* norm;      // [inputs] RMSNorm weight applied to x first, or null
    const float* packed;    // panels
    const float* bias;      // [outputs] or null; with SWIGLU [2 * outputs]
    const float* residual;  // [rows, outputs] with RESIDUAL
    float* y;               // [rows, outputs]
    float* scratch;         // [rows, inputs] if norm
    int64_t rows, inputs, outputs, x_stride;
    int64_t epilogue;
    float eps;
};

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

template <int ROWS>
void tile(const Product& p, const float* x, int64_t stride, int64_t row, int64_t panel) {
    Vec sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = broadcast(0.0f);
    const float* w = p.packed + panel * PANEL * p.inputs;
    const float* from = x + row * stride;
    for (int64_t i = 0; i < p.inputs; i++, w += PANEL) {
        prefetch(w + PREFETCH);
        if (PANEL > 16) prefetch(w + PREFETCH + 16);
        Vec low = load(w), high = load(w + LANES);
        for (int r = 0; r < ROWS; r++) {
            Vec value = broadcast(from[r * stride + i]);
            sums[r][0] = fma(value, low, sums[r][0]);
            sums[r][1] = fma(value, high, sums[r][1]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float* y = p.y + (row + r) * p.outputs;
        if (p.epilogue == SWIGLU) {  // a panel holds LANES gates and their LANES ups
            int64_t column = panel * LANES, count = p.outputs - column;
            if (p.bias) {
                sums[r][0] = add(sums[r][0], load_some(p.bias + column, count));
                sums[r][1] = add(sums[r][1], load_some(p.bias + p.outputs + column, count));
            }
            store_some(y + column, gated(sums[r][0], sums[r][1]), count);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            int64_t column = panel * PANEL + half * LANES, count = p.outputs - column;
            if (count <= 0) break;
            Vec value = sums[r][half];
            if (p.bias) value = add(value, load_some(p.bias + column, count));
            if (p.epilogue == RESIDUAL) {
                value = add(load_some(p.residual + (row + r) * p.outputs + column, count), value);
            }
            store_some(y + column, value, count);
        }
    }
}

using Tile = void (*)(const Product&, const float*, int64_t, int64_t, int64_t);

template <int... ROWS>
constexpr Tile choose(int64_t rows, std::integer_sequence<int, ROWS...>) {
    constexpr Tile tiles[] = {tile<ROWS + 1>...};
    return tiles[rows - 1];
}

void one_panel(const Product& p, const float* x, int64_t stride, int64_t panel) {
    // Tiles of nearly equal height: a remainder of one row would read the panel again for little work.
    int64_t tiles = (p.rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t row = p.rows * t / tiles, stop = p.rows * (t + 1) / tiles;
        choose(stop - row, std::make_integer_sequence<int, MAX_TILE_ROWS>{})(p, x, stride, row, panel);
    }
}

// By all threads of a parallel region; ends with a barrier.
void run(const Product& p) {
    int64_t per_panel = p.epilogue == SWIGLU ? LANES : PANEL;
    int64_t panels = (p.outputs + per_panel - 1) / per_panel;
    const float* x = p.norm ? p.scratch : p.x;
    int64_t stride = p.norm ? p.inputs : p.x_stride;
    if (p.norm) {
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < p.rows; row++) {
            rms_norm(p.x + row * p.x_stride, p.norm, p.scratch + row * p.inputs, p.inputs, p.eps);
        }
    }
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < panels; panel++) one_panel(p, x, stride, panel);
}

}  // namespace

extern "C" {

const char* dspark_isa() { return isa(); }
int64_t dspark_lanes() { return LANES; }

// Floats that `outputs` x `inputs` take when packed; with `gated` half of the outputs are gates, half their ups.
int64_t dspark_packed_size(int64_t outputs, int64_t inputs, int64_t gated) {
    int64_t width = gated ? outputs / 2 : outputs, per_panel = gated ? LANES : PANEL;
    return (width + per_panel - 1) / per_panel * PANEL * inputs;
}

void dspark_pack(const float* weight, float* packed, int64_t outputs, int64_t inputs, int64_t gated) {
    int64_t panels = dspark_packed_size(outputs, inputs, gated) / (PANEL * inputs);
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++) {
        for (int64_t lane = 0; lane < PANEL; lane++) {
            int64_t half = outputs / 2, column = panel * PANEL + lane, limit = outputs;
            if (gated) {
                column = panel * LANES + lane % LANES;
                limit = half;
            }
            int64_t source = gated && lane >= LANES ? half + column : column;
            for (int64_t i = 0; i < inputs; i++) {
                packed[(panel * inputs + i) * PANEL + lane] = column < limit ? weight[source * inputs + i] : 0.0f;
            }
        }
    }
}

// Products that follow each other, each waiting for the one before.
void dspark_products(const Product* products, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < count; i++) run(products[i]);
}

}  // extern "C"
