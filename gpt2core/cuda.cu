// Kernels of a decoding step (attention of one query per row with the row's KV cache, the residual addition fused with
// layer norm, linear layers for few rows, and argmax) and of the training loss. Compiled at run time by NVRTC (cuda.py).
// Shape letters: as in model.py.

typedef unsigned short bf16;  // the bits of a bf16 number

#define INF __uint_as_float(0x7f800000)

__device__ float to_float(unsigned bits) { return __uint_as_float(bits << 16); }

__device__ bf16 to_bf16(float x) {  // rounds to nearest, ties to even
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 64;  // NaN
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__device__ void unpack(float *x, uint4 packed) {  // 8 bf16 numbers to 8 floats
  unsigned parts[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = to_float(parts[i] & 0xffff);
    x[2 * i + 1] = to_float(parts[i] >> 16);
  }
}

__device__ float dot(const float *x, const float *y) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += x[i] * y[i];
  return sum;
}

__device__ float warp_sum(float x, int lanes) {  // sum over each group of `lanes` lanes
  for (int distance = 1; distance < lanes; distance *= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
  return x;
}

// Load 16, 4 or 2 bytes. Volatile: the compiler would move loads behind computations to save registers, and wait for
// each one.
#ifdef __CUDACC__
__device__ uint4 load16(const bf16 *from) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
  return x;
}

__device__ float load4(const float *from) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}

__device__ bf16 load2(const bf16 *from) {
  bf16 x;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(from));
  return x;
}
#else
__device__ uint4 load16(const bf16 *from) { return *(const uint4 *)from; }
__device__ float load4(const float *from) { return *from; }
__device__ bf16 load2(const bf16 *from) { return *from; }
#endif

#define HEAD_DIM 64             // D
#define THREADS 256             // threads per block
#define GROUPS (THREADS / 8)    // 8 threads share a key: 16 bytes each
#define UNROLL 4                // 16-byte loads in flight per thread

// Compute attention (B, H * D) of one new token per row, at its position, from qkv (B, 3, H, D). The token's key and
// value are stored in a layer's cache kv (max_batch, 2, H, columns, D). One block per head and row. Online softmax:
// each group of threads keeps the largest score, the sum of the weights and the weighted sum of the values of its keys.
// The groups are merged at the end.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(bf16 *out, bf16 *kv, const bf16 *qkv, const long long *positions, int n_head, int columns, float scale) {
  __shared__ float tops[GROUPS], sums[GROUPS], parts[GROUPS][HEAD_DIM];
  int head = blockIdx.x, row = blockIdx.y, group = threadIdx.x / 8, first = threadIdx.x % 8 * 8;
  int position = positions[row];
  const bf16 *own = qkv + ((size_t)row * 3 * n_head + head) * HEAD_DIM + first;
  bf16 *keys = kv + ((size_t)row * 2 * n_head + head) * columns * HEAD_DIM + first;
  bf16 *values = keys + (size_t)n_head * columns * HEAD_DIM;
  if (group == 0) {
    *(uint4 *)(keys + (size_t)position * HEAD_DIM) = *(const uint4 *)(own + n_head * HEAD_DIM);
    *(uint4 *)(values + (size_t)position * HEAD_DIM) = *(const uint4 *)(own + 2 * n_head * HEAD_DIM);
  }
  __syncthreads();
  float q[8], top = -INF, sum = 0, total[8] = {0};
  unpack(q, *(const uint4 *)own);
  for (int start = group; start - group <= position; start += UNROLL * GROUPS) {
    uint4 k[UNROLL], v[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      int column = min(start + i * GROUPS, position);
      k[i] = *(const uint4 *)(keys + (size_t)column * HEAD_DIM);
      v[i] = *(const uint4 *)(values + (size_t)column * HEAD_DIM);
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      float x[8];
      unpack(x, k[i]);
      float score = scale * warp_sum(dot(q, x), 8);
      bool is_key = start + i * GROUPS <= position;  // false: the last column was loaded again
      float largest = is_key ? fmaxf(top, score) : top, old = top == largest ? 1 : __expf(top - largest);
      float weight = is_key ? __expf(score - largest) : 0;
      unpack(x, v[i]);
#pragma unroll
      for (int j = 0; j < 8; j++) total[j] = total[j] * old + (is_key ? weight * x[j] : 0);
      sum = sum * old + weight;
      top = largest;
    }
  }
  if (first == 0) tops[group] = top, sums[group] = sum;
#pragma unroll
  for (int j = 0; j < 8; j++) parts[group][first + j] = total[j];
  __syncthreads();
  if (threadIdx.x >= HEAD_DIM) return;
  float largest = -INF, all = 0, y = 0;
  for (int i = 0; i < GROUPS; i++) largest = fmaxf(largest, tops[i]);
  for (int i = 0; i < GROUPS; i++) {
    float weight = sums[i] == 0 ? 0 : __expf(tops[i] - largest);  // sum 0: the group had no key
    all += weight * sums[i];
    y += weight * parts[i][threadIdx.x];
  }
  out[((size_t)row * n_head + head) * HEAD_DIM + threadIdx.x] = to_bf16(y / all);
}

