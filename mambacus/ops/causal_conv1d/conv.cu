// The causal depthwise convolution for NVIDIA GPUs, compiled at run time by NVRTC; gpu_cuda.py gives the macros and launches.
//
// A thread owns VEC neighbouring channels of one row of the batch and walks along RUN tokens with the last WIDTH inputs in
// registers, so every input is read once (and WIDTH - 1 of each run's neighbours). Before row 0 lies the initial state, or zeros.
//
// With documents, the *age* of a token is the number of tokens of its document before it in the row, WIDTH at most: its tap j,
// the input j tokens before, lies in the row if j <= age. Beyond, the taps of the row's first document lie in the initial state,
// column WIDTH - (j - age); those of other documents are zero.
//
// Macros: WIDTH, RUN, VEC; THREADS of a block, MIN_BLOCKS for each multiprocessor; X_TYPE, STATE_TYPE, WEIGHT_TYPE, BIAS_TYPE; HAS_BIAS, HAS_SEQ, HAS_STATE, HAS_FINAL, HAS_TWIN, SILU (0 or 1).

#define AHEAD 4  // tokens loaded at once

struct Args {
  const void *x, *grad_y, *grad_twin, *state, *grad_final;  // grad_twin: added to grad_y, which lies in memory alike
  const void *weight, *bias;
  const int* seq;
  void *y, *final_state, *grad_x, *grad_state;
  float* part;  // (batch, run, WIDTH + 1, d): gradients of weight and bias from one run
  long long sxb, sgb, sob;  // strides of the batch, in elements; o: grad_x
  int sxt, sgt, sot;  // strides of tokens, in bytes
  int batches, seqlen, d_inner;
};

__device__ __forceinline__ float weight_of(const Args& p, int d, int k) {
  return load<WEIGHT_TYPE>(at<WEIGHT_TYPE>(p.weight, (long long)d * WIDTH + k))[0];
}

__device__ __forceinline__ float bias_of(const Args& p, int d) {
  return HAS_BIAS ? load<BIAS_TYPE>(at<BIAS_TYPE>(p.bias, d))[0] : 0.0f;
}

struct Place {
  bool real, first;  // first: of the row's first document, so that the initial state lies before it
  int age;
};

__device__ __forceinline__ Place place_of(const int* seq, int row, int seqlen) {
  if (!HAS_SEQ) return {row < seqlen, true, WIDTH};  // the window holds the initial state too
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
  return row == seqlen - 1 || (HAS_SEQ && row < seqlen && __ldg(seq + row + 1) < 0);
}

// A thread's channels of one row of the batch.
struct Channels {
  const char* x;
  const void* state;
  const int* seq;
  long long first_state;  // element of the states that belongs to the first channel
  float weight[WIDTH][VEC], bias[VEC];

  __device__ __forceinline__ Channels(const Args& p, long long batch, int d)
      : x(at<X_TYPE>(p.x, batch * p.sxb + d)),
        state(p.state),
        seq(p.seq + (HAS_SEQ ? batch * p.seqlen : 0)),
        first_state((batch * p.d_inner + d) * WIDTH) {
#pragma unroll
    for (int c = 0; c < VEC; c++) {
      bias[c] = bias_of(p, d + c);
#pragma unroll
      for (int k = 0; k < WIDTH; k++) weight[k][c] = weight_of(p, d + c, k);
    }
  }
  __device__ __forceinline__ float state_at(int column, int c) const {
    return load<STATE_TYPE>(at<STATE_TYPE>(state, first_state + c * WIDTH + column))[0];
  }
  // Inputs of a row; of the initial state or zeros before row 0.
  __device__ __forceinline__ void input(const Args& p, int row, float (&values)[VEC]) const {
    if (row >= 0) {
      const Pack<X_TYPE, VEC> pack = load<X_TYPE, VEC>(x, row, p.sxt);
#pragma unroll
      for (int c = 0; c < VEC; c++) values[c] = pack[c];
    } else {
#pragma unroll
      for (int c = 0; c < VEC; c++) values[c] = HAS_STATE && !HAS_SEQ && row >= -WIDTH ? state_at(WIDTH + row, c) : 0.0f;
    }
  }
  // Tap j of a channel of a token from the inputs window[j] = x[row - j].
  __device__ __forceinline__ float tap(const float (&window)[WIDTH][VEC], const Place& place, int j, int c) const {
    if (!HAS_SEQ || j <= place.age) return window[j][c];
    return HAS_STATE && place.first ? state_at(WIDTH - (j - place.age), c) : 0.0f;
  }
};

