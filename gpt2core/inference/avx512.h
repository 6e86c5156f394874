// The functions of vectors.h for processors with AVX-512 VNNI, whose instruction dpbusd adds the products of four bytes.

typedef __mmask16 Mask;  // one bit per lane

INLINE Mask first_lanes(int64_t n) { return n < LANES ? (1u << n) - 1 : 0xffff; }

INLINE int any(Mask mask) { return mask != 0; }

INLINE Mask above(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }

INLINE Mask at_least(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ); }

INLINE Mask below(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }

INLINE Mask not_finite(Floats x) { return _mm512_fpclass_ps_mask(x, 0x99); }

INLINE Mask nan_or_infinity(Floats x) { return _mm512_fpclass_ps_mask(x, 0x89); }  // not -infinity

INLINE Floats choose(Mask mask, Floats x, Floats otherwise) { return _mm512_mask_mov_ps(otherwise, mask, x); }

INLINE Ints choose_ints(Mask mask, Ints x, Ints otherwise) { return _mm512_mask_mov_epi32(otherwise, mask, x); }

INLINE Floats load_some(Mask mask, const void *at) { return _mm512_maskz_loadu_ps(mask, at); }

INLINE void store_some(void *at, Mask mask, Floats x) { _mm512_mask_storeu_ps(at, mask, x); }

// Store the lanes of the mask next to each other and return their number.
INLINE int64_t store_packed(float *at, Mask mask, Floats x) {
    int n = __builtin_popcount(mask);
    _mm512_mask_storeu_ps(at, (1u << n) - 1, _mm512_maskz_compress_ps(mask, x));
    return n;
}

INLINE Floats maximum(Floats x, Floats y) { return _mm512_max_ps(x, y); }

INLINE Floats minimum(Floats x, Floats y) { return _mm512_min_ps(x, y); }

INLINE float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }

INLINE double sum_of_doubles(Doubles x) { return _mm512_reduce_add_pd(x); }

INLINE float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }

INLINE float smallest_of(Floats x) { return _mm512_reduce_min_ps(x); }

INLINE int smallest_where(Mask mask, Ints x) { return _mm512_mask_reduce_min_epi32(mask, x); }

// Add the first (half 0) or last (half 1) eight lanes of the mask to the sums.
INLINE Doubles add_where(Doubles sums, Mask mask, int half, Doubles x) {
    return _mm512_mask_add_pd(sums, (__mmask8)(mask >> 8 * half), sums, x);
}

INLINE Ints round_to_ints(Floats x) { return _mm512_cvtps_epi32(x); }

INLINE Floats times_power_of_two(Floats x, Floats exponent) { return _mm512_scalef_ps(x, exponent); }

// ---- products --------------------------------------------------------------------------------------------------------

typedef uint8_t Input;  // a quantized activation, from 0 to 255
#define GROUP 4         // inputs whose products are summed by one instruction
#define COLUMNS 4       // vectors of outputs per tile
#define ROWS 6          // rows per pass: 24 accumulators, 4 weights and a broadcast fit into 32 registers
#define BLOCK 256       // inputs per block: all rows use a block of a tile's weights (16 kB) before the next block

INLINE void store_inputs(Input *at, Ints x) {
    _mm_storeu_si128((__m128i *)at, _mm512_cvtusepi32_epi8(_mm512_max_epi32(x, all_ints(0))));
}

INLINE Ints load_weights(const int8_t *at) { return load_ints(at); }

INLINE Ints add_products_of_group(Ints sums, Ints inputs, Ints weights) {
    return _mm512_dpbusd_epi32(sums, inputs, weights);
}

// ---- attention -------------------------------------------------------------------------------------------------------

#define LARGEST_WEIGHT 65535  // attention weights have 16 bits

INLINE void store_cached(int8_t *at, Ints x, int zero) {
    _mm_storeu_si128((__m128i *)at, _mm_xor_si128(_mm512_cvtsepi32_epi8(x), _mm_set1_epi8(zero)));
}

// A query of one head in 16 bits, as two vectors of bytes: scale * (256 * high + low).
typedef struct {
    Ints high, low;
    Ints start;  // initial value of the sums, which cancels the contribution of KEY_ZERO
} Query;

