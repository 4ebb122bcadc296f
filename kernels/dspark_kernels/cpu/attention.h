// Ragged paged attention of one layer.
#pragma once

#include "simd.h"
#include "team.h"

#include <vector>

namespace dspark {

struct Attention {  // mirrored by native.py
    float* q;              // [tokens, heads, head_dim], tokens q_stride apart; normed and rotated in place
    float* k;              // [tokens, kv_heads, head_dim], likewise
    const float* v;        // [tokens, kv_heads, value_dim]
    const float* q_norm;   // [head_dim] or null
    const float* k_norm;   // [head_dim] or null
    const float* cosine;   // [positions, head_dim] or null: no rotation
    const float* sine;     // [positions, head_dim], the first half negated
    const int64_t* positions;  // [tokens], rows of the two tables
    const int64_t* slots;      // [tokens]
    const int64_t* pages;      // [rows, max_pages]
    const int64_t* first;      // [rows] first token of the row
    const int64_t* queries;    // [rows]
    const int64_t* contexts;   // [rows] keys visible to the row's last token
    float* keys;           // [slots, kv_heads, head_dim]
    float* values;         // [slots, kv_heads, value_dim]
    float* out;            // [tokens, heads, value_dim]
    int64_t q_stride, k_stride, v_stride;
    int64_t tokens, rows, max_pages, page_size;
    int64_t heads, kv_heads, head_dim, value_dim;
    int64_t window;        // tokens a query sees, itself included; 0: all
    int64_t table_stride;  // floats between positions of the tables
    int64_t block;         // 1: queries see all of their row's keys, and those of its own tokens are not kept
    int64_t threads;
    float scale, softcap, eps;  // softcap 0: none
};

// Where each row's chunks of queries begin, among all chunks: [rows + 1].
std::vector<int64_t> chunk_starts(const Attention& a);

// Norms and turns queries and keys, and writes keys and values to their slots. By all threads of a parallel region;
// ends with a barrier.
void run_prepare(Member& member, const Attention& a);

// The same, and attention.
void run_attention(Member& member, const Attention& a, const std::vector<int64_t>& starts);

}  // namespace dspark
