// int8 inference on x86 processors with AVX-512 VNNI or AVX2: matrix products fused with what surrounds them, attention,
// sampling. It is compiled once for each (vectors.h). native.py loads it and documents the layouts. Each row of a result
// is computed by the same instructions in the same order, independent of the other rows, so a completion does not depend
// on the batch.

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

#define INTERFACE 8  // as in native.py; raise both if a structure or function that native.py uses changes
#define TILE (LANES * COLUMNS)      // outputs whose weights are stored together
#define STEP 4                      // inputs per iteration of a product
#define LINES (TILE * STEP / LINE)  // lines of weights per iteration
#define ROW_GROUP 48                // rows whose sums are kept together
#define PREFETCH_DISTANCE 4096  // bytes in front of the reads, if weights are read in a single pass

int interface(void) { return INTERFACE; }

const int tile = TILE, group = GROUP;  // the layout of the weights

// ---- threads ---------------------------------------------------------------------------------------------------------
// A small thread pool instead of OpenMP. OpenMP's barrier at the end of a region waits for every worker, so on a machine
// with other work, one worker that lost its core delays each region. This pool only waits for workers with a started
// job.

#define SPINS 2000  // iterations of a waiting thread before it sleeps or yields: some tens of microseconds

typedef struct {
    _Alignas(LINE) atomic_ullong remaining;  // jobs [begin, end): begin in the upper 32 bits, end in the lower 32 bits
} Share;

typedef struct {
    void (*work)(void *, int64_t, int64_t);  // called with the arguments, and begin and end of a range of jobs
    void *arguments;
    Share *shares;  // remaining jobs of each thread
    int n_shares;
} Jobs;

static _Atomic(Jobs *) current;
static atomic_int n_inside, n_asleep, is_busy, n_workers;
static atomic_uint generation;  // counts the values of `current`

// Take half of the remaining jobs of a share: the first ones of the thread's own share, the last ones of another
// thread's.
static int take(Share *share, int is_own, int64_t *first, int64_t *end) {
    unsigned long long remaining = atomic_load(&share->remaining), rest;
    do {
        int64_t begin = remaining >> 32, stop = remaining & UINT32_MAX, n = (stop - begin + 1) / 2;
        if (!n) return 0;
        *first = is_own ? begin : stop - n;
        *end = *first + n;
        rest = is_own ? (uint64_t)*end << 32 | stop : (uint64_t)begin << 32 | *first;
    } while (!atomic_compare_exchange_weak(&share->remaining, &remaining, rest));
    return 1;
}

// A thread does the jobs of its own share in order, since neighboring jobs read neighboring memory. Then it takes jobs
// of the other threads.
static void take_jobs(Jobs *jobs, int64_t thread) {
    int64_t first, end;
    for (int i = 0; i < jobs->n_shares;)
        if (take(jobs->shares + (thread + i) % jobs->n_shares, !i, &first, &end)) jobs->work(jobs->arguments, first, end);
        else i++;
}

static void *worker(void *thread) {
    for (unsigned seen = 0;;) {
        for (int i = 0; i < SPINS && atomic_load(&generation) == seen; i++) _mm_pause();
        if (atomic_load(&generation) == seen) {
            atomic_fetch_add(&n_asleep, 1);
            syscall(SYS_futex, &generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&n_asleep, 1);
        }
        seen = atomic_load(&generation);
        atomic_fetch_add(&n_inside, 1);  // before `current` is read: from here on, its owner waits for this thread
        Jobs *jobs = atomic_load(&current);
        if (jobs) take_jobs(jobs, (intptr_t)thread);
        atomic_fetch_sub(&n_inside, 1);
    }
    return NULL;
}

