// Vectors of 16 floats or integers, and what native.c needs in addition to the operators + - * / << >> & |, which clang
// has for vectors. avx512.h (one register per vector) or avx2.h (two registers) has the rest.

#include <float.h>
#include <immintrin.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>

#pragma STDC FP_CONTRACT OFF  // a product and a sum are rounded once only where `multiply_add` says so

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))  // compiled once, so that all callers get the same rounding
#define LANES 16       // numbers in a vector
#define LINE 64        // bytes of a cache line, and of a vector
#define QUAD 4         // heads whose scores are summed together; with AVX-512 also tokens that are interleaved
#define TOKENS 16      // tokens whose values are read together
#define KEY_ZERO 0x80  // zero point of cached keys, which are unsigned; values are signed

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));  // half as many numbers

INLINE Floats all(float x) { return (Floats){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE Ints all_ints(int32_t x) { return (Ints){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE Ints indices(void) { return (Ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

INLINE Floats load(const void *at) {
    Floats x;
    memcpy(&x, at, sizeof x);
    return x;
}

INLINE void store(void *at, Floats x) { memcpy(at, &x, sizeof x); }

INLINE Ints load_ints(const void *at) {
    Ints x;
    memcpy(&x, at, sizeof x);
    return x;
}

INLINE Floats load_bf16(const uint16_t *at) {
    uint16_t x __attribute__((vector_size(32)));
    memcpy(&x, at, sizeof x);
    return (Floats)(__builtin_convertvector(x, Ints) << 16);
}

INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

INLINE Doubles first_doubles(Floats x) {
    return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), Doubles);
}

INLINE Doubles last_doubles(Floats x) {
    return __builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), Doubles);
}

// a * b + c, rounded once.
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return __builtin_elementwise_fma(a, b, c); }

INLINE Floats square_root(Floats x) { return __builtin_elementwise_sqrt(x); }

INLINE Floats magnitude(Floats x) { return __builtin_elementwise_abs(x); }

INLINE Floats round_to_even(Floats x) { return __builtin_elementwise_roundeven(x); }

#ifdef __AVX512VNNI__
#include "avx512.h"
#else
#include "avx2.h"
#endif
