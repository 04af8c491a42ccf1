// The backward scan and the sums over what its blocks leave.

#define TILES (CHUNK / TILE)
#define JAM (TILE == 8 && STATES_PER_WARP % 2 == 0 ? 2 : 1)  // states of a warp that are worked on together, to fill its waits
#define SUMS (HAS_Z && !HAS_Y ? 3 : 2)  // over the states of a token: the gradients of exponent and drive, and y before the gate
#define SMALLEST_GATE 1e-20f  // y tells what was before a larger gate
constexpr int UNROLLED = STATES_PER_WARP <= 4 ? STATES_PER_WARP : 1;  // times a loop over a warp's states is written out

// Sums over the lanes of a warp by tensor cores: a product of a 16 x 8 matrix, which holds four values of each lane, with an
// 8 x 8 selector adds them, over groups of four lanes, to two of the eight columns of the accumulators. Tensor cores read 10
// bits of a mantissa: enough for gradients in half precision; for float32 a second product adds what the first cuts off.
struct LaneSums {
  static constexpr int COUNT = 2 * TILE * JAM / 16;
  static_assert(COUNT <= 2, "a lane ends with one sum");
  float sums[COUNT][4], selector[8];

  __device__ __forceinline__ LaneSums(int lane) {
#pragma unroll
    for (int k = 0; k < 8; k++) selector[k] = lane / 4 == k ? 1.0f : 0.0f;
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < COUNT; k++) sums[k][0] = sums[k][1] = sums[k][2] = sums[k][3] = 0.0f;
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
  }
  // Adds the lanes' values to the sums number `first` (a multiple of four) and following.
  __device__ __forceinline__ void add(int first, const float (&values)[4]) {
    const int column = first / 2 % 8;
    if (X_TYPE == 0) {
      float rest[4];
#pragma unroll
      for (int k = 0; k < 4; k++) rest[k] = values[k] - __uint_as_float(__float_as_uint(values[k]) & 0xffffe000u);
      multiply(sums[first / 16], rest, selector[column], selector[column + 1]);
    }
    multiply(sums[first / 16], values, selector[column], selector[column + 1]);
  }
  // Completes the sums; a lane gets the one whose number is `number`.
  static __device__ __forceinline__ int number(int lane) {
    const int bit0 = lane / 4 % 2, bit1 = lane / 8 % 2, bit2 = lane / 16;
    return 4 * (lane % 4) + 2 * bit0 + bit1 + (COUNT == 2 ? 16 * bit2 : 0);
  }
  __device__ __forceinline__ float total(int lane) const {
    float pair[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const float low = half(sums[k][0], sums[k][1], lane, 4), high = half(sums[k][2], sums[k][3], lane, 4);
      pair[k] = half(low, high, lane, 8);
    }
    return half(pair[0], pair[COUNT - 1], lane, 16);
  }
  // Hands one of two values to the partner lane and adds the one that comes back.
  static __device__ __forceinline__ float half(float low, float high, int lane, int mask) {
    return (lane & mask ? high : low) + __shfl_xor_sync(0xffffffffu, lane & mask ? low : high, mask);
  }
};