static void for_each(int64_t count, void (*work)(void *, int64_t, int64_t), void *arguments, int is_small) {
    if (is_small || count < 2 || atomic_exchange(&is_busy, 1)) {  // another thread uses the pool
        work(arguments, 0, count);
        return;
    }
    int64_t n = atomic_load(&n_workers) + 1;
    Share shares[n];
    for (int64_t i = 0; i < n; i++)
        atomic_init(&shares[i].remaining, (uint64_t)(count * i / n) << 32 | count * (i + 1) / n);
    Jobs jobs = {work, arguments, shares, n};
    atomic_store(&current, &jobs);
    atomic_fetch_add(&generation, 1);
    if (atomic_load(&n_asleep)) syscall(SYS_futex, &generation, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    take_jobs(&jobs, 0);
    atomic_store(&current, NULL);
    for (int i = 0; atomic_load(&n_inside); i++)
        if (i < SPINS) _mm_pause();
        else sched_yield();
    atomic_store(&is_busy, 0);
}

// Use n threads, including the calling thread.
void set_threads(int n) {
    pthread_t thread;
    while (atomic_load(&n_workers) < n - 1) {
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(atomic_load(&n_workers) + 1))) return;
        pthread_detach(thread);
        atomic_fetch_add(&n_workers, 1);
    }
}

// ---- functions of vectors --------------------------------------------------------------------------------------------

// min and max return their second operand if one of them is NaN. With this order of operands, NaN stays NaN.
INLINE Floats clamp(Floats x, float low, float high) {
    return maximum(all(low), minimum(all(high), x));
}

// exp(x) with an error of at most 2 units in the last place, by the polynomial of Cephes (S. Moshier, expf).
INLINE Floats exponential(Floats x) {
    x = clamp(x, -87.0f, 88.0f);
    Floats n = round_to_even(x * 1.44269504f);
    x = multiply_add(-n, all(0.693359375f), x);
    x = multiply_add(-n, all(-2.12194440e-4f), x);
    Floats y = all(1.9875691500e-4f);
    y = multiply_add(y, x, all(1.3981999507e-3f));
    y = multiply_add(y, x, all(8.3334519073e-3f));
    y = multiply_add(y, x, all(4.1665795894e-2f));
    y = multiply_add(y, x, all(1.6666665459e-1f));
    y = multiply_add(y, x, all(5.0000001201e-1f));
    y = multiply_add(y, x * x, x) + 1.0f;
    return times_power_of_two(y, n);
}

// GELU in its tanh form: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
INLINE Floats gelu(Floats x) {
    Floats inner = multiply_add(x * x, all(0.044715f), all(1.0f));
    Floats e = exponential(x * inner * -1.5957691216f);
    return x / (e + 1.0f);
}

NOINLINE void normalise_row(const float *x, const float *weight, const float *bias, float eps, float *y, int64_t width) {
    Floats sum = all(0), squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) sum = sum + load(x + i);
    Floats mean = all(sum_of(sum) / width);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats d = load(x + i) - mean;
        squares = multiply_add(d, d, squares);
    }
    Floats variance = all(sum_of(squares) / width + eps);
    Floats inverse = all(1.0f) / square_root(variance);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats d = (load(x + i) - mean) * inverse;
        store(y + i, multiply_add(d, load(weight + i), load(bias + i)));
    }
}

// Quantize a row: x = scale * (q - zero). The range of q, 0 to 255, covers the row's values and 0. A row with a value
// that is not finite gets the scale NaN, so that its results are NaN too.
NOINLINE void quantize_row(const float *x, Input *q, float *scale, int32_t *zero, int64_t width) {
    Floats low = all(0), high = all(0);
    Mask is_bad = first_lanes(0);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats v = load(x + i);
        low = minimum(low, v);
        high = maximum(high, v);
        is_bad |= not_finite(v);
    }
    float least = smallest_of(low);
    float range = largest_of(high) - least;
    if (any(is_bad) || range > FLT_MAX) {
        *scale = __builtin_nanf("");
        *zero = 0;
        memset(q, 0, width * sizeof(Input));
        return;
    }
    *scale = range / 255 > 1e-30f ? range / 255 : 1e-30f;
    *zero = (int32_t)(-least / *scale + 0.5f);
    Floats inverse = all(1 / *scale), origin = all((float)*zero);
    for (int64_t i = 0; i < width; i += LANES) {
        store_inputs(q + i, round_to_ints(multiply_add(load(x + i), inverse, origin)));
    }
}

// ---- y = f(x) W^T + b ------------------------------------------------------------------------------------------------

typedef struct {
    const int8_t *weights;  // [out / TILE][in / GROUP][TILE][GROUP]; out is padded to whole tiles, here and below
    const float *scale, *bias;
    const int32_t *sums;  // sum of each row of W
    int64_t in, out, n_tiles;
} Matrix;

