// The forward scan (FORWARD), and what enters the segments of a cut sequence in either direction (SEGMENT).

// Where a row of the batch is too long for one block at a time (small batch), it is cut into segments: scan_segment finds what
// leaves each segment if nothing enters it, chain_segments what enters each, and then all segments run at once.
#ifdef SEGMENT  // 0: states, forwards; 1: adjoints, backwards
#define MATRIX_TYPE (SEGMENT ? C_TYPE : B_TYPE)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_segment(const Args p) {
  typedef Share<TILE> Own;
  typedef MatrixShare<TILE> OwnMatrix;
  __shared__ __align__(16) float2 s_pair[TILE][CHANNELS];  // step, value
  __shared__ __align__(16) float s_matrix[TILE][PADDED_STATES];
  __shared__ float s_sum[Own::STRIDE][CHANNELS], s_restart[TILE], s_restarts[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int d0 = (blockIdx.x % p.blocks) * CHANNELS, d = d0 + lane, last = p.seqlen - 1;
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);
  const bool there = EXACT || d < p.d_inner;

  float h[STATES_PER_WARP], a2[STATES_PER_WARP], restarts = 0.0f;
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++) {
    a2[i] = there && n0 + i < STATES ? p.A[(long long)d * STATES + n0 + i] * LOG2_E : 0.0f;
    h[i] = 0.0f;
  }
  const int own = d0 + Own::channel(), own_d = EXACT ? own : min(own, p.d_inner - Own::N);
  const char* value_at = SEGMENT ? at<X_TYPE>(p.grad_y, batch * p.sgb + own_d) : at<X_TYPE>(p.x, batch * p.sxb + own_d);
  const char *delta_at = at<DELTA_TYPE>(p.delta, batch * p.sdb + own_d), *z_at = at<Z_TYPE>(p.z, batch * p.szb + own_d);
  const char* matrix_at = SEGMENT ? at<C_TYPE>(p.C, batch * p.sCb) : at<B_TYPE>(p.B, batch * p.sBb);
  const int matrix_n = SEGMENT ? p.sCn : p.sBn, matrix_t = SEGMENT ? p.sCt : p.sBt, value_t = SEGMENT ? p.sgt : p.sxt;
  float bias[Own::N], steps[Own::N];
#pragma unroll
  for (int c = 0; c < Own::N; c++) {
    bias[c] = HAS_BIAS ? p.bias[own_d + c] : 0.0f;
    steps[c] = 0.0f;
  }
  for (int k = threadIdx.x; k < TILE * PADDED_STATES; k += THREADS) s_matrix[0][k] = 0.0f;

  const int begin = blockIdx.y * p.segment, end = min(begin + p.segment, p.seqlen);
  for (int done = 0; done < end - begin; done += TILE) {
    const int first = SEGMENT ? begin + (end - begin - done - 1) / TILE * TILE : begin + done;
    Pack<X_TYPE, Own::N> value[Own::COUNT];
    Pack<DELTA_TYPE, Own::N> delta[Own::COUNT];
    Pack<Z_TYPE, Own::N> z[Own::COUNT];
    Pack<MATRIX_TYPE, MATRIX_VEC> matrix[OwnMatrix::COUNT];
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int row = min(first + Own::row(k), last);
      value[k] = load<X_TYPE, Own::N>(value_at, row, value_t);
      delta[k] = load<DELTA_TYPE, Own::N>(delta_at, row, p.sdt);
      if (SEGMENT && HAS_Z) z[k] = load<Z_TYPE, Own::N>(z_at, row, p.szt);
    }
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++)
      matrix[k] = load<MATRIX_TYPE, MATRIX_VEC>(
          matrix_at + OwnMatrix::state(k) * matrix_n, min(first + OwnMatrix::row(k), last), matrix_t);
    __syncthreads();  // the tile before has been read
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int t = Own::row(k);
      const bool real = is_real(seq, first + t, p.seqlen);
