// The causal depthwise convolution for NVIDIA GPUs, compiled at run time by NVRTC; gpu_cuda.py gives the macros and launches.
//
// A thread owns one channel of one row of the batch and walks along RUN tokens with the last WIDTH inputs in registers, so every
// input is read once (and WIDTH - 1 of each run's neighbours). The *age* of a token is the number of tokens of its document
// before it in the row, WIDTH at most: its tap j, the input j tokens before, lies in the row if j <= age. Beyond, the taps of the
// row's first document lie in the initial state, column WIDTH - (j - age); those of other documents are zero.
//
// Macros: WIDTH, RUN; X_TYPE, STATE_TYPE (0 float32, 1 bfloat16, 2 float16); HAS_BIAS, HAS_SEQ, HAS_STATE, HAS_FINAL, SILU (0 or 1).

#define AHEAD 8  // tokens loaded at once
#define LOG2_E 1.4426950408889634f

template <int TYPE> struct Element { typedef unsigned short Type; };
template <> struct Element<0> { typedef float Type; };

template <int TYPE> __device__ __forceinline__ float widen(typename Element<TYPE>::Type value);
template <> __device__ __forceinline__ float widen<0>(float value) { return value; }
template <> __device__ __forceinline__ float widen<1>(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
template <> __device__ __forceinline__ float widen<2>(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

template <int TYPE> __device__ __forceinline__ typename Element<TYPE>::Type narrow(float value);
template <> __device__ __forceinline__ float narrow<0>(float value) { return value; }
template <> __device__ __forceinline__ unsigned short narrow<1>(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
template <> __device__ __forceinline__ unsigned short narrow<2>(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

typedef Element<X_TYPE>::Type X;
typedef Element<STATE_TYPE>::Type State;

struct Args {
  const void *x, *grad_y, *state, *grad_final;
  const float *weight, *bias;
  const int* seq;
  void *y, *final_state, *grad_x, *grad_state;
  float* part;  // (batch, run, WIDTH + 1, d): gradients of weight and bias from one run
  long long sxb, sgb;  // strides in elements
  int sxt, sgt;
  int batches, seqlen, d_inner;
};

struct Place {
  bool real, first;  // first: of the row's first document, so that the initial state lies before it
  int age;
};

__device__ __forceinline__ Place place_of(const int* seq, int row, int seqlen) {
  if (!HAS_SEQ) return {row < seqlen, true, min(row, WIDTH)};
  if (row >= seqlen) return {false, false, 0};
  const int id = __ldg(seq + row);
  int age = 0, before = -1;
  while (age < WIDTH && row - age > 0) {
    before = __ldg(seq + row - age - 1);
    if (before != id) break;
    age++;
  }
  return {id >= 0, row == age || before < 0, age};
}

__device__ __forceinline__ bool is_last(const int* seq, int row, int seqlen) {
  return row == seqlen - 1 || (HAS_SEQ && __ldg(seq + row + 1) < 0);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp2f(-x * LOG2_E)); }

// A channel of one row of the batch.
struct Channel {
  const X* x;
  const State* state;
  const int* seq;
  float weight[WIDTH], bias;

  __device__ __forceinline__ Channel(const Args& p, long long batch, int d)
      : x((const X*)p.x + batch * p.sxb + d),
        state((const State*)p.state + (batch * p.d_inner + d) * WIDTH),
        seq(p.seq + (HAS_SEQ ? batch * p.seqlen : 0)),
        bias(HAS_BIAS ? p.bias[d] : 0.0f) {
#pragma unroll
    for (int k = 0; k < WIDTH; k++) weight[k] = p.weight[(long long)d * WIDTH + k];
  }
  __device__ __forceinline__ float input(const Args& p, int row) const {
    return row >= 0 && row < p.seqlen ? widen<X_TYPE>(__ldg(x + (long long)row * p.sxt)) : 0.0f;
  }
  // Taps of a token from the inputs window[j] = x[row - j]
  __device__ __forceinline__ void taps(const float (&window)[WIDTH], const Place& at, float (&tap)[WIDTH]) const {
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
      tap[j] = j <= at.age ? window[j] : 0.0f;
      if (HAS_STATE && j > at.age && at.first) tap[j] = widen<STATE_TYPE>(state[WIDTH - (j - at.age)]);
    }
  }
  __device__ __forceinline__ float sum(const float (&tap)[WIDTH]) const {
    float total = bias;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) total = fmaf(weight[WIDTH - 1 - j], tap[j], total);
    return total;
  }
};

__device__ __forceinline__ void push(float (&window)[WIDTH], float value) {
#pragma unroll
  for (int j = WIDTH - 1; j > 0; j--) window[j] = window[j - 1];
  window[0] = value;
}

extern "C" __global__ void conv_forward(const Args p) {
  const int d = blockIdx.x * blockDim.x + threadIdx.x;
  const long long batch = blockIdx.z;
  if (d >= p.d_inner) return;
  const Channel channel(p, batch, d);
  X* y = (X*)p.y + batch * p.seqlen * p.d_inner + d;
  const int begin = blockIdx.y * RUN, end = min(begin + RUN, p.seqlen);
  float window[WIDTH], tap[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH; j++) window[j] = channel.input(p, begin - 1 - j);
  for (int first = begin; first < end; first += AHEAD) {
    float next[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) next[k] = channel.input(p, first + k);
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const int row = first + k;
      if (row >= end) break;
      push(window, next[k]);
      const Place at = place_of(channel.seq, row, p.seqlen);
      channel.taps(window, at, tap);
      float total = channel.sum(tap);
      if (SILU) total *= sigmoid(total);
      y[(long long)row * p.d_inner] = narrow<X_TYPE>(at.real ? total : 0.0f);
      if (at.real && is_last(channel.seq, row, p.seqlen)) {
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
          ((X*)p.final_state)[(batch * p.d_inner + d) * WIDTH + WIDTH - 1 - j] = narrow<X_TYPE>(tap[j]);
      }
    }
  }
}