__device__ __forceinline__ void push(float (&window)[WIDTH][VEC], const float (&values)[VEC]) {
#pragma unroll
  for (int c = 0; c < VEC; c++) {
#pragma unroll
    for (int j = WIDTH - 1; j > 0; j--) window[j][c] = window[j - 1][c];
    window[0][c] = values[c];
  }
}

extern "C" __global__ void conv_forward(const Args p) {
  const int d = (blockIdx.x * blockDim.x + threadIdx.x) * VEC;
  const long long batch = blockIdx.z;
  if (d >= p.d_inner) return;
  const Channels own(p, batch, d);
  char* y = at<X_TYPE>(p.y, batch * p.seqlen * p.d_inner + d);
  const int begin = blockIdx.y * RUN, end = min(begin + RUN, p.seqlen), last = p.seqlen - 1;
  float window[WIDTH][VEC];
#pragma unroll
  for (int j = 0; j < WIDTH; j++) own.input(p, begin - 1 - j, window[j]);
  for (int first = begin; first < end; first += AHEAD) {
    Pack<X_TYPE, VEC> next[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) next[k] = load<X_TYPE, VEC>(own.x, min(first + k, last), p.sxt);
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const int row = first + k;
      float values[VEC], total[VEC];
#pragma unroll
      for (int c = 0; c < VEC; c++) values[c] = next[k][c];
      push(window, values);
      const Place place = place_of(own.seq, row, p.seqlen);
#pragma unroll
      for (int c = 0; c < VEC; c++) {
        total[c] = own.bias[c];
#pragma unroll
        for (int j = 0; j < WIDTH; j++) total[c] = fmaf(own.weight[WIDTH - 1 - j][c], own.tap(window, place, j, c), total[c]);
        if (SILU) total[c] *= sigmoid(total[c]);
        if (HAS_SEQ) total[c] = place.real ? total[c] : 0.0f;
      }
      if (row < end) put<X_TYPE>(y + (long long)row * p.d_inner * ELEMENT_BYTES(X_TYPE), total);
      if (row < end && place.real && is_last(own.seq, row, p.seqlen)) {
        for (int c = 0; c < VEC; c++)
#pragma unroll
          for (int j = 0; j < WIDTH; j++) {
            const float kept[1] = {own.tap(window, place, j, c)};
            put<X_TYPE>(at<X_TYPE>(p.final_state, own.first_state + c * WIDTH + WIDTH - 1 - j), kept);
          }
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

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_backward(const Args p) {
  const int d = (blockIdx.x * blockDim.x + threadIdx.x) * VEC;
  const long long batch = blockIdx.z;
  if (d >= p.d_inner) return;
  const Channels own(p, batch, d);
  const char* grad_y = at<X_TYPE>(p.grad_y, batch * p.sgb + d);
  const char* grad_twin = at<X_TYPE>(p.grad_twin, batch * p.sgb + d);
  char* grad_x = at<X_TYPE>(p.grad_x, batch * p.sob + d);
  const int begin = blockIdx.y * RUN, end = min(begin + RUN, p.seqlen), last = p.seqlen - 1;
  float window[WIDTH][VEC], sums[WIDTH + 1][VEC];
  float pending[WIDTH][VEC];  // gradient so far of the input j tokens back
#pragma unroll
  for (int j = 0; j < WIDTH; j++) {
    own.input(p, begin - 1 - j, window[j]);
#pragma unroll
    for (int c = 0; c < VEC; c++) pending[j][c] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k <= WIDTH; k++)
#pragma unroll
    for (int c = 0; c < VEC; c++) sums[k][c] = 0.0f;

  for (int first = begin; first < end + WIDTH - 1; first += AHEAD) {
    Pack<X_TYPE, VEC> next[AHEAD], next_grad[AHEAD], next_twin[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      next[k] = load<X_TYPE, VEC>(own.x, min(first + k, last), p.sxt);
      next_grad[k] = load<X_TYPE, VEC>(grad_y, min(first + k, last), p.sgt);
      if (HAS_TWIN) next_twin[k] = load<X_TYPE, VEC>(grad_twin, min(first + k, last), p.sgt);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const int row = first + k;
      float values[VEC], zeros[VEC];
#pragma unroll
      for (int c = 0; c < VEC; c++) {
        values[c] = next[k][c];
        zeros[c] = 0.0f;
      }
      push(window, values);
      push(pending, zeros);
      const Place place = place_of(own.seq, row, p.seqlen);
      const bool to_final = HAS_FINAL && place.real && is_last(own.seq, row, p.seqlen);
#pragma unroll
      for (int c = 0; c < VEC; c++) {
        float total = own.bias[c], taps[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
          taps[j] = own.tap(window, place, j, c);
          total = fmaf(own.weight[WIDTH - 1 - j][c], taps[j], total);
        }
        const float grad_of_y = HAS_TWIN ? next_grad[k][c] + next_twin[k][c] : next_grad[k][c];
        const float grad = place.real ? before_silu(grad_of_y, total) : 0.0f;
        const float counted = row < end ? grad : 0.0f;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
          float into = own.weight[WIDTH - 1 - j][c] * grad;
          if (to_final)
            into += load<X_TYPE>(at<X_TYPE>(p.grad_final, own.first_state + c * WIDTH + WIDTH - 1 - j))[0];
          pending[j][c] += !HAS_SEQ || j <= place.age ? into : 0.0f;
          sums[WIDTH - 1 - j][c] = fmaf(counted, !HAS_SEQ || place.real ? taps[j] : 0.0f, sums[WIDTH - 1 - j][c]);
        }
        sums[WIDTH][c] += counted;
      }
      const int complete = row - (WIDTH - 1);
      if (complete >= begin && complete < end)
        put<X_TYPE>(grad_x + (long long)complete * p.sot, pending[WIDTH - 1]);
    }
  }
  float* part = p.part + (batch * gridDim.y + blockIdx.y) * (WIDTH + 1) * p.d_inner + d;
#pragma unroll
  for (int k = 0; k <= WIDTH; k++) put<0>(part + (long long)k * p.d_inner, sums[k]);
}

// One thread a channel: the gradient that reaches the initial state comes from the first WIDTH tokens.
extern "C" __global__ void conv_backward_state(const Args p) {
  const int d = blockIdx.x * blockDim.x + threadIdx.x;
  const long long batch = blockIdx.z, own = (batch * p.d_inner + d) * WIDTH;
  if (d >= p.d_inner) return;
  const char *x = at<X_TYPE>(p.x, batch * p.sxb + d), *grad_y = at<X_TYPE>(p.grad_y, batch * p.sgb + d);
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);
  int first = 0;
  while (HAS_SEQ && first < p.seqlen && __ldg(seq + first) < 0) first++;
  float total[WIDTH], inputs[2 * WIDTH];  // the initial state, then the first tokens
#pragma unroll
  for (int j = 0; j < WIDTH; j++) {
    // A row of padding alone hands its initial state on
    total[j] = HAS_FINAL && first == p.seqlen ? load<X_TYPE>(at<X_TYPE>(p.grad_final, own + j))[0] : 0.0f;
    inputs[j] = HAS_STATE ? load<STATE_TYPE>(at<STATE_TYPE>(p.state, own + j))[0] : 0.0f;
  }
#pragma unroll
  for (int age = 0; age < WIDTH; age++) {
    const int row = first + age;
    if (row >= p.seqlen || (HAS_SEQ && __ldg(seq + row) != __ldg(seq + first))) break;
    inputs[WIDTH + age] = load<X_TYPE>(x, row, p.sxt)[0];
    float sum = bias_of(p, d);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) sum = fmaf(weight_of(p, d, WIDTH - 1 - j), inputs[WIDTH + age - j], sum);
    const float grad = before_silu(load<X_TYPE>(grad_y, row, p.sgt)[0], sum);
    const bool to_final = HAS_FINAL && is_last(seq, row, p.seqlen);
#pragma unroll
    for (int j = age + 1; j < WIDTH; j++) {
      const float last = to_final ? load<X_TYPE>(at<X_TYPE>(p.grad_final, own + WIDTH - 1 - j))[0] : 0.0f;
      total[WIDTH - (j - age)] += fmaf(weight_of(p, d, WIDTH - 1 - j), grad, last);
    }
  }
#pragma unroll
  for (int k = 0; k < WIDTH; k++) {
    const float one[1] = {total[k]};
    put<STATE_TYPE>(at<STATE_TYPE>(p.grad_state, own + k), one);
  }
}