INLINE Query prepare_query(const float *x, float scale, const int width) {
    Ints zero = _mm512_set1_epi8((char)KEY_ZERO), none = all_ints(0);
    int8_t high[LINE] = {0}, low[LINE] = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        Ints v = round_to_ints(load(x + i) * (1 / scale));
        Ints rest = v << 24 >> 24;
        _mm_storeu_si128((__m128i *)(low + i), _mm512_cvtepi32_epi8(rest));
        _mm_storeu_si128((__m128i *)(high + i), _mm512_cvtepi32_epi8((v - rest) >> 8));
    }
    Query q = {load_ints(high), load_ints(low), none};
    Ints sum = (Ints)_mm512_dpbusd_epi32(none, zero, q.high) << 8;
    q.start = none - (Ints)_mm512_dpbusd_epi32(sum, zero, q.low);
    return q;
}

INLINE Ints load_bytes(const int8_t *at, const int width) {
    return _mm512_maskz_loadu_epi8(width == LINE ? ~0ull : (1ull << width) - 1, at);
}

// Return a vector whose sum is the product of the query and the key.
INLINE Ints multiply_key(const Query *q, const int8_t *at, const int width) {
    Ints key = load_bytes(at, width);
    Ints high = _mm512_dpbusd_epi32(all_ints(0), key, q->high);
    Ints low = _mm512_dpbusd_epi32(q->start, key, q->low);
    return (high << 8) + low;
}

INLINE __m128i sums_of(const Ints *x) {  // of each of QUAD vectors
    Ints ab = (Ints)_mm512_unpacklo_epi32(x[0], x[1]) + (Ints)_mm512_unpackhi_epi32(x[0], x[1]);
    Ints cd = (Ints)_mm512_unpacklo_epi32(x[2], x[3]) + (Ints)_mm512_unpackhi_epi32(x[2], x[3]);
    Ints all = (Ints)_mm512_unpacklo_epi64(ab, cd) + (Ints)_mm512_unpackhi_epi64(ab, cd);
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// The attention weights of TOKENS tokens, one lane per head: the high bytes of four tokens are together, and so are the
// low bytes.
typedef struct {
    Ints parts[TOKENS / QUAD][2];
} Weights;

INLINE void add_weight(Weights *weights, int64_t token, Ints weight) {
    Ints *part = weights->parts[token / QUAD];
    part[0] = part[0] | (Ints)_mm512_srli_epi32(weight, 8) << token % QUAD * 8;
    part[1] = part[1] | (weight & 255) << token % QUAD * 8;
}

// Interleave the bytes of four tokens x. Lane 4 i + m of y[j] gets byte 16 i + 4 j + m of each of the four tokens.
INLINE void interleave(const Ints *x, Ints *y) {
    Ints a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpacklo_epi8(x[2], x[3]);
    Ints c = _mm512_unpackhi_epi8(x[0], x[1]), d = _mm512_unpackhi_epi8(x[2], x[3]);
    y[0] = _mm512_unpacklo_epi16(a, b);
    y[1] = _mm512_unpackhi_epi16(a, b);
    y[2] = _mm512_unpacklo_epi16(c, d);
    y[3] = _mm512_unpackhi_epi16(c, d);
}

// The weighted sum of one head's values, in the order of `interleave`, for the high and for the low bytes of the weights.
typedef struct {
    Ints parts[QUAD][2];
} ValueSums;

// Add the values of n tokens, which are `stride` bytes apart.
INLINE void add_values(
    ValueSums *sums, const Weights *weights, int64_t head, const int8_t *at, int64_t stride, int64_t n, const int width
) {
    for (int64_t t = 0; t < n; t += QUAD) {
        Ints x[QUAD], values[QUAD];
        for (int j = 0; j < QUAD; j++) x[j] = load_bytes(at + (t + j < n ? t + j : 0) * stride, width);
        interleave(x, values);
        for (int part = 0; part < 2; part++) {
            Ints weight = all_ints(((int32_t *)&weights->parts[t / QUAD][part])[head]);
            for (int j = 0; j < QUAD; j++)
                sums->parts[j][part] = _mm512_dpbusd_epi32(sums->parts[j][part], weight, values[j]);
        }
    }
}

INLINE void store_values(const ValueSums *sums, float factor, float *y, const int width) {
    float part[LANES];
    for (int j = 0; j < QUAD; j++) {
        Floats high = to_floats(sums->parts[j][0]), low = to_floats(sums->parts[j][1]);
        store(part, multiply_add(high, all(256), low) * factor);
        for (int64_t d = 0; d < width; d += LANES) memcpy(y + d + j * QUAD, part + d / QUAD, QUAD * sizeof(float));
    }
}
