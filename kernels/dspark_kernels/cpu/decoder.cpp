// Decoder layers one after the other within one parallel region: the threads meet at barriers, not at every call.
#include "decoder.h"

using namespace dspark;

namespace {

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
    // Nobody waits: the next layers read these rows, and write them only behind barriers of their own.
    for (int64_t row = member.index(); row < d.rows; row += member.size()) {
        float* to = d.taps + (d.tap_slots ? d.tap_slots[row] : row) * d.tap_stride + tap;
        std::memcpy(to, d.hidden + row * d.width, d.width * sizeof(float));
    }
}

}  // namespace

namespace dspark {

void run_decoder(Member& member, const Decoder& d, const std::vector<int64_t>& starts) {
    for (int64_t i = 0; i < d.count; i++) run_layer(member, d, d.layers[i], d.tap_column[i], starts);
    if (!d.norm) return;
    if (d.tap_column[d.count - 1] >= 0) member.wait();  // which is read without the norm
    member.share(d.rows, [&](int64_t row) {
        rms_norm(d.hidden + row * d.width, d.norm, d.hidden + row * d.width, d.width, d.eps);
    });
}

}  // namespace dspark

extern "C" void dspark_decoder(const Decoder* decoder) {
    std::vector<int64_t> starts = chunk_starts(*decoder->attention);
    parallel(decoder->attention->threads, [&](Member& member) { run_decoder(member, *decoder, starts); });
}