#pragma unroll
      for (int c = 0; c < Own::N; c++) {
        const float step = step_of(real ? delta[k][c] + bias[c] : NO_STEP);
        const float factor = !SEGMENT ? step : HAS_Z ? z[k][c] * sigmoid(z[k][c]) : 1.0f;
        steps[c] += step;
        s_pair[t][Own::channel() + c] = make_float2(step, real ? value[k][c] * factor : 0.0f);
      }
    }
    if (HAS_SEQ)
      for (int t = threadIdx.x; t < TILE; t += THREADS) {
        s_restart[t] = restart_of(seq, first + t, p.seqlen);
        restarts += s_restart[t];
      }
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++) {
      const bool real = is_real(seq, first + OwnMatrix::row(k), p.seqlen);
#pragma unroll
      for (int c = 0; c < MATRIX_VEC; c++)
        if (OwnMatrix::used(k)) s_matrix[OwnMatrix::row(k)][OwnMatrix::state(k) + c] = real ? matrix[k][c] : 0.0f;
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < TILE; k++) {
      const int t = SEGMENT ? TILE - 1 - k : k;
      const float2 pair = s_pair[t][lane];
#pragma unroll
      for (int i = 0; i < STATES_PER_WARP; i++) {
        const float decay = exp2_fast(HAS_SEQ ? fmaf(pair.x, a2[i], s_restart[t]) : pair.x * a2[i]);
        const float m = s_matrix[t][n0 + i];
        h[i] = SEGMENT ? decay * fmaf(pair.y, m, h[i]) : fmaf(decay, h[i], pair.y * m);
      }
    }
  }
  const long long segment = batch * gridDim.y + blockIdx.y;
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++)
    if (there && n0 + i < STATES) p.carry[(segment * STATES + n0 + i) * p.d_inner + d] = h[i];
#pragma unroll
  for (int c = 0; c < Own::N; c++) s_sum[threadIdx.x / Own::GROUPS][Own::channel() + c] = steps[c];
  if (HAS_SEQ) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) restarts += __shfl_xor_sync(0xffffffffu, restarts, mask);
    if (lane == 0) s_restarts[warp] = restarts;
  }
  __syncthreads();
  if (warp == 0 && there) {
    float total = 0.0f;
    for (int k = 0; k < Own::STRIDE; k++) total += s_sum[k][lane];
    p.segment_steps[segment * p.d_inner + d] = total;
  }
  if (HAS_SEQ && threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++) total += s_restarts[w];
    p.segment_restarts[segment] = total;
  }
}

// One thread a channel and state: turns what leaves each segment into what enters it; what leaves the last one is end_state.
extern "C" __global__ void chain_segments(const Args p) {
  const int d = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
  const int segments = (p.seqlen + p.segment - 1) / p.segment;
  const long long batch = blockIdx.z;
  if (d >= p.d_inner) return;
  const float a2 = p.A[(long long)d * STATES + n] * LOG2_E;
  float h = HAS_STATE ? p.state[(batch * p.d_inner + d) * STATES + n] : 0.0f;
#pragma unroll 4
  for (int k = 0; k < segments; k++) {
    const long long segment = batch * segments + (SEGMENT ? segments - 1 - k : k);
    float* place = p.carry + (segment * STATES + n) * p.d_inner + d;
    const float local = *place, exponent = p.segment_steps[segment * p.d_inner + d] * a2;
    *place = h;
    h = fmaf(exp2_fast(HAS_SEQ ? exponent + p.segment_restarts[segment] : exponent), h, local);
  }
  p.end_state[(batch * p.d_inner + d) * STATES + n] = h;
}
#endif