// Chunk by chunk from the end, in each the sets of channels one after the other. The states at the tiles are recomputed from the
// saved one; then each tile, from the last, recomputes its states and runs the adjoint recurrence backwards.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Args p) {
  typedef Share<CHUNK> Own;  // when a chunk is loaded
  typedef Share<TILE> Out;   // when a tile's gradients are stored
  typedef MatrixShare<CHUNK> OwnMatrix;
  extern __shared__ __align__(16) float memory[];
  // Private to a thread (its states of its channel): states at the tiles of a chunk; each set's adjoint, gradient of A, log2(e) A
  float(*s_h)[PADDED_STATES][CHANNELS] = (float(*)[PADDED_STATES][CHANNELS])memory;
  float(*s_own)[3][PADDED_STATES][CHANNELS] = (float(*)[3][PADDED_STATES][CHANNELS])(s_h + TILES);
  // Shared by the warps: a chunk's steps, drives, gradients before the gate, B and C; a tile's sums; bias and D of each set
  float(*s_step)[CHANNELS] = (float(*)[CHANNELS])(s_own + SETS);
  float(*s_drive)[CHANNELS] = s_step + CHUNK;
  float(*s_grad)[CHANNELS] = s_drive + CHUNK;
  float(*s_sum)[SUMS][TILE][CHANNELS] = (float(*)[SUMS][TILE][CHANNELS])(s_grad + CHUNK);
  float(*s_B)[CHUNK] = (float(*)[CHUNK])(s_sum + WARPS);
  float(*s_C)[CHUNK] = s_B + PADDED_STATES;
  float* s_restart = (float*)(s_C + PADDED_STATES);
  float(*s_parameter)[2][CHANNELS] = (float(*)[2][CHANNELS])(s_restart + CHUNK);
  // Private to a thread, for more than one set: a chunk's sums over the sets so far for B and C; each set's for D and bias
  float(*s_part)[PADDED_STATES][CHUNK] = (float(*)[PADDED_STATES][CHUNK])(s_parameter + SETS);
  float(*s_total)[2][Out::N][THREADS] = (float(*)[2][Out::N][THREADS])(s_part + 2);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int block = blockIdx.x % p.blocks, first_d = block * (SETS * CHANNELS), last = p.seqlen - 1;
  const int sets = EXACT ? SETS : min(SETS, (p.d_inner - first_d + CHANNELS - 1) / CHANNELS);
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);

#pragma unroll 1
  for (int set = 0; set < sets; set++) {
    const int d = first_d + set * CHANNELS + lane;
    const bool there = EXACT || d < p.d_inner;
    for (int n = n0; n < n0 + STATES_PER_WARP; n++) {
      const bool used = there && n < STATES;
      s_own[set][0][n][lane] = used ? entering(p, batch, n, d) : 0.0f;
      s_own[set][1][n][lane] = 0.0f;
      s_own[set][2][n][lane] = used ? p.A[(long long)d * STATES + n] * LOG2_E : 0.0f;
    }
    if (warp == 0) {
      s_parameter[set][0][lane] = HAS_BIAS && there ? p.bias[d] : 0.0f;
      s_parameter[set][1][lane] = HAS_D && there ? p.D[d] : 0.0f;
    }
    if (SETS > 1)
#pragma unroll
      for (int c = 0; c < Out::N; c++) s_total[set][0][c][threadIdx.x] = s_total[set][1][c][threadIdx.x] = 0.0f;
  }
  const char *x_at = at<X_TYPE>(p.x, batch * p.sxb), *delta_at = at<DELTA_TYPE>(p.delta, batch * p.sdb);
  const char *z_at = at<Z_TYPE>(p.z, batch * p.szb), *grad_at = at<X_TYPE>(p.grad_y, batch * p.sgb);
  const char* y_at = at<X_TYPE>(p.y, batch * p.seqlen * p.d_inner);
  const int syt = p.d_inner * ELEMENT_BYTES(X_TYPE);
  const char *B_at = at<B_TYPE>(p.B, batch * p.sBb), *C_at = at<C_TYPE>(p.C, batch * p.sCb);
  for (int k = threadIdx.x; k < PADDED_STATES * CHUNK; k += THREADS) s_B[0][k] = s_C[0][k] = 0.0f;
  float sum_D[Out::N], sum_bias[Out::N];
