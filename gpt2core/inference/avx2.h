// The functions of vectors.h for processors with AVX2 and FMA. A vector is two registers. The instruction madd adds the
// products of two 16-bit numbers in 32 bits; the one for bytes, maddubs, adds them in 16 bits and saturates.

typedef Ints Mask;  // lanes of all ones or all zeros
typedef int64_t Longs __attribute__((vector_size(64)));

INLINE __m256 first_half(Floats x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }

INLINE __m256 last_half(Floats x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }

INLINE __m256i first_ints(Ints x) { return (__m256i)first_half((Floats)x); }

INLINE __m256i last_ints(Ints x) { return (__m256i)last_half((Floats)x); }

INLINE Floats join(__m256 first, __m256 last) {
    return __builtin_shufflevector(first, last, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

INLINE Ints join_ints(__m256i first, __m256i last) { return (Ints)join((__m256)first, (__m256)last); }

INLINE Mask first_lanes(int64_t n) { return indices() < all_ints(n < LANES ? (int32_t)n : LANES); }

INLINE int bits_of(Mask mask) {
    return _mm256_movemask_ps(first_half((Floats)mask)) | _mm256_movemask_ps(last_half((Floats)mask)) << 8;
}

INLINE int any(Mask mask) { return bits_of(mask) != 0; }

INLINE Mask above(Floats x, Floats y) { return x > y; }

INLINE Mask at_least(Floats x, Floats y) { return x >= y; }

INLINE Mask below(Floats x, Floats y) { return x < y; }

INLINE Mask not_finite(Floats x) { return ~(magnitude(x) <= all(FLT_MAX)); }

INLINE Mask nan_or_infinity(Floats x) { return ~(x <= all(FLT_MAX)); }  // not -infinity

INLINE Floats choose(Mask mask, Floats x, Floats otherwise) {
    return join(
        _mm256_blendv_ps(first_half(otherwise), first_half(x), first_half((Floats)mask)),
        _mm256_blendv_ps(last_half(otherwise), last_half(x), last_half((Floats)mask))
    );
}

INLINE Ints choose_ints(Mask mask, Ints x, Ints otherwise) { return (Ints)choose(mask, (Floats)x, (Floats)otherwise); }

INLINE Floats load_some(Mask mask, const void *at) {
    const float *x = at;
    return join(_mm256_maskload_ps(x, first_ints(mask)), _mm256_maskload_ps(x + LANES / 2, last_ints(mask)));
}

// A masked store takes many cycles on AMD, so whole vectors are stored without a mask.
INLINE void store_some(void *at, Mask mask, Floats x) {
    if (bits_of(mask) == 0xffff) return store(at, x);
    float *y = at;
    _mm256_maskstore_ps(y, first_ints(mask), first_half(x));
    _mm256_maskstore_ps(y + LANES / 2, last_ints(mask), last_half(x));
}

// Store the lanes of the mask next to each other and return their number.
INLINE int64_t store_packed(float *at, Mask mask, Floats x) {
    int64_t n = 0;
    for (int bits = bits_of(mask); bits; bits &= bits - 1) at[n++] = x[__builtin_ctz(bits)];
    return n;
}

INLINE Floats maximum(Floats x, Floats y) {
    return join(_mm256_max_ps(first_half(x), first_half(y)), _mm256_max_ps(last_half(x), last_half(y)));
}

INLINE Floats minimum(Floats x, Floats y) {
    return join(_mm256_min_ps(first_half(x), first_half(y)), _mm256_min_ps(last_half(x), last_half(y)));
}

// The same order of additions as with AVX-512.
INLINE float sum_of(Floats x) {
    __m256 eight = first_half(x) + last_half(x);
    __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
}

INLINE double sum_of_doubles(Doubles x) {
    __m256d first = __builtin_shufflevector(x, x, 0, 1, 2, 3), four = first + __builtin_shufflevector(x, x, 4, 5, 6, 7);
    __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
    return two[0] + two[1];
}

INLINE float largest_of(Floats x) {
    __m256 eight = _mm256_max_ps(first_half(x), last_half(x));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_max_ss(two, _mm_movehdup_ps(two))[0];
}

INLINE float smallest_of(Floats x) { return -largest_of(-x); }

INLINE int smallest_where(Mask mask, Ints x) { return __builtin_reduce_min(choose_ints(mask, x, all_ints(INT_MAX))); }

// Add the first (half 0) or last (half 1) eight lanes of the mask to the sums.
INLINE Doubles add_where(Doubles sums, Mask mask, int half, Doubles x) {
    Longs first = __builtin_convertvector(__builtin_shufflevector(mask, mask, 0, 1, 2, 3, 4, 5, 6, 7), Longs);
    Longs last = __builtin_convertvector(__builtin_shufflevector(mask, mask, 8, 9, 10, 11, 12, 13, 14, 15), Longs);
    return sums + (Doubles)((half ? last : first) & (Longs)x);
}

INLINE Ints round_to_ints(Floats x) {
    return join_ints(_mm256_cvtps_epi32(first_half(x)), _mm256_cvtps_epi32(last_half(x)));
}

// The exponent is a whole number from -126 to 127, or NaN if x is NaN.
INLINE Floats times_power_of_two(Floats x, Floats exponent) {
    return x * (Floats)((round_to_ints(exponent) + 127) << 23);
}

// 16 numbers as 16-bit integers, limited to their range.
INLINE __m256i to_words(Ints x) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(first_ints(x), last_ints(x)), 0xd8);
}