__device__ float block_sum(float x, float *shared) {  // every sum needs its own `shared`
  x = warp_sum(x, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < THREADS / 32; i++) sum += shared[i];
  return sum;
}

#define PER_THREAD 8  // values per thread of `add_norm`

// x (N, n) += y (N, n), and out (N, n) = layer_norm(x), for n <= PER_THREAD * THREADS. One block per row. All loads
// come first, so that it waits for them once.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(bf16 *out, float *x, const bf16 *y, const float *weight, const float *bias, int n, float eps) {
  __shared__ float shared[2][THREADS / 32];
  size_t first = (size_t)blockIdx.x * n + threadIdx.x;
  out += first, x += first, y += first, weight += threadIdx.x, bias += threadIdx.x;
  float values[PER_THREAD], weights[PER_THREAD], biases[PER_THREAD], sum = 0, squares = 0;
  bf16 added[PER_THREAD];
  int end = n - threadIdx.x;  // this thread's values are 0, THREADS, 2 * THREADS, ... below `end`
#pragma unroll
  for (int j = 0, i = 0; j < PER_THREAD; j++, i += THREADS)
    if (i < end) {
      values[j] = load4(x + i), added[j] = load2(y + i);
      weights[j] = load4(weight + i), biases[j] = load4(bias + i);
    }
#pragma unroll
  for (int j = 0, i = 0; j < PER_THREAD; j++, i += THREADS)
    if (i < end) x[i] = values[j] += to_float(added[j]), sum += values[j];
  float mean = block_sum(sum, shared[0]) / n;
#pragma unroll
  for (int j = 0, i = 0; j < PER_THREAD; j++, i += THREADS)
    if (i < end) squares += (values[j] - mean) * (values[j] - mean);
  float factor = rsqrtf(block_sum(squares, shared[1]) / n + eps);
#pragma unroll
  for (int j = 0, i = 0; j < PER_THREAD; j++, i += THREADS)
    if (i < end) out[i] = to_bf16((values[j] - mean) * factor * weights[j] + biases[j]);
}

__device__ float gelu(float x) {  // approximated by tanh, as in GPT-2
  return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * (x * x * x))));
}

#define WARPS 4  // warps per block of `linear`

// out (N, n_out) = x (N, n_in) W^T + bias, or its GELU, for N = 1, 2 or 4, where n_in is a multiple of 8. The time of such a layer is
// the time to read its weights, so as many loads as possible should be in flight: one warp per output, or with SPLIT
// one block. The order of a sum depends on n_in and SPLIT, not on N.
template <int N, bool SPLIT>
__device__ void linear(
    bf16 *out, const bf16 *x, const bf16 *weight, const bf16 *bias, int n_in, int n_out, int with_gelu) {
  __shared__ float parts[WARPS][N];
  const int step = SPLIT ? WARPS * 256 : 256;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, output = SPLIT ? blockIdx.x : blockIdx.x * WARPS + warp;
  if (output >= n_out) return;
  float own_bias = to_float(load2(bias + output)), sums[N] = {0};
  weight += (size_t)output * n_in;
  for (int start = 8 * (SPLIT ? threadIdx.x : lane); start < n_in; start += UNROLL * step) {
    uint4 w[UNROLL], inputs[UNROLL][N];
#pragma unroll
    for (int i = 0; i < UNROLL; i++)
      if (start + i * step < n_in) w[i] = load16(weight + start + i * step);
    auto load_inputs = [&](int i) {
#pragma unroll
      for (int row = 0; row < N; row++) inputs[i][row] = load16(x + (size_t)row * n_in + start + i * step);
    };
#pragma unroll
    for (int i = 0; i < UNROLL; i++)
      if (N <= 2 && start + i * step < n_in) load_inputs(i);  // those of 4 rows need too many registers
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      if (start + i * step >= n_in) continue;
      if (N > 2) load_inputs(i);
      float w8[8], x8[8];
      unpack(w8, w[i]);
#pragma unroll
      for (int row = 0; row < N; row++) {
        unpack(x8, inputs[i][row]);
        sums[row] += dot(w8, x8);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < N; row++) {
    sums[row] = warp_sum(sums[row], 32);
    if (SPLIT && lane == 0) parts[warp][row] = sums[row];
  }
  if (SPLIT) {
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int row = 0; row < N; row++) {
      sums[row] = 0;
      for (int i = 0; i < WARPS; i++) sums[row] += parts[i][row];
    }
  }
  float sum = sums[0];  // lane i < N stores row i
#pragma unroll
  for (int row = 1; row < N; row++) sum = lane == row ? sums[row] : sum;
  bf16 y = to_bf16(sum + own_bias);
  if (with_gelu) y = to_bf16(gelu(to_float(y)));  // from the rounded sum, as torch computes it
  if (lane < N) out[(size_t)lane * n_out + output] = y;
}