#ifdef FORWARD
#define GROUP (STATES_PER_WARP <= 4 ? 4 : STATES_PER_WARP <= 8 ? 2 : 1)  // tokens worked on together

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const Args p) {
  typedef Share<TILE> Own;
  typedef MatrixShare<TILE> OwnMatrix;
  __shared__ __align__(16) float2 s_pair[TILE][CHANNELS];  // step, drive
  __shared__ __align__(16) float s_sum[WARPS][TILE][CHANNELS];
  __shared__ __align__(16) float s_B[TILE][PADDED_STATES], s_C[TILE][PADDED_STATES];
  __shared__ __align__(16) float s_bias[CHANNELS], s_skip[CHANNELS];
  __shared__ float s_restart[TILE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int d0 = (blockIdx.x % p.blocks) * CHANNELS, d = d0 + lane, last = p.seqlen - 1;
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);
  const bool there = EXACT || d < p.d_inner;

  float h[STATES_PER_WARP], a2[STATES_PER_WARP];
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++) {
    const bool used = there && n0 + i < STATES;
    a2[i] = used ? p.A[(long long)d * STATES + n0 + i] * LOG2_E : 0.0f;
    h[i] = used ? entering(p, batch, n0 + i, d) : 0.0f;
  }
  if (warp == 0) {
    s_bias[lane] = HAS_BIAS && there ? p.bias[d] : 0.0f;
    s_skip[lane] = HAS_D && there ? p.D[d] : 0.0f;
  }
  const int own = d0 + Own::channel(), own_d = EXACT ? own : min(own, p.d_inner - Own::N);
  const char *x_at = at<X_TYPE>(p.x, batch * p.sxb + own_d), *delta_at = at<DELTA_TYPE>(p.delta, batch * p.sdb + own_d);
  const char* z_at = at<Z_TYPE>(p.z, batch * p.szb + own_d);
  char* y_at = at<X_TYPE>(p.y, batch * p.seqlen * p.d_inner + own_d);
  const char *B_at = at<B_TYPE>(p.B, batch * p.sBb), *C_at = at<C_TYPE>(p.C, batch * p.sCb);
  for (int k = threadIdx.x; k < TILE * PADDED_STATES; k += THREADS) s_B[0][k] = s_C[0][k] = 0.0f;

  // Loaded one tile ahead: the loads run while the tile before is scanned
  Pack<X_TYPE, Own::N> x[Own::COUNT], next_x[Own::COUNT];
  Pack<DELTA_TYPE, Own::N> next_delta[Own::COUNT];
  Pack<Z_TYPE, Own::N> z[Own::COUNT], next_z[Own::COUNT];
  Pack<B_TYPE, MATRIX_VEC> next_B[OwnMatrix::COUNT];
  Pack<C_TYPE, MATRIX_VEC> next_C[OwnMatrix::COUNT];
  auto fetch = [&](int first) {
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int row = min(first + Own::row(k), last);
      next_x[k] = load<X_TYPE, Own::N>(x_at, row, p.sxt);
      next_delta[k] = load<DELTA_TYPE, Own::N>(delta_at, row, p.sdt);
      if (HAS_Z) next_z[k] = load<Z_TYPE, Own::N>(z_at, row, p.szt);
    }
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++) {
      const int row = min(first + OwnMatrix::row(k), last), n = OwnMatrix::state(k);
      next_B[k] = load<B_TYPE, MATRIX_VEC>(B_at + n * p.sBn, row, p.sBt);
      next_C[k] = load<C_TYPE, MATRIX_VEC>(C_at + n * p.sCn, row, p.sCt);
    }
  };
  const int begin = blockIdx.y * p.segment, end = min(begin + p.segment, p.seqlen);
  fetch(begin);
  __syncthreads();
  for (int first = begin; first < end; first += TILE) {
    const Pack<0, Own::N> bias = floats<Own::N>(s_bias + Own::channel());
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int t = Own::row(k);
      const bool real = is_real(seq, first + t, p.seqlen);
      x[k] = next_x[k];
      if (HAS_Z) z[k] = next_z[k];
#pragma unroll
      for (int c = 0; c < Own::N; c++) {
        const float step = step_of(real ? next_delta[k][c] + bias[c] : NO_STEP);
        s_pair[t][Own::channel() + c] = make_float2(step, !HAS_SEQ || real ? step * x[k][c] : 0.0f);
      }
    }
    if (HAS_SEQ)
      for (int t = threadIdx.x; t < TILE; t += THREADS) s_restart[t] = restart_of(seq, first + t, p.seqlen);
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++) {
      const int t = OwnMatrix::row(k), n = OwnMatrix::state(k);
      const bool real = is_real(seq, first + t, p.seqlen);
#pragma unroll
      for (int c = 0; c < MATRIX_VEC; c++)
        if (OwnMatrix::used(k)) {
          s_B[t][n + c] = !HAS_SEQ || real ? next_B[k][c] : 0.0f;
          s_C[t][n + c] = !HAS_SEQ || real ? next_C[k][c] : 0.0f;
        }
    }
    __syncthreads();
    if (first + TILE < end) fetch(first + TILE);
    if (SAVE && first % CHUNK == 0 && there) {
      float* saved = p.chunk_states + (batch * p.n_chunks + first / CHUNK) * STATES * p.d_inner + d;
#pragma unroll
      for (int i = 0; i < STATES_PER_WARP; i++)
        if (n0 + i < STATES) saved[(n0 + i) * p.d_inner] = h[i];
    }
    // A group of tokens at a time. What the next group needs is read before the sums of this one are written, since the compiler
    // keeps reads behind writes
    float2 pair[GROUP];
    float b[GROUP][STATES_PER_WARP], c[GROUP][STATES_PER_WARP];
    auto read_inputs = [&](int first) {
#pragma unroll
      for (int t = 0; t < GROUP; t++) {
        pair[t] = s_pair[first + t][lane];
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) b[t][i] = s_B[first + t][n0 + i];
      }
    };
    auto read_outputs = [&](int first) {
#pragma unroll
      for (int t = 0; t < GROUP; t++)
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) c[t][i] = s_C[first + t][n0 + i];
    };
    read_inputs(0);
    read_outputs(0);
