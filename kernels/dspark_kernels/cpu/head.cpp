// What a draft head does beside its layers: context K/V of committed tokens, and a block of drafts token by token.
#include "decoder.h"
#include "draw.h"

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
    const float* kept;  // [slots of the store, fc.inputs]: a token's taps lie at its slot
    float *taps, *features, *normed, *kv;  // scratch: [tokens, fc.inputs], [tokens, fc.outputs] twice, [tokens, kv.outputs]
    int64_t count;
    float eps;
};

void run_context(Member& member, const Context& c) {
    int64_t tokens = c.attention->tokens, width = c.fc.inputs;
    member.share(tokens, [&](int64_t token) {
        std::memcpy(c.taps + token * width, c.kept + c.attention->slots[token] * width, width * sizeof(float));
    });
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
    Packed lm_head;         // hidden_size -> width, or no panels
    float* base;            // [slots, rows, width] logits before the bias; scratch with an lm_head
    const float* hidden;    // [rows, block, hidden_size], of which the first slots are drawn
    float* by_slot;         // scratch [slots, rows, hidden_size]; not with a single row
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
    int64_t slots, block, hidden_size;
};

struct Draft {
    const Context* context;  // or null
    const Decoder* decoder;  // whose hidden states are the block's
    const Block* block;
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
    const float* hidden = b.hidden;
    if (rows > 1) {
        member.share(b.slots * rows, [&](int64_t at) {
            const float* from = b.hidden + (at % rows * b.block + at / rows) * b.hidden_size;
            std::memcpy(b.by_slot + at * b.hidden_size, from, b.hidden_size * sizeof(float));
        });
        hidden = b.by_slot;
    }
    if (b.lm_head.panels) run_product(member, product(b.lm_head, b.slots * rows, hidden, b.base));
    for (int64_t slot = 0; slot < b.slots; slot++) {
        member.share(rows, [&](int64_t row) {
            int64_t before = slot ? b.tokens[row * b.slots + slot - 1] : b.anchors[row];
            float* e = b.embedded + row * rank;
            std::memcpy(e, b.embedding + before * rank, rank * sizeof(float));
            if (!b.confidence) return;
            const float* h = hidden + (slot * rows + row) * b.hidden_size;
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

// What dspark_context, dspark_decoder and dspark_block do, one after the other.
void dspark_draft(const Draft* draft) {
    std::vector<int64_t> starts = chunk_starts(*draft->decoder->attention);
    parallel(draft->block->draw.threads, [&](Member& member) {
        if (draft->context) run_context(member, *draft->context);
        run_decoder(member, *draft->decoder, starts);
        run_block(member, *draft->block);
    });
}

}  // extern "C"
