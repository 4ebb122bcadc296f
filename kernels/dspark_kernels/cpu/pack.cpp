// Weights from their files' layout into panels (weights.h).
#include "weights.h"

using namespace dspark;

namespace {

struct Source {  // mirrored by packed.py
    const void* values;    // [outputs, inputs]: floats, bfloat16, float16, signed bytes, or two 4-bit codes per byte, low half first
    const void* scales;    // [outputs, inputs / group], of codes: floats or float16
    const void* minima;    // likewise
    int64_t storage, group;
    int64_t outputs, inputs;
    int64_t gated;  // half of the outputs are gates, half their ups: a panel holds LANES of each
};

int64_t panels(const Source& s) {
    int64_t width = s.gated ? s.outputs / 2 : s.outputs, per_panel = s.gated ? LANES : PANEL;
    return (width + per_panel - 1) / per_panel;
}

// Row of the source that a panel's lane takes, -1 where the panel is wider than the weight.
int64_t row_of(const Source& s, int64_t panel, int64_t lane) {
    if (!s.gated) return panel * PANEL + lane < s.outputs ? panel * PANEL + lane : -1;
    int64_t half = s.outputs / 2, column = panel * LANES + lane % LANES;
    return column >= half ? -1 : lane < LANES ? column : half + column;
}

template <class Value>
void pack_values(const Source& s, int64_t panel, Value* to) {
    for (int64_t lane = 0; lane < PANEL; lane++) {
        int64_t row = row_of(s, panel, lane);
        const Value* from = row < 0 ? nullptr : static_cast<const Value*>(s.values) + row * s.inputs;
        for (int64_t i = 0; i < s.inputs; i++) to[i * PANEL + lane] = from ? from[i] : Value();
    }
}

bool eight_bits(const Source& s) { return s.storage == CODES8 || s.storage == HALF_CODES8; }

int code(const Source& s, int64_t row, int64_t input) {
    if (eight_bits(s)) return static_cast<const int8_t*>(s.values)[row * s.inputs + input];
    return static_cast<const uint8_t*>(s.values)[(row * s.inputs + input) / 2] >> (input % 2 ? 4 : 0) & 15;
}

template <class Scale>
void pack_codes(const Source& s, int64_t panel, char* to) {
    const Scale *scales = static_cast<const Scale*>(s.scales), *minima = static_cast<const Scale*>(s.minima);
    int64_t groups = s.inputs / s.group, step = panel_bytes(s.storage, s.group, s.group);
    for (int64_t lane = 0; lane < PANEL; lane++) {
        int64_t row = row_of(s, panel, lane);
        for (int64_t g = 0; g < groups; g++) {
            Scale* scale = reinterpret_cast<Scale*>(to + g * step) + lane;
            scale[0] = row < 0 ? Scale() : scales[row * groups + g];
            scale[PANEL] = row < 0 ? Scale() : minima[row * groups + g];
            char* codes = to + g * step + 2 * PANEL * sizeof(Scale);
            for (int64_t i = 0; i < s.group; i++) {
                int value = row < 0 ? 0 : code(s, row, g * s.group + i);
                if (eight_bits(s)) {
                    codes[i * PANEL + lane] = static_cast<char>(value);
                } else {  // the high lanes come after the low ones, so theirs are added to what is there
                    char& both = codes[i * LANES + lane % LANES];
                    both = static_cast<char>(lane < LANES ? value : both | value << 4);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// Bytes the weight takes when packed.
int64_t dspark_packed_size(const Source* s) { return panels(*s) * panel_bytes(s->storage, s->inputs, s->group); }

void dspark_pack(const Source* s, char* packed) {
    int64_t bytes = panel_bytes(s->storage, s->inputs, s->group);
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels(*s); panel++) {
        char* to = packed + panel * bytes;
        switch (s->storage) {
            case FLOAT32: pack_values(*s, panel, reinterpret_cast<float*>(to)); break;
            case BFLOAT16:
            case FLOAT16: pack_values(*s, panel, reinterpret_cast<uint16_t*>(to)); break;
            case CODES4:
            case CODES8: pack_codes<float>(*s, panel, to); break;
            default: pack_codes<uint16_t>(*s, panel, to);
        }
    }
}

}  // extern "C"
