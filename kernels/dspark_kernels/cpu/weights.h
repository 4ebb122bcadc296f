// How a weight matrix lies in memory, and how a product reads it back, PANEL floats at a time.
//
// A weight [outputs, inputs] is stored as panels of PANEL outputs. A panel goes through the inputs in order:
//   FLOAT32, BFLOAT16, FLOAT16  PANEL values per input
//   CODES4, CODES8              per group of inputs: PANEL scales, PANEL minima (floats), then PANEL codes per input
// A code stands for code * scale + minimum. GGUF's scales leave the product exact, so this is what dequantising into
// float32 gives, bit for bit; bfloat16 and float16 widen exactly. A product's bits do not depend on the storage.
#pragma once

#include "simd.h"

namespace dspark {

enum Storage : int64_t { FLOAT32, BFLOAT16, FLOAT16, CODES4, CODES8 };  // mirrored by native.py

constexpr int64_t LINE = 64;     // bytes the memory hands over at once
constexpr int64_t AHEAD = 2048;  // bytes that prefetching runs ahead of a panel's stream

inline void prefetch_bytes(const char* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) prefetch(reinterpret_cast<const float*>(from + AHEAD + i));
}

// Readers: `open` before each group of inputs, `next` for each input.

struct Floats {
    static constexpr int SPARE = 3;  // vector registers a tile needs beside its sums
    const float* at;
    Floats(const char* panel, int64_t) : at(reinterpret_cast<const float*>(panel)) {}
    static int64_t group_bytes(int64_t group) { return group * PANEL * 4; }
    void open() {}
    void next(Vec& low, Vec& high) {
        prefetch_bytes(reinterpret_cast<const char*>(at), PANEL * 4);
        low = load(at);
        high = load(at + LANES);
        at += PANEL;
    }
};

template <Vec (*LOAD)(const uint16_t*)>
struct Halves {
    static constexpr int SPARE = 3;
    const uint16_t* at;
    Halves(const char* panel, int64_t) : at(reinterpret_cast<const uint16_t*>(panel)) {}
    static int64_t group_bytes(int64_t group) { return group * PANEL * 2; }
    void open() {}
    void next(Vec& low, Vec& high) {
        prefetch_bytes(reinterpret_cast<const char*>(at), PANEL * 2);
        low = LOAD(at);
        high = LOAD(at + LANES);
        at += PANEL;
    }
};

using BFloats = Halves<load_bfloat16>;
using HalfFloats = Halves<load_float16>;

template <int BITS>
struct Codes {
    static constexpr int SPARE = 7;
    static constexpr int64_t STEP = PANEL * BITS / 8;  // bytes per input
    const char* at;
    int64_t group;
    Vec low_scale, high_scale, low_minimum, high_minimum;
    Codes(const char* panel, int64_t group) : at(panel), group(group) {}
    static int64_t group_bytes(int64_t group) { return 2 * PANEL * 4 + group * STEP; }
    void open() {
        prefetch_bytes(at, group_bytes(group));
        const float* scales = reinterpret_cast<const float*>(at);
        low_scale = load(scales);
        high_scale = load(scales + LANES);
        low_minimum = load(scales + PANEL);
        high_minimum = load(scales + PANEL + LANES);
        at += 2 * PANEL * 4;
    }
    void next(Vec& low, Vec& high) {
        if (BITS == 4) {
            load_codes4(reinterpret_cast<const uint8_t*>(at), low, high);
        } else {
            low = load_codes8(reinterpret_cast<const int8_t*>(at));
            high = load_codes8(reinterpret_cast<const int8_t*>(at) + LANES);
        }
        low = fma(low, low_scale, low_minimum);
        high = fma(high, high_scale, high_minimum);
        at += STEP;
    }
};

inline int64_t panel_bytes(int64_t storage, int64_t inputs, int64_t group) {
    int64_t groups = inputs / group;
    switch (storage) {
        case FLOAT32: return groups * Floats::group_bytes(group);
        case BFLOAT16: return groups * BFloats::group_bytes(group);
        case FLOAT16: return groups * HalfFloats::group_bytes(group);
        case CODES4: return groups * Codes<4>::group_bytes(group);
        default: return groups * Codes<8>::group_bytes(group);
    }
}

}  // namespace dspark