#define LINEAR(name, N, SPLIT)                                                                                        \
  extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                            \
      name(bf16 *out, const bf16 *x, const bf16 *weight, const bf16 *bias, int n_in, int n_out, int with_gelu) {      \
    linear<N, SPLIT>(out, x, weight, bias, n_in, n_out, with_gelu);                                                   \
  }

LINEAR(linear_1, 1, false)
LINEAR(linear_2, 2, false)
LINEAR(linear_4, 4, false)
LINEAR(split_linear_1, 1, true)
LINEAR(split_linear_2, 2, true)
LINEAR(split_linear_4, 4, true)

#define MAX_THREADS 1024
#define LOGITS 16  // loads in flight per thread of `most_likely`

__device__ void keep_larger(float &top, int &place, float other_top, int other_place) {  // the first of equal ones
  if (other_top > top || (other_top == top && other_place < place)) top = other_top, place = other_place;
}

// The index (N) of the largest of each row of logits (N, n); -1 if it is NaN or infinite. One block per row. NaN counts
// as infinity, whose place is -1.
extern "C" __global__ void __launch_bounds__(MAX_THREADS) most_likely(long long *out, const float *logits, int n) {
  __shared__ float tops[32];
  __shared__ int places[32];
  float top = -INF;
  int place = -1;
  logits += (size_t)blockIdx.x * n + threadIdx.x;
  int end = n - threadIdx.x;
  for (int start = 0; start < end; start += LOGITS * MAX_THREADS) {
    const float *from = logits + start;
    float values[LOGITS];
#pragma unroll
    for (int i = 0, j = 0; i < LOGITS; i++, j += MAX_THREADS) values[i] = start + j < end ? load4(from + j) : -INF;
#pragma unroll
    for (int i = 0; i < LOGITS; i++) {
      if (values[i] > top) top = values[i], place = threadIdx.x + start + i * MAX_THREADS;
      if (!(values[i] < INF)) top = INF, place = -1;
    }
  }
  for (int distance = 1; distance < 32; distance *= 2) {
    float other_top = __shfl_xor_sync(0xffffffff, top, distance);
    int other_place = __shfl_xor_sync(0xffffffff, place, distance);
    keep_larger(top, place, other_top, other_place);
  }
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, places[threadIdx.x / 32] = place;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < 32; i++) keep_larger(top, place, tops[i], places[i]);
  out[blockIdx.x] = place;
}

#define VOCABULARY_LOADS 7  // 16-byte loads per thread of `cross_entropy`: up to 57,344 logits

// Cross-entropy (N) of bf16 logits (N, n) and labels (N), 0 for negative labels. The logits are replaced by the
// gradient. n is a multiple of 8. One block per row, which holds the row in registers.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    cross_entropy(float *losses, bf16 *logits, const long long *labels, int n) {
  __shared__ float tops[32], sums[32];
  logits += (size_t)blockIdx.x * n;
  int label = labels[blockIdx.x], first = threadIdx.x * 8;
  float own = label < 0 ? 0 : to_float(load2(logits + label));  // before it is overwritten
  uint4 packed[VOCABULARY_LOADS];
  float x[8], top = -INF, sum = 0;
#pragma unroll
  for (int i = 0; i < VOCABULARY_LOADS; i++)
    if (first + i * 8 * MAX_THREADS < n) packed[i] = load16(logits + first + i * 8 * MAX_THREADS);
#pragma unroll
  for (int i = 0; i < VOCABULARY_LOADS; i++) {
    if (first + i * 8 * MAX_THREADS >= n) continue;
    unpack(x, packed[i]);
#pragma unroll
    for (int j = 0; j < 8; j++) top = fmaxf(top, x[j]);
  }
  for (int distance = 1; distance < 32; distance *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, distance));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  for (int i = 0; i < 32; i++) top = fmaxf(top, tops[i]);
#pragma unroll
  for (int i = 0; i < VOCABULARY_LOADS; i++) {
    if (first + i * 8 * MAX_THREADS >= n) continue;
    unpack(x, packed[i]);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += __expf(x[j] - top);
  }
  sum = warp_sum(sum, 32);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < 32; i++) sum += sums[i];
  if (threadIdx.x == 0) losses[blockIdx.x] = label < 0 ? 0 : logf(sum) + (top - own);
  float factor = 1 / sum;
#pragma unroll
  for (int i = 0; i < VOCABULARY_LOADS; i++) {
    int column = first + i * 8 * MAX_THREADS;
    if (column >= n) continue;
    unpack(x, packed[i]);
    unsigned parts[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float gradient = __expf(x[j] - top) * factor - (column + j == label);
      parts[j] = label < 0 ? 0 : to_bf16(gradient);
    }
    packed[i].x = parts[0] | parts[1] << 16, packed[i].y = parts[2] | parts[3] << 16;
    packed[i].z = parts[4] | parts[5] << 16, packed[i].w = parts[6] | parts[7] << 16;
    *(uint4 *)(logits + column) = packed[i];
  }
}