typedef struct {
    float *normed;  // (n, in): output of the layer norm
    Input *q;  // (n, in)
    float *scale;  // (n)
    int32_t *zero;  // (n)
} Scratch;

typedef struct {
    const Matrix *matrix;
    const float *x;  // (n, in)
    const float *norm_weight, *norm_bias;  // parameters of a layer norm before the product; NULL: no norm
    float *y;  // (n, out)
    Scratch scratch;
    int64_t n;
    float eps;
    int32_t applies_gelu, adds;  // adds: add to y instead of overwriting it
} Product;

static void prepare_rows(void *pointer, int64_t n, int64_t end) {
    const Product *p = pointer;
    for (int64_t in = p->matrix->in; n < end; n++) {
        const float *x = p->x + n * in;
        if (p->norm_weight) {
            normalise_row(x, p->norm_weight, p->norm_bias, p->eps, p->scratch.normed + n * in, in);
            x = p->scratch.normed + n * in;
        }
        quantize_row(x, p->scratch.q + n * in, p->scratch.scale + n, p->scratch.zero + n, in);
    }
}

NOINLINE void finish_row(const Product *p, const Ints *sums, int64_t n, int64_t tile) {
    const Matrix *m = p->matrix;
    Floats x_scale = all(p->scratch.scale[n]);
    Ints zero = all_ints(p->scratch.zero[n]);
    for (int64_t o = tile * TILE; o < (tile + 1) * TILE && o < m->out; o += LANES, sums++) {
        Mask mask = first_lanes(m->out - o);
        Ints whole = *sums - zero * load_ints(m->sums + o);
        Floats y = to_floats(whole) * (x_scale * load(m->scale + o)) + load(m->bias + o);
        if (p->applies_gelu) y = gelu(y);
        float *out = p->y + n * m->out + o;
        if (p->adds) y = y + load_some(mask, out);
        store_some(out, mask, y);
    }
}

