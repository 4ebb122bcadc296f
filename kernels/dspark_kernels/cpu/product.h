// One few-row product with what surrounds it.
#pragma once

#include "team.h"
#include "weights.h"

namespace dspark {

enum Epilogue : int64_t { PLAIN, RESIDUAL, SWIGLU };

struct Product {  // mirrored by native.py
    const float* x;         // [rows, inputs], rows x_stride apart
    const float* norm;      // [inputs] RMSNorm weight applied to x first, or null
    const char* packed;     // panels
    const float* bias;      // [outputs] or null; with SWIGLU [2 * outputs]
    const float* residual;  // [rows, outputs] with RESIDUAL
    float* y;               // [rows, outputs]
    float* scratch;         // [rows, inputs] if norm
    int64_t storage, group;
    int64_t rows, inputs, outputs, x_stride;
    int64_t epilogue;
    float eps;
};

struct Packed {  // a weight and its bias; mirrored by packed.py
    const char* panels;
    const float* bias;
    int64_t storage, group, outputs, inputs;  // outputs: with gates, half the weight's
};

// y = x W^T + b (+ residual), rows without gaps.
inline Product product(const Packed& w, int64_t rows, const float* x, float* y, const float* residual = nullptr) {
    return {x, nullptr, w.panels, w.bias, residual, y, nullptr, w.storage, w.group,
            rows, w.inputs, w.outputs, w.inputs, residual ? RESIDUAL : PLAIN, 0.0f};
}

// The same after RMSNorm of x, for which there is `scratch` [rows, inputs].
inline Product normed(Product p, const float* norm, float eps, float* scratch) {
    p.norm = norm;
    p.eps = eps;
    p.scratch = scratch;
    return p;
}

// By all threads of a parallel region; ends with a barrier.
void run_product(Member& member, const Product& p);

}  // namespace dspark
