// One few-row product with what surrounds it.
#pragma once

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

// By all threads of a parallel region; ends with a barrier.
void run_product(const Product& p);

}  // namespace dspark
