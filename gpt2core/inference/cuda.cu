// Kernels of a decoding step: attention of one query per row with the row's KV cache, the residual addition fused with
// layer norm, and linear layers for few rows. Compiled at run time by NVRTC (cuda.py). Shape letters: as in model.py.

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

__device__ float block_sum(float x, float *shared) {
  x = warp_sum(x, 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < THREADS / 32; i++) sum += shared[i];
  return sum;
}

// x (N, n) += y (N, n), and out (N, n) = layer_norm(x). One block per row.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(bf16 *out, float *x, const bf16 *y, const float *weight, const float *bias, int n, float eps) {
  __shared__ float shared[THREADS / 32];
  out += (size_t)blockIdx.x * n, x += (size_t)blockIdx.x * n, y += (size_t)blockIdx.x * n;
  float sum = 0, squares = 0;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    float value = x[i] + to_float(y[i]);
    x[i] = value;
    sum += value;
  }
  float mean = block_sum(sum, shared) / n;
  for (int i = threadIdx.x; i < n; i += THREADS) squares += (x[i] - mean) * (x[i] - mean);
  float factor = rsqrtf(block_sum(squares, shared) / n + eps);
  for (int i = threadIdx.x; i < n; i += THREADS) out[i] = to_bf16((x[i] - mean) * factor * weight[i] + bias[i]);
}

#define WARPS 4  // warps per block of `linear`

// out (N, n_out) = x (N, n_in) W^T + bias for N = 1, 2 or 4, where n_in is a multiple of 8. One warp per output: the
// time of such a layer is the time to read its weights.
template <int N>
__device__ void linear(bf16 *out, const bf16 *x, const bf16 *weight, const bf16 *bias, int n_in, int n_out) {
  int lane = threadIdx.x % 32, output = blockIdx.x * WARPS + threadIdx.x / 32;
  if (output >= n_out) return;
  float sums[N] = {0};
  weight += (size_t)output * n_in;
  for (int start = lane * 8; start < n_in; start += UNROLL * 256) {
    uint4 w[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++)
      if (start + i * 256 < n_in) w[i] = *(const uint4 *)(weight + start + i * 256);
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      if (start + i * 256 >= n_in) continue;
      float w8[8], x8[8];
      unpack(w8, w[i]);
#pragma unroll
      for (int row = 0; row < N; row++) {
        unpack(x8, *(const uint4 *)(x + (size_t)row * n_in + start + i * 256));
        sums[row] += dot(w8, x8);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < N; row++) {
    float sum = warp_sum(sums[row], 32);
    if (lane == 0) out[(size_t)row * n_out + output] = to_bf16(sum + to_float(bias[output]));
  }
}

#define LINEAR(N)                                                                                        \
  extern "C" __global__ void __launch_bounds__(32 * WARPS)                                               \
      linear_##N(bf16 *out, const bf16 *x, const bf16 *weight, const bf16 *bias, int n_in, int n_out) {  \
    linear<N>(out, x, weight, bias, n_in, n_out);                                                        \
  }

LINEAR(1)
LINEAR(2)
LINEAR(4)
