// Faults that the sanitizers must see, or their silence about the kernels says nothing. In sanitized test builds only.
#include <cstdint>

extern "C" {

float planted_read(const float* x, int64_t count) { return x[count]; }
void planted_write(float* x, int64_t count) { x[count] = 1.0f; }
int32_t planted_overflow(int32_t x) { return x + 1; }
int32_t planted_cast(float x) { return static_cast<int32_t>(x); }
int32_t planted_shift(int32_t by) { return 1 << by; }

}  // extern "C"
