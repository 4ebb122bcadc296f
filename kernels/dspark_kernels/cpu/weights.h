// How a weight matrix lies in memory, and how a product reads it back, PANEL floats at a time.
//
// A weight [outputs, inputs] is stored as panels of PANEL outputs. A panel goes through the inputs in order:
//   FLOAT32, BFLOAT16, FLOAT16  PANEL values per input
//   CODES4, CODES8              per group of inputs: PANEL scales, PANEL minima (floats), then PANEL codes per input
//   HALF_CODES4, HALF_CODES8    the same, scales and minima in float16: for those that are such numbers
// A code stands for code * scale + minimum. GGUF's scales leave the product exact, so this is what dequantising into
// float32 gives, bit for bit; bfloat16 and float16 widen exactly. A product's bits do not depend on the storage.
#pragma once

#include "simd.h"

namespace dspark {

enum Storage : int64_t { FLOAT32, BFLOAT16, FLOAT16, CODES4, CODES8, HALF_CODES4, HALF_CODES8 };  // mirrored by packed.py

constexpr int64_t LINE = 64;     // bytes the memory hands over at once
constexpr int64_t AHEAD = 2048;  // bytes that prefetching runs ahead of a panel's stream

// ONCE: nobody reads these again before a step's weights have gone through the caches, which then may keep what the next
// step finds there: its keys and values, and all that the host looks at (a third of the host's time).
template <bool ONCE>
inline void prefetch_bytes(const char* from, int64_t bytes) {
    for (const char* p = from + AHEAD; p < from + AHEAD + bytes; p += LINE) {
        if (ONCE) prefetch_once(p);
        else prefetch(reinterpret_cast<const float*>(p));
    }
}

inline Vec widen(const float* from) { return load(from); }
inline Vec widen(const uint16_t* from) { return load_float16(from); }

// Readers of a panel: `open` before each group of inputs, `next` for each input. ONCE: see prefetch_bytes.

struct Floats {
    static constexpr int SPARE = 3;  // vector registers a tile needs beside its sums
    static constexpr bool PAIRS = false;  // whether a few rows take two panels at a time
    const float* at;
    Floats() = default;
    Floats(const char* panel, int64_t) : at(reinterpret_cast<const float*>(panel)) {}
    static int64_t group_bytes(int64_t group) { return group * PANEL * 4; }
    template <bool ONCE>
    void open() {}
    template <bool ONCE>
    void next(Vec& low, Vec& high) {
        prefetch_bytes<ONCE>(reinterpret_cast<const char*>(at), PANEL * 4);
        low = load(at);
        high = load(at + LANES);
        at += PANEL;
    }
};

template <Vec (*LOAD)(const uint16_t*)>
struct Halves {
    static constexpr int SPARE = 3;
    static constexpr bool PAIRS = false;
    const uint16_t* at;
    Halves() = default;
    Halves(const char* panel, int64_t) : at(reinterpret_cast<const uint16_t*>(panel)) {}
    static int64_t group_bytes(int64_t group) { return group * PANEL * 2; }
    template <bool ONCE>
    void open() {}
    template <bool ONCE>
    void next(Vec& low, Vec& high) {
        prefetch_bytes<ONCE>(reinterpret_cast<const char*>(at), PANEL * 2);
        low = LOAD(at);
        high = LOAD(at + LANES);
        at += PANEL;
    }
};

using BFloats = Halves<load_bfloat16>;
using HalfFloats = Halves<load_float16>;

template <int BITS, class Scale>
struct Codes {
    static constexpr int SPARE = 7;
    static constexpr bool PAIRS = true;
    static constexpr int64_t STEP = PANEL * BITS / 8;  // bytes per input
    const char* at;
    int64_t group;
    Vec low_scale, high_scale, low_minimum, high_minimum;
    Codes() = default;
    Codes(const char* panel, int64_t group) : at(panel), group(group) {}
    static int64_t group_bytes(int64_t group) { return 2 * PANEL * sizeof(Scale) + group * STEP; }
    template <bool ONCE>
    void open() {
        prefetch_bytes<ONCE>(at, group_bytes(group));
        const Scale* scales = reinterpret_cast<const Scale*>(at);
        low_scale = widen(scales);
        high_scale = widen(scales + LANES);
        low_minimum = widen(scales + PANEL);
        high_minimum = widen(scales + PANEL + LANES);
        at += 2 * PANEL * sizeof(Scale);
    }
    template <bool>
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

// Does `what` with a reader of the storage, whose type is what counts.
template <class Do>
auto with_reader(int64_t storage, Do what) {
    switch (storage) {
        case FLOAT32: return what(Floats());
        case BFLOAT16: return what(BFloats());
        case FLOAT16: return what(HalfFloats());
        case CODES4: return what(Codes<4, float>());
        case CODES8: return what(Codes<8, float>());
        case HALF_CODES4: return what(Codes<4, uint16_t>());
        default: return what(Codes<8, uint16_t>());
    }
}

inline int64_t panel_bytes(int64_t storage, int64_t inputs, int64_t group) {
    return inputs / group * with_reader(storage, [&](auto reader) { return decltype(reader)::group_bytes(group); });
}

}  // namespace dspark
