// Decoder layers one after the other.
#pragma once

#include "attention.h"
#include "product.h"

namespace dspark {

struct Layer {  // mirrored by decoder.py, as is Decoder
    Packed qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm;
    const float *q_norm, *k_norm;  // or null
    float *keys, *values;          // this layer's part of the store
    int64_t window;
};

struct Decoder {
    const Layer* layers;
    const Attention* attention;  // what is the same in every layer
    const int64_t* tap_column;   // [count] where a layer's output goes in a row of taps, or -1
    const float* norm;           // [width] RMSNorm weight that the last layer's output gets, or null
    float *hidden;               // [rows, width], in and out
    float *taps;                 // [rows, tap_stride]
    const int64_t* tap_slots;    // [rows] the row of `taps` that each row's go to, or null: its own
    float *normed, *qkv, *attended, *middle, *between;  // scratch of the products' shapes
    int64_t count, rows, width, tap_stride;
    float eps;
};

// By all threads of a parallel region; ends with a barrier. starts: chunk_starts of the attention.
void run_decoder(Member& member, const Decoder& d, const std::vector<int64_t>& starts);

}  // namespace dspark
