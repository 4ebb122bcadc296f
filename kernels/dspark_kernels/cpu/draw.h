// Tokens from rows of logits.
#pragma once

#include "simd.h"

namespace dspark {

struct Draw {
    const float *logits, *temperature;  // [rows, width], [rows]
    const int64_t *ids;  // token of each column [rows, width], or null: they are 0..width-1
    const int64_t *seed, *position;  // [rows]
    int64_t* out;  // [rows] tokens
    int64_t rows, width, stride, ids_stride, stream, threads;
    float greedy;  // temperatures up to this take the likeliest token
};

// argmax of logits / temperature + noise, the lowest token on ties; a row with NaN gives the first NaN's token.
// later: added to the row's position.
int64_t draw_row(const Draw& d, int64_t row, int64_t later = 0);

}  // namespace dspark
