// Decoder layers one after the other within one parallel region: the threads meet at barriers, not at every call.
#include "attention.h"
#include "product.h"

using namespace dspark;

namespace {

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
    float *normed, *qkv, *attended, *middle, *between;  // scratch of the products' shapes
    int64_t count, rows, width, tap_stride;
    float eps;
};

void run_layer(Member& member, const Decoder& d, const Layer& layer, int64_t tap, const std::vector<int64_t>& starts) {
    Attention a = *d.attention;
    a.q = d.qkv;
    a.k = d.qkv + a.heads * a.head_dim;
    a.v = a.k + a.kv_heads * a.head_dim;
    a.q_stride = a.k_stride = a.v_stride = layer.qkv.outputs;
    a.q_norm = layer.q_norm;
    a.k_norm = layer.k_norm;
    a.keys = layer.keys;
    a.values = layer.values;
    a.out = d.attended;
    a.window = layer.window;
    run_product(member, normed(product(layer.qkv, d.rows, d.hidden, d.qkv), layer.attention_norm, d.eps, d.normed));
    run_attention(member, a, starts);
    run_product(member, product(layer.out, d.rows, d.attended, d.middle, d.hidden));
    Product gates = normed(product(layer.gate_up, d.rows, d.middle, d.between), layer.mlp_norm, d.eps, d.normed);
    gates.epilogue = SWIGLU;
    run_product(member, gates);
    run_product(member, product(layer.down, d.rows, d.between, d.hidden, d.middle));
    if (tap < 0) return;
    member.share(d.rows, [&](int64_t row) {
        std::memcpy(d.taps + row * d.tap_stride + tap, d.hidden + row * d.width, d.width * sizeof(float));
    });
}

}  // namespace

extern "C" void dspark_decoder(const Decoder* decoder) {
    const Decoder& d = *decoder;
    std::vector<int64_t> starts = chunk_starts(*d.attention);
    parallel(d.attention->threads, [&](Member& member) {
        for (int64_t i = 0; i < d.count; i++) run_layer(member, d, d.layers[i], d.tap_column[i], starts);
        if (!d.norm) return;
        member.share(d.rows, [&](int64_t row) {
            rms_norm(d.hidden + row * d.width, d.norm, d.hidden + row * d.width, d.width, d.eps);
        });
    });
}