#pragma unroll
  for (int c = 0; c < Out::N; c++) sum_D[c] = sum_bias[c] = 0.0f;
  LaneSums lane_sums(lane);

  const int first_chunk = blockIdx.y * (p.segment / CHUNK);
  for (int chunk = min(first_chunk + p.segment / CHUNK, p.n_chunks) - 1; chunk >= first_chunk; chunk--) {
    const int begin = chunk * CHUNK, tiles = (min(CHUNK, p.seqlen - begin) + TILE - 1) / TILE, end = last - begin;
    // What all threads share is added up to here, what differs is small: addresses of 32 bits
    const char *x_chunk = x_at + (long long)begin * p.sxt, *delta_chunk = delta_at + (long long)begin * p.sdt;
    const char *z_chunk = z_at + (long long)begin * p.szt, *grad_chunk = grad_at + (long long)begin * p.sgt;
    const char* y_chunk = y_at + (long long)begin * syt;
    const char *B_chunk = B_at + (long long)begin * p.sBt, *C_chunk = C_at + (long long)begin * p.sCt;
    float *part_B = p.part_B + ((long long)block * p.batches + batch) * STATES * p.padded + begin;
    float* part_C = p.part_C + (part_B - p.part_B);
#pragma unroll 1
    for (int set = 0; set < sets; set++) {
      const int d0 = first_d + set * CHANNELS, d = d0 + lane;
      const bool there = EXACT || d < p.d_inner;
      const int own = d0 + Own::channel(), own_d = EXACT ? own : min(own, p.d_inner - Own::N);
      const int out = d0 + Out::channel(), out_d = EXACT ? out : min(out, p.d_inner - Out::N);
      const long long to = batch * p.seqlen * p.d_inner + out_d;
      char* to_gate = at<Z_TYPE>(p.grad_z, batch * p.sob + d0);
      float(*s_g)[CHANNELS] = s_own[set][0], (*s_dA)[CHANNELS] = s_own[set][1], (*s_a2)[CHANNELS] = s_own[set][2];
      const float *s_bias = s_parameter[set][0], *s_skip = s_parameter[set][1];
      if (SETS > 1)
#pragma unroll
        for (int c = 0; c < Out::N; c++) {
          sum_D[c] = s_total[set][0][c][threadIdx.x];
          sum_bias[c] = s_total[set][1][c][threadIdx.x];
        }
      bool closed = false;  // whether a gate hides what was before it
      __syncthreads();  // what was before has been read
      const Pack<0, Own::N> bias = floats<Own::N>(s_bias + Own::channel());
#pragma unroll
      for (int k = 0; k < Own::COUNT; k++) {
        const int t = Own::row(k), row = min(t, end);
        const bool real = is_real(seq, begin + t, p.seqlen), used = real && (EXACT || own < p.d_inner);
        const Pack<X_TYPE, Own::N> x = pick<X_TYPE, Own::N>(x_chunk, row, p.sxt, own_d);
        const Pack<X_TYPE, Own::N> grad_y = pick<X_TYPE, Own::N>(grad_chunk, row, p.sgt, own_d);
        const Pack<DELTA_TYPE, Own::N> delta = pick<DELTA_TYPE, Own::N>(delta_chunk, row, p.sdt, own_d);
        Pack<Z_TYPE, Own::N> z;
        Pack<X_TYPE, Own::N> y;
        if (HAS_Z) z = pick<Z_TYPE, Own::N>(z_chunk, row, p.szt, own_d);
        if (HAS_Y) y = pick<X_TYPE, Own::N>(y_chunk, row, syt, own_d);
        float steps[Own::N], drives[Own::N], grads[Own::N], to_z[Own::N];
#pragma unroll
        for (int c = 0; c < Own::N; c++) {
          steps[c] = step_of(real ? delta[c] + bias[c] : NO_STEP);
          drives[c] = !HAS_SEQ || real ? steps[c] * x[c] : 0.0f;
          const float gate = HAS_Z ? z[c] : 1.0f, s = HAS_Z ? sigmoid(gate) : 1.0f;
          grads[c] = used ? grad_y[c] * (gate * s) : 0.0f;
          if (HAS_Y) {  // y / gate: s times what was before the gate
            to_z[c] = real ? grad_y[c] * fmaf(gate, 1.0f - s, 1.0f) * (y[c] * reciprocal(gate)) : 0.0f;
            closed = closed || (used && fabsf(gate) < SMALLEST_GATE);
          }
        }
        if (HAS_Y && t <= end && (EXACT || own < p.d_inner))
          put<Z_TYPE>(to_gate + (long long)(begin + t) * p.sot + Own::channel() * ELEMENT_BYTES(Z_TYPE), to_z);
        put<0>(&s_step[t][Own::channel()], steps);
        put<0>(&s_drive[t][Own::channel()], drives);
        put<0>(&s_grad[t][Own::channel()], grads);
      }
      if (SETS == 1 || set == 0) {
        if (HAS_SEQ)
          for (int t = threadIdx.x; t < CHUNK; t += THREADS) s_restart[t] = restart_of(seq, begin + t, p.seqlen);
#pragma unroll
        for (int k = 0; k < OwnMatrix::COUNT; k++) {
          const int t = OwnMatrix::row(k), n = OwnMatrix::state(k), row = min(t, end);
          const bool real = is_real(seq, begin + t, p.seqlen);
          const auto B = *(const Pack<B_TYPE, MATRIX_VEC>*)(B_chunk + (unsigned)(row * p.sBt + n * p.sBn));
          const auto C = *(const Pack<C_TYPE, MATRIX_VEC>*)(C_chunk + (unsigned)(row * p.sCt + n * p.sCn));
#pragma unroll
          for (int c = 0; c < MATRIX_VEC; c++)
            if (OwnMatrix::used(k)) {
              s_B[n + c][t] = !HAS_SEQ || real ? B[c] : 0.0f;
              s_C[n + c][t] = !HAS_SEQ || real ? C[c] : 0.0f;
            }
        }
      }
      const float* saved = p.chunk_states + (batch * p.n_chunks + chunk) * STATES * p.d_inner + d;
#pragma unroll
      for (int i = 0; i < STATES_PER_WARP; i++)
        s_h[0][n0 + i][lane] = there && n0 + i < STATES ? saved[(long long)(n0 + i) * p.d_inner] : 0.0f;
      if (HAS_Y) closed = __syncthreads_or(closed);
      else __syncthreads();

      // The gradients of a thread's gates of one token where these are zero: sums over the states again. 0.5: the slope there
      auto gradients_of_closed_gates = [&](int tile, int t) {
        const int token = tile * TILE + t;
#pragma unroll 1
        for (int c = 0; c < Out::N; c++) {
          const int ch = Out::channel() + c;
          if (!(fabsf(pick<Z_TYPE, 1>(z_chunk, token, p.szt, out_d + c)[0]) < SMALLEST_GATE)) continue;
          float total = s_skip[ch] * pick<X_TYPE, 1>(x_chunk, token, p.sxt, out_d + c)[0];
#pragma unroll 1
          for (int n = 0; n < STATES; n++) {
            float h = s_h[tile][n][ch];
#pragma unroll 1
            for (int row = tile * TILE; row <= token; row++) {
              const float exponent = s_step[row][ch] * s_a2[n][ch];
              h = fmaf(exp2_fast(HAS_SEQ ? exponent + s_restart[row] : exponent), h, s_drive[row][ch] * s_B[n][row]);
            }
            total = fmaf(h, s_C[n][token], total);
          }
          const float one[1] = {0.5f * pick<X_TYPE, 1>(grad_chunk, token, p.sgt, out_d + c)[0] * total};
          put<Z_TYPE>(to_gate + (long long)(begin + token) * p.sot + ch * ELEMENT_BYTES(Z_TYPE), one);
        }
      };

      for (int tile = 0; tile < tiles - 1; tile++) {  // forwards, for the states at the tiles
        float step[TILE], drive[TILE];
#pragma unroll
        for (int t = 0; t < TILE; t++) {
          step[t] = s_step[tile * TILE + t][lane];
          drive[t] = s_drive[tile * TILE + t][lane];
        }
#pragma unroll UNROLLED
        for (int i = 0; i < STATES_PER_WARP; i += JAM) {
          const int n = n0 + i;
          const float* restart = s_restart + tile * TILE;
          float h[JAM], a2[JAM];
#pragma unroll
          for (int j = 0; j < JAM; j++) {
            h[j] = s_h[tile][n + j][lane];
            a2[j] = s_a2[n + j][lane];
          }
#pragma unroll
          for (int t = 0; t < TILE; t++)
#pragma unroll
            for (int j = 0; j < JAM; j++) {
              const float decay = exp2_fast(HAS_SEQ ? fmaf(step[t], a2[j], restart[t]) : step[t] * a2[j]);
              h[j] = fmaf(decay, h[j], drive[t] * s_B[n + j][tile * TILE + t]);
            }
#pragma unroll
          for (int j = 0; j < JAM; j++) s_h[tile + 1][n + j][lane] = h[j];
        }
      }

      for (int tile = tiles - 1; tile >= 0; tile--) {  // backwards
        const int offset = tile * TILE;
        float step[TILE], drive[TILE], grad[TILE], total[TILE], grad_exponent[TILE], grad_drive[TILE];
#pragma unroll
        for (int t = 0; t < TILE; t++) {
          step[t] = s_step[offset + t][lane];
          drive[t] = s_drive[offset + t][lane];
          grad[t] = s_grad[offset + t][lane];
          grad_exponent[t] = grad_drive[t] = total[t] = 0.0f;
        }
#pragma unroll UNROLLED
        for (int i = 0; i < STATES_PER_WARP; i += JAM) {
          const int n = n0 + i;
          const float* restart = s_restart + offset;
          float decay[JAM][TILE], before[JAM][TILE];  // before: the state before the token
          float h[JAM], g[JAM], dA[JAM], a2[JAM], values[JAM][4];
          lane_sums.clear();
#pragma unroll
          for (int j = 0; j < JAM; j++) {
            h[j] = s_h[tile][n + j][lane];
            g[j] = s_g[n + j][lane];
            dA[j] = s_dA[n + j][lane];
            a2[j] = s_a2[n + j][lane];
          }
#pragma unroll
          for (int t = 0; t < TILE; t++)
#pragma unroll
            for (int j = 0; j < JAM; j++) {
              decay[j][t] = exp2_fast(HAS_SEQ ? fmaf(step[t], a2[j], restart[t]) : step[t] * a2[j]);
              before[j][t] = h[j];
              h[j] = fmaf(decay[j][t], h[j], drive[t] * s_B[n + j][offset + t]);
              if (SUMS == 3) total[t] = fmaf(h[j], s_C[n + j][offset + t], total[t]);
              values[j][t % 4] = grad[t] * h[j];
              if (t % 4 == 3) lane_sums.add((2 * j + 1) * TILE + t - 3, values[j]);
            }
#pragma unroll
          for (int t = TILE - 1; t >= 0; t--)
#pragma unroll
            for (int j = 0; j < JAM; j++) {
              const float into = fmaf(grad[t], s_C[n + j][offset + t], g[j]);
              g[j] = decay[j][t] * into;
              const float pull = g[j] * before[j][t];
              grad_exponent[t] = fmaf(pull, a2[j], grad_exponent[t]);
              grad_drive[t] = fmaf(into, s_B[n + j][offset + t], grad_drive[t]);
              dA[j] = fmaf(pull, step[t], dA[j]);
              values[j][t % 4] = into * drive[t];
              if (t % 4 == 0) lane_sums.add(2 * j * TILE + t, values[j]);
            }
#pragma unroll
          for (int j = 0; j < JAM; j++) {
            s_g[n + j][lane] = g[j];
            s_dA[n + j][lane] = dA[j];
          }
          float sum = lane_sums.total(lane);
          const int number = LaneSums::number(lane), n_sum = n + number / (2 * TILE), t_sum = offset + number % TILE;
          float* part = number / TILE % 2 ? part_C : part_B;
          if (n_sum < STATES && (LaneSums::COUNT == 2 || lane < 16)) {
            float* so_far = SETS > 1 ? &s_part[number / TILE % 2][n_sum][t_sum] : nullptr;
            if (SETS > 1 && set > 0) sum += *so_far;
            if (SETS > 1 && set < sets - 1) *so_far = sum;
            else part[(unsigned)(n_sum * p.padded + t_sum)] = sum;
          }
        }

        Pack<X_TYPE, Out::N> x[Out::COUNT], grad_y[Out::COUNT];
        Pack<DELTA_TYPE, Out::N> delta[Out::COUNT];
        Pack<Z_TYPE, Out::N> z[Out::COUNT];
#pragma unroll
        for (int k = 0; k < Out::COUNT; k++) {
          const int row = min(offset + Out::row(k), end);
          x[k] = pick<X_TYPE, Out::N>(x_chunk, row, p.sxt, out_d);
          if (SOFTPLUS && DELTA_TYPE == 0) delta[k] = pick<DELTA_TYPE, Out::N>(delta_chunk, row, p.sdt, out_d);
          if (HAS_Z && !HAS_Y) z[k] = pick<Z_TYPE, Out::N>(z_chunk, row, p.szt, out_d);
          if (HAS_Z && !HAS_Y) grad_y[k] = pick<X_TYPE, Out::N>(grad_chunk, row, p.sgt, out_d);
        }
        __syncthreads();  // the sums of the tile after have been read
#pragma unroll
        for (int t = 0; t < TILE; t++) {
          s_sum[warp][0][t][lane] = grad_exponent[t];
          s_sum[warp][1][t][lane] = grad_drive[t];
          if (SUMS == 3) s_sum[warp][2][t][lane] = total[t];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < Out::COUNT; k++) {
          const int t = Out::row(k), ch = Out::channel();
          const bool inside = offset + t <= end, real = is_real(seq, begin + offset + t, p.seqlen);
          float sums[SUMS][Out::N];
#pragma unroll
          for (int s = 0; s < SUMS; s++)
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
              const Pack<0, Out::N> part = floats<Out::N>(&s_sum[w][s][t][ch]);
#pragma unroll
              for (int c = 0; c < Out::N; c++) sums[s][c] = w == 0 ? part[c] : sums[s][c] + part[c];
            }
          const Pack<0, Out::N> step_ = floats<Out::N>(&s_step[offset + t][ch]);
          const Pack<0, Out::N> before_gate = floats<Out::N>(&s_grad[offset + t][ch]);
          const Pack<0, Out::N> skip = floats<Out::N>(s_skip + ch), shift = floats<Out::N>(s_bias + ch);
          float to_x[Out::N], to_delta[Out::N], to_z[Out::N];
#pragma unroll
          for (int c = 0; c < Out::N; c++) {
            const float xt = !HAS_SEQ || real ? x[k][c] : 0.0f;
            float d_delta = fmaf(sums[0][c], LN_2, sums[1][c] * xt);
            // The slope of softplus, from the step where half precision is enough
            if (SOFTPLUS) d_delta *= DELTA_TYPE == 0 ? sigmoid(delta[k][c] + shift[c]) : 1.0f - exp2_fast(step_[c] * -LOG2_E);
            d_delta = real ? d_delta : 0.0f;
            sum_D[c] = fmaf(before_gate[c], xt, sum_D[c]);
            sum_bias[c] += d_delta;
            to_delta[c] = d_delta;
            to_x[c] = !HAS_SEQ || real ? fmaf(sums[1][c], step_[c], skip[c] * before_gate[c]) : 0.0f;
            if (HAS_Z && !HAS_Y) {
              const float gate = z[k][c], s = sigmoid(gate);
              const float d_z = grad_y[k][c] * fmaf(skip[c], xt, sums[SUMS - 1][c]) * s * fmaf(gate, 1.0f - s, 1.0f);
              to_z[c] = !HAS_SEQ || real ? d_z : 0.0f;
            }
          }
          if (inside && (EXACT || out < p.d_inner)) {
            const long long place = to + (long long)(begin + offset + t) * p.d_inner;
            put<X_TYPE>(at<X_TYPE>(p.grad_x, place), to_x);
            put<DELTA_TYPE>(at<DELTA_TYPE>(p.grad_delta, place), to_delta);
            if (HAS_Z && !HAS_Y)
              put<Z_TYPE>(to_gate + (long long)(begin + offset + t) * p.sot + ch * ELEMENT_BYTES(Z_TYPE), to_z);
            if (HAS_Y && closed && real) gradients_of_closed_gates(tile, t);
          }
        }
      }
      if (SETS > 1)
#pragma unroll
        for (int c = 0; c < Out::N; c++) {
          s_total[set][0][c][threadIdx.x] = sum_D[c];
          s_total[set][1][c][threadIdx.x] = sum_bias[c];
        }
    }
  }

  float(*s_end)[2][CHANNELS] = (float(*)[2][CHANNELS])s_sum;