// sums[r] += q[r] * w for `rows` rows q, which are `in` inputs apart, and n_in inputs of a tile's weights. Meanwhile,
// 1 / n_passes of the next block, at `next`, is prefetched into the L2 cache.
INLINE void add_products(
    const Input *q, int64_t in, const int rows, const int8_t *w, int64_t n_in, Ints *sums,
    const int8_t *next, int n_passes
) {
    Ints totals[ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++) totals[r][c] = sums[r * COLUMNS + c];
    int due = 0;
    for (int64_t k = 0; k < n_in; k += STEP) {
        for (due += LINES; due >= n_passes; due -= n_passes, next += LINE) _mm_prefetch(next, _MM_HINT_T1);
        for (int64_t i = k; i < k + STEP; i += GROUP, w += TILE * GROUP) {
            Ints weights[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) weights[c] = load_weights(w + c * LANES * GROUP);
            for (int r = 0; r < rows; r++) {
                int32_t group;
                memcpy(&group, q + r * in + i, sizeof group);
                Ints x = all_ints(group);
                for (int c = 0; c < COLUMNS; c++) totals[r][c] = add_products_of_group(totals[r][c], x, weights[c]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++) sums[r * COLUMNS + c] = totals[r][c];
}

// Multiply a tile with at most ROW_GROUP rows, starting at row n. The rows are divided evenly into passes of at most
// ROWS. All passes over a BLOCK of inputs run before the next block, which they prefetch. Only the first pass reads a
// block from the L2 cache, the others read it from the L1 cache: reads from L2 and prefetches share the few line fill
// buffers of a core.
NOINLINE void tile_rows(const Product *p, int64_t tile, int64_t n, int64_t n_rows) {
    int64_t in = p->matrix->in, n_passes = (n_rows + ROWS - 1) / ROWS, block = n_passes == 1 ? in : BLOCK;
    Ints sums[ROW_GROUP][COLUMNS];
    for (int64_t r = 0; r < n_rows; r++)
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = all_ints(0);
    for (int64_t k = 0; k < in; k += block) {
        int64_t n_in = in - k < block ? in - k : block, n_lines = n_in / STEP * LINES;
        const int8_t *w = p->matrix->weights + (tile * in + k) * TILE;
        const int8_t *next = w + (n_passes == 1 ? PREFETCH_DISTANCE : n_in * TILE);
        for (int64_t pass = 0; pass < n_passes; pass++) {
            int64_t first = n_rows * pass / n_passes, rows = n_rows * (pass + 1) / n_passes - first;
            const Input *q = p->scratch.q + (n + first) * in + k;
            const int8_t *line = next + n_lines * pass / n_passes * LINE;
            switch (rows) {
                case 6: add_products(q, in, 6, w, n_in, sums[first], line, n_passes); break;
                case 5: add_products(q, in, 5, w, n_in, sums[first], line, n_passes); break;
                case 4: add_products(q, in, 4, w, n_in, sums[first], line, n_passes); break;
                case 3: add_products(q, in, 3, w, n_in, sums[first], line, n_passes); break;
                case 2: add_products(q, in, 2, w, n_in, sums[first], line, n_passes); break;
                case 1: add_products(q, in, 1, w, n_in, sums[first], line, n_passes); break;
            }
        }
    }
    for (int64_t r = 0; r < n_rows; r++) finish_row(p, sums[r], n + r, tile);
}

static void compute_tiles(void *pointer, int64_t tile, int64_t end) {
    const Product *p = pointer;
    int64_t groups = (p->n + ROW_GROUP - 1) / ROW_GROUP;
    for (; tile < end; tile++)
        for (int64_t group = 0; group < groups; group++) {
            int64_t n = p->n * group / groups;
            tile_rows(p, tile, n, p->n * (group + 1) / groups - n);
        }
}

void product(Product *p) {
    for_each(p->n, prepare_rows, p, p->n < 8);
    for_each(p->matrix->n_tiles, compute_tiles, p, 0);
}

// ---- attention -------------------------------------------------------------------------------------------------------

typedef struct {
    int8_t *k, *v;  // key and value of the sequence's first token in the first layer
    int64_t layer_stride;  // bytes
    int64_t past, n;  // number of tokens in the cache, and of new tokens after them
    int64_t row;  // row of the first new token
} Sequence;

typedef struct {
    const float *qkv;  // (rows, 3, heads, width)
    float *y;  // (rows, heads, width)
    const Sequence *sequences;
    int64_t n_sequences, heads, width, layer;
    float scale;
} Attention;

// Location of the keys or values of neighboring heads of a sequence. A token has `width` bytes per head, with x = scale
// * (byte - zero), and then the scales of all heads, padded to a multiple of the width.
typedef struct {
    int8_t *bytes;  // address of the first head of the first token
    int64_t scales;  // bytes from `bytes` to the scale of this head
    int64_t stride;  // bytes from one token to the next
} Cache;

INLINE Floats load_scales(const Cache *cache, int64_t token, int64_t heads) {
    return load_some(first_lanes(heads), cache->bytes + token * cache->stride + cache->scales);
}

INLINE void prefetch_heads(const Cache *cache, int64_t token, int64_t bytes) {
    const char *at = (const char *)cache->bytes + token * cache->stride;
    for (int64_t i = 0; i < bytes; i += LINE) _mm_prefetch(at + i, _MM_HINT_T1);
    _mm_prefetch(at + cache->scales, _MM_HINT_T1);
}

// Return the scale for which x / scale is from -most to most. It is NaN if x is not finite: its results are then NaN.
INLINE float find_scale(const float *x, int64_t width, float most) {
    Floats largest = all(0);
    Mask is_bad = first_lanes(0);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats v = load(x + i);
        largest = maximum(largest, magnitude(v));
        is_bad |= not_finite(v);
    }
    float scale = largest_of(largest) / most;
    return any(is_bad) ? __builtin_nanf("") : scale > 1e-30f ? scale : 1e-30f;
}

NOINLINE void store_heads(const Cache *cache, int64_t token, const float *x, int64_t heads, int64_t width, int zero) {
    int8_t *bytes = cache->bytes + token * cache->stride;
    float *scales = (float *)(bytes + cache->scales);
    for (int64_t h = 0; h < heads; h++) {
        scales[h] = find_scale(x + h * width, width, 127);
        for (int64_t i = h * width; i < (h + 1) * width; i += LANES)
            store_cached(bytes + i, round_to_ints(load(x + i) * (1 / scales[h])), zero);
    }
}

// Attention of one query, for at most LANES neighboring heads. Keys, and then values, are read in the order of memory.
// While the keys are read, the values are prefetched; while the values are read, the keys of the next query. scores is
// (tokens, LANES): one lane per head.
INLINE void attend_query(
    const float *q, const Cache *k, const Cache *v, const Cache *next, float *y, int64_t length, int64_t heads,
    float scale, const int width
) {
    Floats scores[length];  // on the stack: native.py limits the length (MAX_POSITIONS)
    Query queries[LANES];
    float query_scales[LANES] = {0};
    for (int64_t h = 0; h < heads; h++) {
        query_scales[h] = find_scale(q + h * width, width, 127 * 256);
        queries[h] = prepare_query(q + h * width, query_scales[h], width);
    }
    for (int64_t i = 0; i < length; i++) {
        prefetch_heads(v, i, heads * width);
        for (int64_t h = 0; h < heads; h += QUAD) {
            Ints sums[QUAD];
            for (int j = 0; j < QUAD; j++) {
                int64_t head = h + j < heads ? h + j : heads - 1;
                sums[j] = multiply_key(queries + head, k->bytes + i * k->stride + head * width, width);
            }
            _mm_storeu_si128((__m128i *)(scores + i) + h / QUAD, sums_of(sums));
        }
    }
    Floats most = all(-FLT_MAX), total = all(0);
    Floats scaled = load(query_scales) * scale;
    for (int64_t i = 0; i < length; i++) {
        scores[i] = to_floats((Ints)scores[i]);
        scores[i] = scores[i] * (scaled * load_scales(k, i, heads));
        most = maximum(most, scores[i]);
    }
    Floats largest = all(1e-30f);
    for (int64_t i = 0; i < length; i++) {
        Floats e = exponential(scores[i] - most);
        scores[i] = e * load_scales(v, i, heads);
        largest = maximum(largest, scores[i]);
        total = multiply_add(scores[i], all(0), total + e);  // NaN if the scale is NaN
    }
    Floats weight_scale = largest / LARGEST_WEIGHT;
    Floats inverse = all(1.0f) / weight_scale;
    ValueSums sums[heads];
    memset(sums, 0, sizeof sums);
    for (int64_t i = 0; i < length; i += TOKENS) {
        int64_t n = length - i < TOKENS ? length - i : TOKENS;
        Weights weights = {0};
        for (int64_t t = 0; t < n; t++) {
            prefetch_heads(next, i + t, heads * width);
            add_weight(&weights, t, round_to_ints(scores[i + t] * inverse));
        }
        const int8_t *first = v->bytes + i * v->stride;
        for (int64_t h = 0; h < heads; h++)
            add_values(sums + h, &weights, h, first + h * width, v->stride, n, width);
    }
    float factors[LANES];
    store(factors, weight_scale / total);
    for (int64_t h = 0; h < heads; h++) store_values(sums + h, factors[h], y + h * width, width);
}

INLINE Cache keys_of(const Attention *a, int64_t job) {
    const Sequence *s = a->sequences + job / a->heads;
    int64_t head = job % a->heads, bytes = a->heads * a->width;
    int64_t padded = (a->heads * (int64_t)sizeof(float) + a->width - 1) / a->width * a->width;
    int8_t *first = s->k + a->layer * s->layer_stride + head * a->width;
    return (Cache){first, bytes + head * (int64_t)(sizeof(float) - a->width), bytes + padded};
}

// A job is one head of one sequence.
static void attend_heads(void *pointer, int64_t job, int64_t end) {
    const Attention *a = pointer;
    int64_t width = a->width, row_width = a->heads * width, last = a->n_sequences * a->heads - 1;
    for (int64_t heads; job < end; job += heads) {
        const Sequence *s = a->sequences + job / a->heads;
        int64_t head = job % a->heads;
        heads = a->heads - head < end - job ? a->heads - head : end - job;
        if (heads > LANES) heads = LANES;
        Cache k = keys_of(a, job), v = k, after = keys_of(a, job + heads < last ? job + heads : last);
        v.bytes += s->v - s->k;
        for (int64_t i = 0; i < s->n; i++) {
            const float *qkv = a->qkv + (s->row + i) * 3 * row_width + head * width;
            store_heads(&k, s->past + i, qkv + row_width, heads, width, KEY_ZERO);
            store_heads(&v, s->past + i, qkv + 2 * row_width, heads, width, 0);
            float *y = a->y + (s->row + i) * row_width + head * width;
            const Cache *next = i + 1 < s->n ? &k : &after;
            int64_t length = s->past + i + 1;
            if (width == 64) attend_query(qkv, &k, &v, next, y, length, heads, a->scale, 64);
            else if (width == 32) attend_query(qkv, &k, &v, next, y, length, heads, a->scale, 32);
            else attend_query(qkv, &k, &v, next, y, length, heads, a->scale, 16);
        }
    }
}

// ---- the layers of a step --------------------------------------------------------------------------------------------

#define RANKS 4    // ranks computed together; the rank of an adapter is padded to a multiple of this
#define SLICES 3   // slices of a matrix's outputs that adapters change independently: q, k and v
enum { ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, MATRICES };

typedef struct {
    const uint16_t *a, *b;  // bf16; A as [rank / RANKS][in / LANES][RANKS][LANES], B as [width / LANES][rank][LANES]
    int64_t rank, first, width;  // changes the outputs first to first + width; rank 0: no change
} LowRank;

typedef struct {
    const Matrix *matrices[MATRICES];
    const float *norms[4];  // weight and bias of the first layer norm, then of the second one
    float scale;  // scale of the attention scores
} Layer;

typedef struct {
    const Layer *layers;
    const Sequence *sequences;
    const LowRank *adapters;  // [n_layers][MATRICES][n_adapters][SLICES]; NULL: no row has an adapter
    const int64_t *rows;  // (n): index of each row's adapter; -1: no adapter
    float *x, *qkv, *y, *a;  // (n, C) hidden states, before and after; (n, 3 * C); (n, C); (n, width of the MLP)
    Scratch scratch;
    int64_t n, n_layers, n_sequences, n_adapters, heads, width;
    float eps;
} Step;

typedef struct {
    const LowRank *adapters;  // [n_adapters][SLICES]
    const int64_t *rows;
    const float *x;
    float *y;
    int64_t in, out;
    int applies_gelu;
} Deltas;

// bf16 numbers of an adapter, which is read in order
INLINE Floats load_low_rank(const uint16_t *x) {
    _mm_prefetch((const char *)x + PREFETCH_DISTANCE, _MM_HINT_T1);
    return load_bf16(x);
}

static void add_delta(const Deltas *d, int64_t n) {
    const float *x = d->x + n * d->in;
    float *row = d->y + n * d->out;
    for (int slice = 0; d->rows[n] >= 0 && slice < SLICES; slice++) {
        const LowRank *l = d->adapters + d->rows[n] * SLICES + slice;
        if (!l->rank) continue;
        const uint16_t *a = l->a, *b = l->b;
        float low[l->rank], *y = row + l->first;
        for (int64_t r = 0; r < l->rank; r += RANKS) {
            Floats sums[RANKS];
            for (int j = 0; j < RANKS; j++) sums[j] = all(0);
            for (int64_t i = 0; i < d->in; i += LANES)
                for (int j = 0; j < RANKS; j++, a += LANES)
                    sums[j] = multiply_add(load(x + i), load_low_rank(a), sums[j]);
            for (int j = 0; j < RANKS; j++) low[r + j] = sum_of(sums[j]);
        }
        for (int64_t o = 0; o < l->width; o += LANES) {
            Floats sum = load(y + o);
            for (int64_t r = 0; r < l->rank; r++, b += LANES)
                sum = multiply_add(all(low[r]), load_low_rank(b), sum);
            store(y + o, sum);
        }
    }
    for (int64_t o = 0; d->applies_gelu && o < d->out; o += LANES)
        store(row + o, gelu(load(row + o)));
}

static void add_deltas(void *pointer, int64_t n, int64_t end) {
    for (; n < end; n++) add_delta(pointer, n);
}

// y = f(x) W^T + b, or y += for the output projections, plus each row's own low-rank product.
static void project(const Step *s, int64_t layer, int index, const float *x, float *y) {
    const Layer *l = s->layers + layer;
    const Matrix *m = l->matrices[index];
    const float *const *norm = l->norms + (index == MLP_IN ? 2 : 0);
    int has_norm = index == ATTENTION_IN || index == MLP_IN, is_changed = 0;
    const LowRank *adapters = s->adapters + (layer * MATRICES + index) * s->n_adapters * SLICES;
    for (int64_t i = 0; s->adapters && i < s->n_adapters * SLICES; i++) is_changed |= adapters[i].rank > 0;
    int applies_gelu = index == MLP_IN && !is_changed;
    Product p = {m, x, has_norm ? norm[0] : NULL, norm[1], y, s->scratch, s->n, s->eps, applies_gelu, !has_norm};
    product(&p);
    Deltas d = {adapters, s->rows, has_norm ? s->scratch.normed : x, y, m->in, m->out, index == MLP_IN};
    if (is_changed) for_each(s->n, add_deltas, &d, s->n < 4);
}

void step(Step *s) {
    for (int64_t layer = 0; layer < s->n_layers; layer++) {
        project(s, layer, ATTENTION_IN, s->x, s->qkv);
        Attention a = {s->qkv, s->y, s->sequences, s->n_sequences, s->heads, s->width, layer, s->layers[layer].scale};
        for_each(a.n_sequences * a.heads, attend_heads, &a, 0);
        project(s, layer, ATTENTION_OUT, s->y, s->x);
        project(s, layer, MLP_IN, s->x, s->a);
        project(s, layer, MLP_OUT, s->a, s->x);
    }
}

// ---- the most likely tokens ------------------------------------------------------------------------------------------

typedef struct {
    const float *logits;  // (n, width)
    int64_t n, width;
    int64_t *tokens;  // (n)
} Logits;

static void find_largest(const Logits *l, int64_t n) {
    const float *x = l->logits + n * l->width;
    Floats most = all(-__builtin_inff());
    Ints index = indices(), at = index;
    Mask is_bad = first_lanes(0);
    for (int64_t i = 0; i < l->width; i += LANES) {
        Mask mask = first_lanes(l->width - i);
        Floats v = choose(mask, load_some(mask, x + i), all(-__builtin_inff()));
        Mask is_larger = above(v, most);
        is_bad |= nan_or_infinity(v);
        most = choose(is_larger, v, most);
        at = choose_ints(is_larger, index, at);
        index = index + LANES;
    }
    float largest = largest_of(most);
    Mask is_largest = at_least(most, all(largest));
    l->tokens[n] = any(is_bad) || largest < -FLT_MAX ? -1 : smallest_where(is_largest, at);
}

static void find_largest_each(void *pointer, int64_t n, int64_t end) {
    for (; n < end; n++) find_largest(pointer, n);
}

void most_likely(Logits *l) { for_each(l->n, find_largest_each, l, l->n < 2); }

// ---- sampling --------------------------------------------------------------------------------------------------------

typedef struct {
    const float *logits;  // (width)
    float *weights;       // (2, width) scratch: probabilities relative to the largest one; memory of `Search`
    int64_t width, top_k;
    double top_p, number;  // number: uniform random number in [0, 1)
    float temperature, min_p;
    int64_t token;  // the result
} Draw;

#define LIMITS 8

typedef struct {
    const float *weights;  // weights that may still be the limit
    int64_t width;
    float *rest;  // memory for the weights that remain after a round
    double above, target;  // sum of the weights above these, and the sum to reach
    int counts;  // true: count the weights instead of adding them
} Search;

// Return the largest i such that the sum of the weights >= limits[i] reaches the target, otherwise 0. Then keep only
// the weights from limits[i] to below limits[i + 1] in the search.
NOINLINE int find_interval(Search *s, const uint32_t *limits) {
    Floats bounds[LIMITS];
    Doubles sums[LIMITS], low = {1, 1, 1, 1, 1, 1, 1, 1}, high = low;
    for (int j = 0; j < LIMITS; j++) {
        bounds[j] = (Floats)all_ints((int)limits[j]);
        sums[j] = (Doubles){0};
    }
    for (int64_t i = 0; i < s->width; i += LANES) {
        Floats v = load_some(first_lanes(s->width - i), s->weights + i);
        if (!s->counts) {
            low = first_doubles(v);
            high = last_doubles(v);
        }
        for (int j = 1; j < LIMITS; j++) {
            Mask mask = at_least(v, bounds[j]);
            sums[j] = add_where(sums[j], mask, 0, low);
            sums[j] = add_where(sums[j], mask, 1, high);
        }
    }
    int found = LIMITS - 1;
    double sum, larger = 0;
    for (; found && s->above + (sum = sum_of_doubles(sums[found])) < s->target; found--) larger = sum;
    s->above += larger;
    int64_t n = 0;
    for (int64_t i = 0; i < s->width; i += LANES) {
        Mask mask = first_lanes(s->width - i);
        Floats v = load_some(mask, s->weights + i);
        mask = mask & at_least(v, bounds[found]);
        if (found < LIMITS - 1) mask = mask & below(v, bounds[found + 1]);
        n += store_packed(s->rest + n, mask, v);
    }
    s->weights = s->rest;
    s->width = n;
    return found;
}

// Return the largest limit such that the sum of the weights >= limit (if `counts`: their number) reaches `target`.
// Weights are at most 1. The search goes through the exponents, then through three bits of the mantissa at a time: the
// bits of positive floats, read as integers, have the same order as the floats.
static float find_limit(const float *weights, int64_t width, double target, int counts, float *rest) {
    Search s = {weights, width, rest, 0, target, counts};
    uint32_t limits[LIMITS] = {0}, bits = 0;
    for (uint32_t exponent = 127; !bits && exponent >= LIMITS; exponent -= LIMITS - 1) {
        for (uint32_t j = 1; j < LIMITS; j++) limits[j] = (exponent - LIMITS + 1 + j) << 23;
        bits = limits[find_interval(&s, limits)];
    }
    if (!bits) return 0;  // the weights above 2^-125 do not reach it
    for (int shift = 20; s.width > 1; shift = shift > 3 ? shift - 3 : 0) {
        for (uint32_t j = 0; j < LIMITS; j++) limits[j] = bits + (j << shift);
        bits = limits[find_interval(&s, limits)];
        if (!shift) break;
    }
    float limit;
    memcpy(&limit, &bits, 4);
    return s.width == 1 ? *s.weights : limit;
}

INLINE float sum_block(const float *weights, int64_t left, float smallest) {
    Floats v = load_some(first_lanes(left), weights);
    return sum_of(choose(at_least(v, all(smallest)), v, all(0)));
}

NOINLINE double sum_weights(const Draw *d, float smallest) {
    double sum = 0;
    for (int64_t i = 0; i < d->width; i += LANES) sum += sum_block(d->weights + i, d->width - i, smallest);
    return sum;
}

static void draw_row(Draw *d) {
    int64_t width = d->width, i;
    Floats most = all(-FLT_MAX), lowest = all(-87.0f);
    for (i = 0; i < width; i += LANES) {
        Mask mask = first_lanes(width - i);
        most = choose(mask, maximum(most, load_some(mask, d->logits + i)), most);
    }
    most = all(largest_of(most));
    for (i = 0; i < width; i += LANES) {
        Mask mask = first_lanes(width - i);
        Floats x = load_some(mask, d->logits + i) - most;
        x = x / d->temperature;
        Mask is_possible = at_least(x, lowest);
        store_some(d->weights + i, mask, choose(is_possible, exponential(x), all(0)));
    }
    float smallest = d->top_k < width ? find_limit(d->weights, width, (double)d->top_k, 1, d->weights + width) : 0;
    if (d->top_p < 1) {
        float limit = find_limit(d->weights, width, d->top_p * sum_weights(d, smallest), 0, d->weights + width);
        if (limit > smallest) smallest = limit;
    }
    if (d->min_p > smallest) smallest = d->min_p;  // the largest weight is 1
    if (smallest < FLT_MIN) smallest = FLT_MIN;    // impossible tokens have weight 0
    double target = d->number * sum_weights(d, smallest), sum = 0;
    for (i = 0; i < width; i += LANES) {
        float block = sum_block(d->weights + i, width - i, smallest);
        if (sum + block > target) break;
        sum += block;
    }
    for (int64_t end = i + LANES; i < end && i < width; i++) {
        if (!(d->weights[i] >= smallest)) continue;
        d->token = i;  // the block's last possible token is the result if rounding keeps the sum below the target
        sum += d->weights[i];
        if (sum > target) return;
    }
}

static void draw_rows(void *pointer, int64_t n, int64_t end) {
    for (; n < end; n++) draw_row((Draw *)pointer + n);
}

void draw(Draw *draws, int64_t n) { for_each(n, draw_rows, draws, n < 2); }