#pragma unroll
    for (int t0 = 0; t0 < TILE; t0 += GROUP) {
      float decay[GROUP][STATES_PER_WARP], drive[GROUP][STATES_PER_WARP], sum[GROUP];
#pragma unroll
      for (int t = 0; t < GROUP; t++)
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) {
          decay[t][i] = exp2_fast(HAS_SEQ ? fmaf(pair[t].x, a2[i], s_restart[t0 + t]) : pair[t].x * a2[i]);
          drive[t][i] = pair[t].y * b[t][i];
        }
      if (t0 + GROUP < TILE) read_inputs(t0 + GROUP);
#pragma unroll
      for (int t = 0; t < GROUP; t++) {
        sum[t] = 0.0f;
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) {
          h[i] = fmaf(decay[t][i], h[i], drive[t][i]);
          sum[t] = fmaf(h[i], c[t][i], sum[t]);
        }
      }
      if (t0 + GROUP < TILE) read_outputs(t0 + GROUP);
#pragma unroll
      for (int t = 0; t < GROUP; t++) s_sum[warp][t0 + t][lane] = sum[t];
    }
    __syncthreads();
    const Pack<0, Own::N> skip = floats<Own::N>(s_skip + Own::channel());
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int t = Own::row(k);
      const bool real = is_real(seq, first + t, p.seqlen);
      float total[Own::N];
#pragma unroll
      for (int c = 0; c < Own::N; c++) total[c] = HAS_D ? skip[c] * x[k][c] : 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const Pack<0, Own::N> sum = floats<Own::N>(&s_sum[w][t][Own::channel()]);
#pragma unroll
        for (int c = 0; c < Own::N; c++) total[c] += sum[c];
      }
#pragma unroll
      for (int c = 0; c < Own::N; c++) {
        if (HAS_Z) total[c] *= z[k][c] * sigmoid(z[k][c]);
        total[c] = !HAS_SEQ || real ? total[c] : 0.0f;
      }
      if (first + t < p.seqlen && (EXACT || own < p.d_inner))
        put<X_TYPE>(y_at + (long long)(first + t) * p.d_inner * ELEMENT_BYTES(X_TYPE), total);
    }
  }
  if (HAS_CARRY) return;  // the end state came with the carries
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++)
    if (there && n0 + i < STATES) p.end_state[(batch * p.d_inner + d) * STATES + n0 + i] = h[i];
}
#endif
