// One vector of floats and the few operations the kernels need, per instruction set.
// load_codes4: LANES bytes hold 2 * LANES numbers below 16, the first LANES of them in the low halves.
// transpose: LANES floats from `at` of each of LANES rows become LANES columns, one vector after the other.
//
// Every sum in the kernels is a chain of `fma` in a fixed order, so a result never depends on how the work around it was
// tiled. The compiler may not fuse or reorder on its own (-ffp-contract=off, no -ffast-math).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dspark {

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec round_even(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {  // 2^n for whole n in [-126, 128]
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_once(const char* p) { _mm_prefetch(p, _MM_HINT_NTA); }
inline Vec load_bfloat16(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_codes8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void load_codes4(const uint8_t* p, Vec& low, Vec& high) {
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    // A permutation looks at four bits of its index: as a table lookup it needs neither mask nor conversion.
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    low = _mm512_permutexvar_ps(both, numbers);
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), numbers);
}
inline const char* isa() { return "avx512"; }
inline void transpose(const float* const* rows, int64_t at, float* to) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = load(rows[i] + at);
    for (int i = 0; i < 16; i += 2) {  // pairs, then fours, within each quarter of the vectors
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; i++) {  // then the quarters themselves
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        store(to + i * 16, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
        store(to + (i + 4) * 16, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
        store(to + (i + 8) * 16, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
        store(to + (i + 12) * 16, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

using Vec = __m256;
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec round_even(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_once(const char* p) { _mm_prefetch(p, _MM_HINT_NTA); }
inline Vec load_bfloat16(const uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load_float16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load_codes8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void load_codes4(const uint8_t* p, Vec& low, Vec& high) {
    __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    low = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
    high = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
}
inline const char* isa() { return "avx2"; }
inline void transpose(const float* const* rows, int64_t at, float* to) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = load(rows[i] + at);
    for (int i = 0; i < 8; i += 2) {  // pairs, then fours, within each half of the vectors
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; j++) {
            __m256d low = _mm256_castps_pd(b[i + j]), high = _mm256_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; i++) {  // then the halves themselves
        store(to + i * 8, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        store(to + (i + 4) * 8, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

using Vec = float32x4_t;
constexpr int LANES = 4;
constexpr int REGISTERS = 32;
inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
inline Vec broadcast(float x) { return vdupq_n_f32(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec vmin(Vec a, Vec b) { return vminq_f32(a, b); }
inline Vec vmax(Vec a, Vec b) { return vmaxq_f32(a, b); }
inline Vec round_even(Vec a) { return vrndnq_f32(a); }
inline Vec power_of_two(Vec n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline void prefetch(const float* p) { __builtin_prefetch(p); }
inline void prefetch_once(const char* p) { __builtin_prefetch(p, 0, 0); }
inline Vec load_bfloat16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline Vec load_float16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Vec load_codes8(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(static_cast<uint32_t>(four))))));
}
inline void load_codes4(const uint8_t* p, Vec& low, Vec& high) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    uint32x4_t both = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
    low = vcvtq_f32_u32(vandq_u32(both, vdupq_n_u32(15)));
    high = vcvtq_f32_u32(vshrq_n_u32(both, 4));
}
inline const char* isa() { return "neon"; }
inline void transpose(const float* const* rows, int64_t at, float* to) {
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < LANES; j++) to[i * LANES + j] = rows[j][at + i];
    }
}

#else  // any C++17 compiler

struct Vec { float lane[4]; };
constexpr int LANES = 4;
constexpr int REGISTERS = 16;  // of SSE2
template <class F> inline Vec map(F f) { return {{f(0), f(1), f(2), f(3)}}; }
inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void store(float* p, Vec v) { std::memcpy(p, v.lane, sizeof v.lane); }
inline Vec broadcast(float x) { return {{x, x, x, x}}; }
#if defined(__FP_FAST_FMAF)
inline Vec fma(Vec a, Vec b, Vec c) { return map([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); }); }
#else  // two roundings: fused multiply-add without hardware is a function call; still the same for every tiling
inline Vec fma(Vec a, Vec b, Vec c) { return map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
#endif
inline Vec add(Vec a, Vec b) { return map([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Vec sub(Vec a, Vec b) { return map([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Vec mul(Vec a, Vec b) { return map([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Vec div(Vec a, Vec b) { return map([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline Vec vmin(Vec a, Vec b) { return map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Vec vmax(Vec a, Vec b) { return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Vec round_even(Vec a) { return map([&](int i) { return std::nearbyint(a.lane[i]); }); }
inline Vec power_of_two(Vec n) {  // of NaN, which has no whole number, any
    return map([&](int i) {
        float whole = n.lane[i] == n.lane[i] ? n.lane[i] : 0.0f;
        return from_bits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
    });
}
inline void prefetch(const float* p) { __builtin_prefetch(p); }
inline void prefetch_once(const char* p) { __builtin_prefetch(p, 0, 0); }
inline Vec load_bfloat16(const uint16_t* p) {
    return map([&](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); });
}
inline Vec load_float16(const uint16_t* p) {
    return map([&](int i) {
        uint32_t sign = static_cast<uint32_t>(p[i] & 0x8000) << 16, rest = p[i] & 0x7fff;
        if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinite or NaN
        // Exponent and mantissa in float32's places stand for a number 2^112 too small, denormal or not.
        return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
    });
}
inline Vec load_codes8(const int8_t* p) { return map([&](int i) { return static_cast<float>(p[i]); }); }
inline void load_codes4(const uint8_t* p, Vec& low, Vec& high) {
    low = map([&](int i) { return static_cast<float>(p[i] & 15); });
    high = map([&](int i) { return static_cast<float>(p[i] >> 4); });
}
inline const char* isa() { return "portable"; }
inline void transpose(const float* const* rows, int64_t at, float* to) {
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < LANES; j++) to[i * LANES + j] = rows[j][at + i];
    }
}

#endif

constexpr int PANEL = 2 * LANES;  // columns of a packed weight that are computed together

inline float sum(Vec v) {  // lanes in order, halves first: a fixed tree
    float lane[LANES];
    store(lane, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

inline float maximum(Vec v) {
    float lane[LANES];
    store(lane, v);
    float best = lane[0];
    for (int i = 1; i < LANES; i++) best = lane[i] > best ? lane[i] : best;
    return best;
}

inline float largest(const float* x, int64_t count) {  // of numbers; NaN may or may not be seen
    float best = -INFINITY;
    int64_t i = 0;
    if (count >= LANES) {
        Vec all = load(x);
        for (i = LANES; i + LANES <= count; i += LANES) all = vmax(load(x + i), all);
        best = maximum(all);
    }
    for (; i < count; i++) best = x[i] > best ? x[i] : best;
    return best;
}

// e^x to about 1 unit in the last place; infinite from 88.4 up, never less than e^-87. NaN stays NaN.
inline Vec exponential(Vec x) {
    Vec clamped = vmax(broadcast(-87.0f), vmin(broadcast(89.0f), x));  // in this order x's NaN survives on x86
    Vec n = round_even(mul(clamped, broadcast(1.44269504f)));
    Vec r = fma(n, broadcast(-0.693145752f), clamped);  // ln 2 in two parts: n * high is exact
    r = fma(n, broadcast(-1.42860677e-6f), r);
    Vec p = broadcast(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, broadcast(c));
    return mul(p, power_of_two(n));
}

// RMSNorm of `width` floats, a multiple of LANES; `out` may be x.
inline void rms_norm(const float* x, const float* weight, float* out, int64_t width, float eps) {
    Vec squares = broadcast(0.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        Vec v = load(x + i);
        squares = fma(v, v, squares);
    }
    Vec scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
    for (int64_t i = 0; i < width; i += LANES) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
}

}  // namespace dspark
