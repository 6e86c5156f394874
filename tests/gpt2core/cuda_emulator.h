// Runs CUDA kernels on a CPU, one block after the other: each thread of a block is a context of its own, and all of them
// take turns at __syncthreads and at shuffles. Enough for gpt2core/cuda.cu, which is included after this.
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>

#define __device__ static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define __expf expf

using std::min;

struct uint3_t { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; };

static const int MAX_THREADS = 1024, STACK = 1 << 16;
static uint3_t threadIdx, blockIdx;
static ucontext_t scheduler, contexts[MAX_THREADS];
static bool ended[MAX_THREADS];
static int current, n_threads, n_arrived, generation;
static void (*kernel_body)();

static void take_turns() {
  int self = current;
  swapcontext(&contexts[self], &scheduler);
  current = self, threadIdx.x = self;
}

static void __syncthreads() {
  int mine = generation;
  if (++n_arrived == n_threads) n_arrived = 0, generation++;
  while (generation == mine) take_turns();
}

template <typename T> static T __shfl_xor_sync(unsigned, T value, int distance) {  // every thread of the warp calls it
  static T exchanged[MAX_THREADS];
  int self = current;
  exchanged[self] = value;
  take_turns();
  T found = exchanged[self ^ distance];
  take_turns();
  return found;
}

static unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static float rsqrtf(float x) { return 1 / sqrtf(x); }

static void start() {
  threadIdx.x = current;
  kernel_body();
  ended[current] = true;
  swapcontext(&contexts[current], &scheduler);
}

static void run_grid(int columns, int rows, int threads, void (*body)()) {
  static char *stacks = (char *)malloc((size_t)MAX_THREADS * STACK);
  kernel_body = body, n_threads = threads;
  for (unsigned y = 0; y < (unsigned)rows; y++)
    for (unsigned x = 0; x < (unsigned)columns; x++) {
      blockIdx = {x, y, 0}, n_arrived = 0;
      for (int i = 0; i < threads; i++) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks + (size_t)i * STACK, contexts[i].uc_stack.ss_size = STACK;
        makecontext(&contexts[i], start, 0), ended[i] = false;
      }
      for (int running = threads; running;) {
        running = 0;
        for (current = 0; current < threads; current++)
          if (!ended[current]) {
            int self = current;
            swapcontext(&scheduler, &contexts[self]);
            current = self, running += !ended[self];
          }
      }
    }
}

// A kernel's arguments, as cuLaunchKernel takes them: pointers to the values.
static void **kernel_arguments;
template <typename T> static T argument(int i) { return *(T *)kernel_arguments[i]; }
template <typename... Types, size_t... indices>
static void call(void (*kernel)(Types...), std::index_sequence<indices...>) { kernel(argument<Types>(indices)...); }
template <typename... Types> static void call(void (*kernel)(Types...)) {
  call(kernel, std::index_sequence_for<Types...>());
}
#define LAUNCHER(name)                                                                                   \
  extern "C" void launch_##name(int columns, int rows, int threads, void **arguments) {                 \
    kernel_arguments = arguments;                                                                        \
    run_grid(columns, rows, threads, [] { call(name); });                                                \
  }