#pragma unroll 1
  for (int set = 0; set < sets; set++) {
    const int d = first_d + set * CHANNELS + lane;
    __syncthreads();
#pragma unroll
    for (int c = 0; c < Out::N; c++) {
      s_end[threadIdx.x / Out::GROUPS][0][Out::channel() + c] = SETS > 1 ? s_total[set][0][c][threadIdx.x] : sum_D[c];
      s_end[threadIdx.x / Out::GROUPS][1][Out::channel() + c] = SETS > 1 ? s_total[set][1][c][threadIdx.x] : sum_bias[c];
    }
    __syncthreads();
    if (!EXACT && d >= p.d_inner) continue;
    float* sums = p.part_sums + (batch * gridDim.y + blockIdx.y) * (STATES + 2) * p.d_inner + d;
    for (int n = n0; n < min(n0 + STATES_PER_WARP, STATES); n++) {
      sums[(long long)n * p.d_inner] = s_own[set][1][n][lane];
      if (HAS_INITIAL && !HAS_CARRY) p.end_state[(batch * p.d_inner + d) * STATES + n] = s_own[set][0][n][lane];
    }
    for (int s = warp; s < 2; s += WARPS) {
      float total = 0.0f;
      for (int k = 0; k < Out::STRIDE; k++) total += s_end[k][s][lane];
      sums[(long long)(STATES + s) * p.d_inner] = total;
    }
  }
}

