// What a draft head does beside its layers: context K/V of committed tokens, and a block of drafts token by token.
#include "attention.h"
#include "draw.h"
#include "product.h"

using namespace dspark;

namespace {

struct ContextLayer {  // mirrored by heads.py, as are the others
    Packed kv;
    const float* k_norm;
    float *keys, *values;  // this layer's part of the store
};

struct Context {
    const ContextLayer* layers;
    const Attention* attention;  // what is the same in every layer; no queries
    Packed fc;
    const float* norm;  // of what fc gives
    const float* taps;  // [tokens, fc.inputs]
    float *features, *normed, *kv;  // scratch: [tokens, fc.outputs] twice, [tokens, kv.outputs]
    int64_t count;
    float eps;
};

void run_context(Member& member, const Context& c) {
    int64_t tokens = c.attention->tokens;
    run_product(member, product(c.fc, tokens, c.taps, c.features));
    for (int64_t i = 0; i < c.count; i++) {
        const ContextLayer& layer = c.layers[i];
        run_product(member, normed(product(layer.kv, tokens, c.features, c.kv), c.norm, c.eps, c.normed));
        Attention a = *c.attention;
        a.k = c.kv;
        a.v = c.kv + a.kv_heads * a.head_dim;
        a.k_stride = a.v_stride = layer.kv.outputs;
        a.k_norm = layer.k_norm;
        a.keys = layer.keys;
        a.values = layer.values;
        run_prepare(member, a);
    }
}

struct Block {
    const float* base;      // [slots, rows, width] logits before the bias
    const float* hidden;    // [slots, rows, hidden_size]
    const float* embedding; // [vocab, rank] of the token before
    const float* confidence;  // [hidden_size + rank] and a bias behind, or null
    const int64_t* anchors; // [rows] tokens before the first slot
    Packed bias;            // rank -> width
    Draw draw;              // of the first slot, from `logits`
    float* logits;          // scratch [rows, width]
    int64_t* tokens;        // [rows, slots] out
    float* largest;         // [rows, slots] out: the largest draft probability
    float* accepted;        // [rows, slots] out: probability of acceptance
    float* embedded;        // scratch [rows, rank]
    int64_t slots, hidden_size;
};

float dot(const float* a, const float* b, int64_t count) {
    Vec sums = broadcast(0.0f);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums = fma(load(a + i), load(b + i), sums);
    float total = sum(sums);
    for (; i < count; i++) total += a[i] * b[i];
    return total;
}

// Of the softmax of x.
float largest_probability(const float* x, int64_t count) {
    float top = largest(x, count);
    Vec all = broadcast(0.0f), best = broadcast(top);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) all = add(all, exponential(sub(load(x + i), best)));
    float total = sum(all);
    for (; i < count; i++) total += std::exp(x[i] - top);
    return 1.0f / total;
}

void run_block(Member& member, const Block& b) {
    int64_t rows = b.draw.rows, width = b.draw.width, rank = b.bias.inputs;
    for (int64_t slot = 0; slot < b.slots; slot++) {
        member.share(rows, [&](int64_t row) {
            int64_t before = slot ? b.tokens[row * b.slots + slot - 1] : b.anchors[row];
            float* e = b.embedded + row * rank;
            std::memcpy(e, b.embedding + before * rank, rank * sizeof(float));
            if (!b.confidence) return;
            const float* h = b.hidden + (slot * rows + row) * b.hidden_size;
            float logit = dot(h, b.confidence, b.hidden_size) + dot(e, b.confidence + b.hidden_size, rank);
            b.accepted[row * b.slots + slot] = 1.0f / (1.0f + std::exp(-logit - b.confidence[b.hidden_size + rank]));
        });
        run_product(member, product(b.bias, rows, b.embedded, b.logits, b.base + slot * rows * width));
        member.share(rows, [&](int64_t row) {
            b.largest[row * b.slots + slot] = largest_probability(b.logits + row * width, width);
            b.tokens[row * b.slots + slot] = draw_row(b.draw, row, slot);
        });
    }
}

}  // namespace

extern "C" {

void dspark_context(const Context* context) {
    parallel(context->attention->threads, [&](Member& member) { run_context(member, *context); });
}

void dspark_block(const Block* block) {
    parallel(block->draw.threads, [&](Member& member) { run_block(member, *block); });
}

}  // extern "C"