INLINE __m128i load_16(const void *at) { return _mm_loadu_si128(at); }

// ---- products --------------------------------------------------------------------------------------------------------

typedef int16_t Input;  // a quantized activation, from 0 to 255
#define GROUP 2         // inputs whose products are summed by one instruction
#define COLUMNS 1       // vectors of outputs per tile
#define ROWS 6          // rows per pass: 12 accumulators, 2 weights, a broadcast and a product fit into 16 registers
#define BLOCK 1024      // inputs per block: all rows use a block of a tile's weights (16 kB) before the next block

INLINE void store_inputs(Input *at, Ints x) {
    _mm256_storeu_si256((__m256i *)at, _mm256_max_epi16(
        _mm256_min_epi16(to_words(x), _mm256_set1_epi16(255)), _mm256_setzero_si256()
    ));
}

INLINE Ints load_weights(const int8_t *at) {
    return join_ints(_mm256_cvtepi8_epi16(load_16(at)), _mm256_cvtepi8_epi16(load_16(at + 16)));
}

INLINE Ints add_products_of_group(Ints sums, Ints inputs, Ints weights) {
    __m256i first = _mm256_madd_epi16(first_ints(inputs), first_ints(weights));
    return sums + join_ints(first, _mm256_madd_epi16(last_ints(inputs), last_ints(weights)));
}

// ---- attention -------------------------------------------------------------------------------------------------------

#define LARGEST_WEIGHT 32767  // attention weights have 15 bits, since words are signed

INLINE void store_cached(int8_t *at, Ints x, int zero) {
    __m256i words = to_words(x);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)at, _mm_xor_si128(bytes, _mm_set1_epi8(zero)));
}

// A query of one head in 16 bits.
typedef struct {
    __m256i words[LINE / LANES];
    Ints start;  // initial value of the sums, which cancels the contribution of KEY_ZERO
} Query;

INLINE Query prepare_query(const float *x, float scale, const int width) {
    Query q;
    __m256i sums = _mm256_setzero_si256(), zero = _mm256_set1_epi16(KEY_ZERO);
    for (int64_t i = 0; i < width; i += LANES) {
        q.words[i / LANES] = to_words(round_to_ints(load(x + i) * (1 / scale)));
        sums = _mm256_sub_epi32(sums, _mm256_madd_epi16(zero, q.words[i / LANES]));
    }
    q.start = join_ints(sums, _mm256_setzero_si256());
    return q;
}

// Return a vector whose sum is the product of the query and the key.
INLINE Ints multiply_key(const Query *q, const int8_t *at, const int width) {
    __m256i sums = first_ints(q->start);
    for (int64_t i = 0; i < width; i += LANES)
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_cvtepu8_epi16(load_16(at + i)), q->words[i / LANES]));
    return join_ints(sums, _mm256_setzero_si256());
}

INLINE __m128i sums_of(const Ints *x) {  // of each of QUAD vectors
    __m256i ab = _mm256_hadd_epi32(first_ints(x[0]), first_ints(x[1]));
    __m256i cd = _mm256_hadd_epi32(first_ints(x[2]), first_ints(x[3]));
    __m256i all = _mm256_hadd_epi32(ab, cd);
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// The attention weights of TOKENS tokens, one lane per head: two tokens together.
typedef struct {
    Ints pairs[TOKENS / 2];
} Weights;

INLINE void add_weight(Weights *weights, int64_t token, Ints weight) {
    weights->pairs[token / 2] = weights->pairs[token / 2] | weight << token % 2 * 16;
}

// The weighted sum of one head's values. In integers it could exceed 32 bits after 500 tokens.
typedef struct {
    Floats sums[LINE / LANES];
} ValueSums;

// Add the values of n tokens, which are `stride` bytes apart.
INLINE void add_values(
    ValueSums *sums, const Weights *weights, int64_t head, const int8_t *at, int64_t stride, int64_t n, const int width
) {
    __m256i totals[LINE / LANES][2];
    memset(totals, 0, sizeof totals);
    for (int64_t t = 0; t < n; t += 2) {
        const int8_t *x = at + t * stride, *next = t + 1 < n ? x + stride : x;
        __m256i pair = _mm256_set1_epi32(((int32_t *)&weights->pairs[t / 2])[head]);
        for (int64_t i = 0; i < width; i += LANES) {
            __m128i a = load_16(x + i), b = load_16(next + i);
            __m256i low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
            __m256i high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
            totals[i / LANES][0] = _mm256_add_epi32(totals[i / LANES][0], _mm256_madd_epi16(low, pair));
            totals[i / LANES][1] = _mm256_add_epi32(totals[i / LANES][1], _mm256_madd_epi16(high, pair));
        }
    }
    for (int64_t i = 0; i < width / LANES; i++) sums->sums[i] += to_floats(join_ints(totals[i][0], totals[i][1]));
}

INLINE void store_values(const ValueSums *sums, float factor, float *y, const int width) {
    for (int64_t i = 0; i < width; i += LANES) store(y + i, sums->sums[i / LANES] * factor);
}