// Sums the partial gradients of B (grid.z = 0) and C over the blocks, in a fixed order, and puts them as (batch, seqlen, n).
#define SUM_TOKENS 128

extern "C" __global__ void sum_tokens(const Args p) {
  __shared__ float s_total[16][SUM_TOKENS + 4];
  const long long batch = blockIdx.y, stride = (long long)p.batches * STATES * p.padded;
  const int first = blockIdx.x * SUM_TOKENS, lane = threadIdx.x % 32, tokens = min(SUM_TOKENS, p.seqlen - first);
  for (int n0 = 0; n0 < STATES; n0 += blockDim.x / 32) {
    const int n = n0 + threadIdx.x / 32;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (n < STATES && first + 4 * lane < p.padded) {
      const float* part = (blockIdx.z == 0 ? p.part_B : p.part_C) + (batch * STATES + n) * p.padded + first + 4 * lane;
#pragma unroll 8
      for (int block = 0; block < p.blocks; block++) {
        const Pack<0, 4> own = floats<4>(part + block * stride);
#pragma unroll
        for (int k = 0; k < 4; k++) total[k] += own[k];
      }
    }
    __syncthreads();  // the states before have been stored
    put<0>(&s_total[threadIdx.x / 32][4 * lane], total);
    __syncthreads();
    const int states = min((int)blockDim.x / 32, STATES - n0);
    for (int k = threadIdx.x; k < tokens * states; k += blockDim.x) {
      const float one[1] = {s_total[k % states][k / states]};
      const long long to = (batch * p.seqlen + first + k / states) * STATES + n0 + k % states;
      if (blockIdx.z == 0) put<B_TYPE>(at<B_TYPE>(p.grad_B, to), one);
      else put<C_TYPE>(at<C_TYPE>(p.grad_C, to), one);
    }
  }
}

// Sums the gradients of A, D and bias over rows of the batch and segments, in a fixed order: grid.y is a state, then D and bias.
extern "C" __global__ void sum_rows(const Args p) {
  __shared__ float s_total[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = blockIdx.x * 32 + lane;
  const int parts = p.batches * ((p.seqlen + p.segment - 1) / p.segment);
  float total = 0.0f;
  if (d < p.d_inner)
    for (int part = warp; part < parts; part += 8)
      total += p.part_sums[((long long)part * (STATES + 2) + blockIdx.y) * p.d_inner + d];
  s_total[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || d >= p.d_inner) return;
  for (int w = 1; w < 8; w++) total += s_total[w][lane];
  if (blockIdx.y < STATES) p.grad_A[(long long)d * STATES + blockIdx.y] = total;
  else (blockIdx.y == STATES ? p.grad_D : p.grad_bias)[d] = total;
}