// Gradient of the sum before silu.
__device__ __forceinline__ float before_silu(float grad, float total) {
  if (!SILU) return grad;
  const float s = sigmoid(total);
  return grad * s * fmaf(total, 1.0f - s, 1.0f);
}

extern "C" __global__ void conv_backward(const Args p) {
  const int d = blockIdx.x * blockDim.x + threadIdx.x;
  const long long batch = blockIdx.z;
  if (d >= p.d_inner) return;
  const Channel channel(p, batch, d);
  const X* grad_y = (const X*)p.grad_y + batch * p.sgb + d;
  const X* grad_final = (const X*)p.grad_final + (batch * p.d_inner + d) * WIDTH;
  X* grad_x = (X*)p.grad_x + batch * p.seqlen * p.d_inner + d;
  const int begin = blockIdx.y * RUN, end = min(begin + RUN, p.seqlen);
  float window[WIDTH], tap[WIDTH], sums[WIDTH + 1];
  float pending[WIDTH];  // gradient so far of the input j tokens back
#pragma unroll
  for (int j = 0; j < WIDTH; j++) {
    window[j] = channel.input(p, begin - 1 - j);
    pending[j] = sums[j] = 0.0f;
  }
  sums[WIDTH] = 0.0f;
  for (int first = begin; first < end + WIDTH - 1; first += AHEAD) {
    float next[AHEAD], next_grad[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      next[k] = channel.input(p, first + k);
      next_grad[k] = first + k < p.seqlen ? widen<X_TYPE>(__ldg(grad_y + (long long)(first + k) * p.sgt)) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const int row = first + k;
      push(window, next[k]);
      push(pending, 0.0f);
      const Place at = place_of(channel.seq, row, p.seqlen);
      channel.taps(window, at, tap);
      const float grad = at.real ? before_silu(next_grad[k], channel.sum(tap)) : 0.0f;
      const bool to_final = HAS_FINAL && at.real && is_last(channel.seq, row, p.seqlen);
#pragma unroll
      for (int j = 0; j < WIDTH; j++) {
        const float own = to_final ? widen<X_TYPE>(grad_final[WIDTH - 1 - j]) : 0.0f;
        pending[j] += j <= at.age ? fmaf(channel.weight[WIDTH - 1 - j], grad, own) : 0.0f;
        if (row < end) sums[WIDTH - 1 - j] = fmaf(grad, at.real ? tap[j] : 0.0f, sums[WIDTH - 1 - j]);
      }
      if (row < end) sums[WIDTH] += grad;
      const int complete = row - (WIDTH - 1);
      if (complete >= begin && complete < end) grad_x[(long long)complete * p.d_inner] = narrow<X_TYPE>(pending[WIDTH - 1]);
    }
  }
  float* part = p.part + (batch * gridDim.y + blockIdx.y) * (WIDTH + 1) * p.d_inner + d;
#pragma unroll
  for (int k = 0; k <= WIDTH; k++) part[(long long)k * p.d_inner] = sums[k];
}

extern "C" __global__ void conv_backward_state(const Args p) {
  const int d = blockIdx.x * blockDim.x + threadIdx.x;
  const long long batch = blockIdx.z;
  if (d >= p.d_inner) return;
  const Channel channel(p, batch, d);
  const X* grad_y = (const X*)p.grad_y + batch * p.sgb + d;
  const X* grad_final = (const X*)p.grad_final + (batch * p.d_inner + d) * WIDTH;
  State* grad_state = (State*)p.grad_state + (batch * p.d_inner + d) * WIDTH;
  int first = 0;
  while (HAS_SEQ && first < p.seqlen && __ldg(channel.seq + first) < 0) first++;
  float total[WIDTH], window[WIDTH], tap[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH; j++) {
    // A row of padding alone hands its initial state on
    total[j] = HAS_FINAL && first == p.seqlen ? widen<X_TYPE>(grad_final[j]) : 0.0f;
    window[j] = 0.0f;
  }
#pragma unroll
  for (int age = 0; age < WIDTH; age++) {
    const int row = first + age;
    const Place at = place_of(channel.seq, row, p.seqlen);
    if (!at.real || at.age != age) break;
    push(window, channel.input(p, row));
    channel.taps(window, at, tap);
    const float grad = before_silu(widen<X_TYPE>(__ldg(grad_y + (long long)row * p.sgt)), channel.sum(tap));
    const bool to_final = HAS_FINAL && is_last(channel.seq, row, p.seqlen);
#pragma unroll
    for (int j = age + 1; j < WIDTH; j++) {
      const float own = to_final ? widen<X_TYPE>(grad_final[WIDTH - 1 - j]) : 0.0f;
      total[WIDTH - (j - age)] += fmaf(channel.weight[WIDTH - 1 - j], grad, own);
    }
  }
#pragma unroll
  for (int k = 0; k < WIDTH; k++) grad_state[k] = narrow<STATE_TYPE>(total[k]);
}
