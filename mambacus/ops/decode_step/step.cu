// One token through a Mamba-1 for few or many rows, for NVIDIA GPUs, compiled at run time by NVRTC; gpu.py gives the macros and
// launches. Weights and activations bfloat16; residual stream, states and sums float32.
//
// Few rows: embed, then for each layer product (in_proj), convolve (with x_proj), update (with dt_proj), product (out_proj), then
// product (head). The products are bound by reading the weights, so a weight is read once, straight into the registers of the
// tensor core instruction that uses it: 16 outputs are its rows, 8 rows of the batch its columns. The order of the elements along
// K does not matter to a sum, so a lane takes 8 neighbours (16 bytes) of the weights and the same 8 of the input for two
// instructions, and nothing is rearranged.
//
// The norm is divided: whoever writes the residual stream also writes it times the next norm's weight (``normed``) and the sums of
// its squares (``squares``); the product that reads them multiplies its sums by 1 / root mean square.
//
// A product that has asked for all of its own weights asks for those of the product after it, as far as L2 holds them: else the
// memory would idle while convolve and update run. Of 9 to 32 rows the last blocks of convolve ask for some of out_proj, and those
// of update for some of the next in_proj.
//
// Each kernel lets the next one start at once (start_next), which reads weights and states, of which no kernel of the step before
// it in this graph writes what it reads, and then waits for this one (await_previous). What an earlier kernel of the step wrote is
// read past L1 (fresh_...), which may hold older lines.
//
// More rows: torch has in_proj, out_proj and the head; convolve gives x_proj's parts, delta adds them up and has dt_proj, and add_norm
// adds to the residual stream. Many rows: torch has all products; convolve and update run alone (PROJECTS 0, SLICES 0).
//
// Macros: one of EMBED, PRODUCT, CONVOLVE, DELTA, ADD_NORM, UPDATE; the sizes named there; THREADS, MIN_BLOCKS for each multiprocessor.

struct Args {
  const long long* tokens;                      // (batch,)
  long long* counts;                            // (batch,): tokens read so far
  const void *embedding, *norm;                 // (tokens, OUTPUTS), (OUTPUTS,): the norm that reads what is written
  const void *weight, *x, *next;                // (OUTPUTS, K), (batch, K); the weight of the product after this one
  void *y, *normed;                             // of a product; (batch, OUTPUTS)
  float *residual, *squares;                    // (batch, OUTPUTS), (batch, PARTS)
  const void *taps, *taps_bias;                 // (D_INNER, 4), (D_INNER,)
  void *xz, *conv_state, *mixed;                // (batch, 2 D_INNER), (batch, D_INNER, 4), (batch, D_INNER): convolved x
  float* part;                                  // (SLICES, batch, OUTPUTS): x_proj of a slice of the channels
  void *projected, *delta;                      // (batch, OUTPUTS), (batch, D_INNER)
  const void* dt_weight;                        // (D_INNER, DT_RANK)
  const float *delta_bias, *A_log, *D;          // (D_INNER,), (D_INNER, D_STATE), (D_INNER,)
  float* ssm_state;                             // (batch, D_INNER, D_STATE)
  int batch;
  float eps;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define start_next()
#define await_previous()
#define prefetch(place, bytes)
#else
__device__ __forceinline__ void start_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Both multiples of 16.
__device__ __forceinline__ void prefetch(const char* place, int bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(place), "r"(bytes)); }
#endif

struct alignas(16) Words { unsigned word[4]; };  // 8 elements of bfloat16

// 16 bytes that nobody writes while the kernel runs, read once.
__device__ __forceinline__ Words weight_words(const char* place) {
  Words w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3]) : "l"(place));
  return w;
}
// What an earlier kernel of the step wrote.
__device__ __forceinline__ Words fresh_words(const char* place) {
  Words w;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3]) : "l"(place));
  return w;
}
__device__ __forceinline__ float fresh_float(const float* place) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(place));
  return value;
}
__device__ __forceinline__ unsigned fresh_word(const char* place) {
  unsigned word;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(place));
  return word;
}
__device__ __forceinline__ float fresh_half(const char* place) {
  unsigned short bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(place));
  return widen<1>(bits);
}
// Four states, which nobody reads again before the next step: of all in L2 they leave first, and the weights stay.
__device__ __forceinline__ unsigned long long leaves_first() {
  unsigned long long policy = 0;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ Words passing_words(const float* place, unsigned long long policy) {
  Words w;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3]) : "l"(place), "l"(policy));
  return w;
}
__device__ __forceinline__ void put_passing(float* place, const float (&v)[4], unsigned long long policy) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" : : "l"(place), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "l"(policy) : "memory");
}

__device__ __forceinline__ float low(unsigned word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

// d += 16 outputs x 8 rows, over 16 elements of K: of each lane 8 of two outputs and 4 of one row.
__device__ __forceinline__ void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same over 32 elements: 8 of each of two outputs, 8 of one row.
__device__ __forceinline__ void multiply(float (&d)[4], const Words& a, const Words& below, const Words& b) {
  multiply(d, a.word[0], below.word[0], a.word[1], below.word[1], b.word[0], b.word[1]);
  multiply(d, a.word[2], below.word[2], a.word[3], below.word[3], b.word[2], b.word[3]);
}

#ifdef ASKERS
// The last ASKERS blocks of a launch ask L2 for the beginning of ``next``, SHARE bytes (a multiple of 16) each.
__device__ __forceinline__ void ask_for_next(const Args& p) {
  const int number = (int)(blockIdx.y * gridDim.x + blockIdx.x) - (int)(gridDim.x * gridDim.y) + ASKERS;
  if (SHARE == 0 || threadIdx.x != 0 || number < 0) return;
  const char* share = (const char*)p.next + (long long)number * SHARE;
  for (int done = 0; done < SHARE; done += 16384) prefetch(share + done, min(16384, SHARE - done));
}
#endif

template <int LANES> __device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

#if defined(DELTA) || (defined(UPDATE) && SLICES)
// The sums of x_proj's parts for BLOCK_ROWS rows, four outputs at a time: four threads share them, each every fourth part.
#define GIVEN (BLOCK_ROWS * OUTPUTS / 4)
#define ROUNDS ((4 * GIVEN + THREADS - 1) / THREADS)
#define TAKEN ((SLICES + 3) / 4)  // parts that a thread reads for four outputs

__device__ __forceinline__ void take_parts(const Args& p, int first, Words (&part)[ROUNDS][TAKEN]) {
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int e = min((int)threadIdx.x / 4 + round * (THREADS / 4), GIVEN - 1), row = min(first + e / (OUTPUTS / 4), p.batch - 1);
#pragma unroll
    for (int k = 0; k < TAKEN; k++)
      part[round][k] = fresh_words((const char*)(p.part + ((long long)min((int)threadIdx.x % 4 + 4 * k, SLICES - 1) * p.batch + row) * OUTPUTS + 4 * (e % (OUTPUTS / 4))));
  }
}
__device__ __forceinline__ void add_parts(const Words (&part)[TAKEN], float (&sum)[4]) {
#pragma unroll
  for (int c = 0; c < 4; c++) {
    sum[c] = 0.0f;
#pragma unroll
    for (int k = 0; k < TAKEN; k++)
      if ((int)threadIdx.x % 4 + 4 * k < SLICES) sum[c] += __uint_as_float(part[k].word[c]);
    sum[c] = sum_over_lanes<4>(sum[c]);
  }
}
#endif

#if defined(EMBED) || defined(PRODUCT)
// TILE neighbouring elements of a row of the residual stream, written by one warp: lane + 32 l is element l of a lane.
#define LINES ((TILE + 31) / 32)

__device__ __forceinline__ void write_residual(
    const Args& p, int row, int tile, const float (&value)[LINES], const float (&norm)[LINES]) {
  const int lane = threadIdx.x % 32;
  float squares = 0.0f;
#pragma unroll
  for (int l = 0; l < LINES; l++) {
    const int own = lane + 32 * l, column = tile * TILE + own;
    if (own >= TILE || column >= OUTPUTS) continue;
    const long long place = (long long)row * OUTPUTS + column;
    const float scaled[1] = {value[l] * norm[l]};
    p.residual[place] = value[l];
    put<1>(at<1>(p.normed, place), scaled);
    squares = fmaf(value[l], value[l], squares);
  }
  squares = sum_over_lanes<32>(squares);
  if (lane == 0) p.squares[row * PARTS + tile] = squares;
}

__device__ __forceinline__ void read_norm(const Args& p, int tile, float (&norm)[LINES]) {
#pragma unroll
  for (int l = 0; l < LINES; l++) norm[l] = load<1, 1>(at<1>(p.norm, min(tile * TILE + (int)threadIdx.x % 32 + 32 * l, OUTPUTS - 1)))[0];
}
#endif

#ifdef EMBED  // OUTPUTS, TILE, PARTS; a block for each row
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) embed(const Args p) {
  const int row = blockIdx.x;
  start_next();
  const long long token = p.tokens[row];
  if (threadIdx.x == 0) p.counts[row] += 1;
  for (int tile = threadIdx.x / 32; tile < PARTS; tile += THREADS / 32) {
    float value[LINES], norm[LINES];
    read_norm(p, tile, norm);
#pragma unroll
    for (int l = 0; l < LINES; l++) {
      const int column = min(tile * TILE + (int)threadIdx.x % 32 + 32 * l, OUTPUTS - 1);
      value[l] = load<1, 1>(at<1>(p.embedding, token * OUTPUTS + column))[0];
    }
    write_residual(p, row, tile, value, norm);
  }
}
#endif

#ifdef PRODUCT
// OUTPUTS, K (a multiple of 32); KIND 0: y bfloat16 of normed input, 1: added to the residual stream, 2: y float32 of normed input;
// M_TILES x 16 outputs of a block, N_TILES x 8 rows of the batch; RING: pieces of 32 elements that a warp holds; PARTS; of the next
// weight a block has a share of SHARE bytes, of which it asks for AHEAD.
// The warps of a block share K: piece j of warp w is number j WARPS + w.
#define WARPS (THREADS / 32)
#define COLUMNS (8 * N_TILES)
#define TURNS ((COLUMNS + WARPS - 1) / WARPS)  // rows of the batch that a warp finishes
#define PIECES (K / 32)
#define MINE ((PIECES + WARPS - 1) / WARPS)
#define STEP (64 * WARPS)     // bytes from one piece of a warp to its next
#define STRIDE (TILE + 4)     // no bank conflicts

__device__ __forceinline__ bool owns(int j, int warp) { return PIECES % WARPS == 0 || j * WARPS + warp < PIECES; }

__device__ __forceinline__ void prefetch_next(const Args& p) {
  if (threadIdx.x != 0) return;
  const char* share = (const char*)p.next + (long long)blockIdx.x * SHARE;
  for (int done = 0; done < AHEAD; done += 16384) prefetch(share + done, min(16384, AHEAD - done));
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) product(const Args p) {
  extern __shared__ __align__(16) float memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, start = 64 * warp + 16 * (lane % 4);
  const int first = blockIdx.x * TILE;
  start_next();
  const char *weights[2 * M_TILES], *inputs[N_TILES];
  Words a[RING][2 * M_TILES], b[RING][N_TILES];
#pragma unroll
  for (int k = 0; k < 2 * M_TILES; k++) weights[k] = at<1>(p.weight, (long long)min(first + 8 * k + group, OUTPUTS - 1) * K) + start;
#pragma unroll
  for (int n = 0; n < N_TILES; n++) inputs[n] = at<1>(p.x, (long long)min(8 * n + group, p.batch - 1) * K) + start;
#pragma unroll
  for (int j = 0; j < RING; j++)
    if (owns(j, warp))
#pragma unroll
      for (int k = 0; k < 2 * M_TILES; k++) a[j][k] = weight_words(weights[k] + j * STEP);
  float norm[LINES];
  if (KIND == 1) read_norm(p, blockIdx.x, norm);
  if (MINE <= RING) prefetch_next(p);
  await_previous();
#pragma unroll
  for (int j = 0; j < RING; j++)
    if (owns(j, warp))
#pragma unroll
      for (int n = 0; n < N_TILES; n++) b[j][n] = fresh_words(inputs[n] + j * STEP);
  float before[TURNS][LINES], scale[TURNS];  // of the rows that this warp will finish
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int row = min(warp + turn * WARPS, p.batch - 1);
    if (KIND == 1) {
#pragma unroll
      for (int l = 0; l < LINES; l++) before[turn][l] = fresh_float(p.residual + (long long)row * OUTPUTS + min(first + lane + 32 * l, OUTPUTS - 1));
    } else {
      float squares = 0.0f;
#pragma unroll
      for (int part = 0; part < PARTS; part += 32) {
        const float own = fresh_float(p.squares + row * PARTS + min(part + lane, PARTS - 1));
        if (part + lane < PARTS) squares += own;
      }
      scale[turn] = squares;
    }
  }
  float sums[M_TILES][N_TILES][4];
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
      for (int k = 0; k < 4; k++) sums[m][n][k] = 0.0f;
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    if (!owns(j, warp)) continue;
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
      for (int n = 0; n < N_TILES; n++) multiply(sums[m][n], a[j % RING][2 * m], a[j % RING][2 * m + 1], b[j % RING][n]);
    if (j + RING >= MINE || !owns(j + RING, warp)) continue;
#pragma unroll
    for (int k = 0; k < 2 * M_TILES; k++) a[j % RING][k] = weight_words(weights[k] + (j + RING) * STEP);
#pragma unroll
    for (int n = 0; n < N_TILES; n++) b[j % RING][n] = fresh_words(inputs[n] + (j + RING) * STEP);
    if (j + RING == MINE - 1) prefetch_next(p);
  }
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        memory[(warp * COLUMNS + 8 * n + 2 * (lane % 4) + k % 2) * STRIDE + 16 * m + group + k / 2 * 8] = sums[m][n][k];
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int row = warp + turn * WARPS;
    if (row >= p.batch || row >= COLUMNS) break;
    if (KIND != 1) scale[turn] = 1.0f / sqrtf(sum_over_lanes<32>(scale[turn]) / K + p.eps);
    float value[LINES];
#pragma unroll
    for (int l = 0; l < LINES; l++) {
      const int own = min(lane + 32 * l, TILE - 1);
      value[l] = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) value[l] += memory[(w * COLUMNS + row) * STRIDE + own];
      if (KIND == 1) {
        value[l] += before[turn][l];
        continue;
      }
      const float scaled[1] = {value[l] * scale[turn]};
      if (lane + 32 * l < TILE && first + own < OUTPUTS)
        put<KIND == 0>(at<KIND == 0>(p.y, (long long)row * OUTPUTS + first + own), scaled);
    }
    if (KIND == 1) write_residual(p, row, blockIdx.x, value, norm);
  }
}
#endif

#ifdef CONVOLVE
// D_INNER, SLICE channels of a block (a multiple of 32), BLOCK_ROWS (8) rows of the batch; HAS_BIAS; PROJECTS: OUTPUTS of x_proj
// follow, 16 a warp. A thread convolves two neighbouring channels of every LINE-th row.
#define PAIRS (SLICE / 2)
#define LINE (THREADS / PAIRS)
#define COUNT ((BLOCK_ROWS + LINE - 1) / LINE)
#define PADDED (SLICE + 32)  // no bank conflicts

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) convolve(const Args p) {
  const int first = blockIdx.y * BLOCK_ROWS, rows = min(p.batch - first, BLOCK_ROWS);
  const int own = threadIdx.x % PAIRS * 2, channel = blockIdx.x * SLICE + own, line = threadIdx.x / PAIRS;
  start_next();
  ask_for_next(p);
#if PROJECTS
  __shared__ __align__(16) unsigned tile[BLOCK_ROWS * PADDED / 2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, place = lane % 4;
  Words a[SLICE / 32][2];
#pragma unroll
  for (int j = 0; j < SLICE / 32; j++)
#pragma unroll
    for (int k = 0; k < 2; k++)
      a[j][k] = weight_words(at<1>(p.weight, (long long)min(16 * warp + 8 * k + group, OUTPUTS - 1) * D_INNER + blockIdx.x * SLICE + 32 * j + 8 * place));
#endif
  const Pack<1, 8> taps = load<1, 8>(at<1>(p.taps, 4 * channel));
  Pack<1, 2> bias;
  if (HAS_BIAS) bias = load<1, 2>(at<1>(p.taps_bias, channel));
  Words state[COUNT];  // two channels' inputs, oldest first
#pragma unroll
  for (int k = 0; k < COUNT; k++)
    if (line < LINE && line + k * LINE < rows)
      state[k] = *(const Words*)at<1>(p.conv_state, 4 * ((long long)(first + line + k * LINE) * D_INNER + channel));
  await_previous();
  unsigned x[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; k++)
    if (line < LINE && line + k * LINE < rows)
      x[k] = fresh_word(at<1>(p.xz, 2LL * (first + line + k * LINE) * D_INNER + channel));
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    const int row = line + k * LINE;
    if (line >= LINE || row >= rows) continue;
    Words next;
    next.word[0] = state[k].word[0] >> 16 | state[k].word[1] << 16;
    next.word[1] = state[k].word[1] >> 16 | x[k] << 16;
    next.word[2] = state[k].word[2] >> 16 | state[k].word[3] << 16;
    next.word[3] = state[k].word[3] >> 16 | (x[k] & 0xffff0000u);
    *(Words*)at<1>(p.conv_state, 4 * ((long long)(first + row) * D_INNER + channel)) = next;
    float y[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float sum = HAS_BIAS ? bias[c] : 0.0f;
      sum = fmaf(taps[4 * c], low(next.word[2 * c]), sum);
      sum = fmaf(taps[4 * c + 1], high(next.word[2 * c]), sum);
      sum = fmaf(taps[4 * c + 2], low(next.word[2 * c + 1]), sum);
      sum = fmaf(taps[4 * c + 3], high(next.word[2 * c + 1]), sum);
      y[c] = sum * sigmoid(sum);
    }
    put<1>(at<1>(p.mixed, (long long)(first + row) * D_INNER + channel), y);
#if PROJECTS
    tile[(row * PADDED + own) / 2] = narrow<1>(y[0], y[1]);
#endif
  }
#if PROJECTS
  __syncthreads();
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const int column = min(group, rows - 1);
#pragma unroll
  for (int j = 0; j < SLICE / 32; j++) multiply(sums, a[j][0], a[j][1], *(const Words*)(tile + (column * PADDED + 32 * j + 8 * place) / 2));
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int row = 2 * place + k % 2, output = 16 * warp + group + k / 2 * 8;
    if (row < rows && output < OUTPUTS) p.part[((long long)blockIdx.x * p.batch + first + row) * OUTPUTS + output] = sums[k];
  }
#endif
}
#endif

#ifdef DELTA
// D_INNER, DT_RANK, OUTPUTS, SLICES as of update; BLOCK_ROWS (8) rows of the batch, 16 channels a warp: the sums of x_proj's parts,
// ``projected``, and dt_proj of them, ``delta``.
#define RANKS ((DT_RANK + 31) / 32)
#define PADDED (32 * RANKS + 32)  // no bank conflicts

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) delta(const Args p) {
  __shared__ __align__(16) unsigned inputs[BLOCK_ROWS * PADDED / 2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, place = lane % 4;
  const int channel = blockIdx.x * (THREADS / 2) + 16 * warp + group, first = blockIdx.y * BLOCK_ROWS;
  start_next();
  Words a[RANKS][2];
#pragma unroll
  for (int j = 0; j < RANKS; j++)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      a[j][k] = {};
      if (32 * j + 8 * place < DT_RANK) a[j][k] = weight_words(at<1>(p.dt_weight, (long long)min(channel + 8 * k, D_INNER - 1) * DT_RANK + 32 * j + 8 * place));
    }
  for (int e = threadIdx.x; e < BLOCK_ROWS * PADDED / 2; e += THREADS) inputs[e] = 0;
  __syncthreads();
  await_previous();
  Words part[ROUNDS][TAKEN];
  take_parts(p, first, part);
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int e = threadIdx.x / 4 + round * (THREADS / 4), row = e / (OUTPUTS / 4), output = 4 * (e % (OUTPUTS / 4));
    float sum[4];
    add_parts(part[round], sum);
    if (threadIdx.x % 4 != 0 || e >= GIVEN) continue;
    if (output < DT_RANK) put<1>((char*)inputs + 2 * (row * PADDED + output), sum);
    if (blockIdx.x == 0 && first + row < p.batch) put<1>(at<1>(p.projected, (long long)(first + row) * OUTPUTS + output), sum);
  }
  __syncthreads();
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < RANKS; j++) multiply(sums, a[j][0], a[j][1], *(const Words*)(inputs + (group * PADDED + 32 * j + 8 * place) / 2));
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int row = first + 2 * place + k % 2, own = channel + k / 2 * 8;
    const float value[1] = {sums[k]};
    if (row < p.batch && own < D_INNER) put<1>(at<1>(p.delta, (long long)row * D_INNER + own), value);
  }
}
#endif

#ifdef ADD_NORM
// OUTPUTS (a multiple of 4); a block for each row, four neighbours a thread and round: x is added to the residual stream
// (ADDS), and ``normed`` is its norm times ``norm``. All of a row is loaded before anything waits for it.
#define TURNS ((OUTPUTS / 4 + THREADS - 1) / THREADS)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) add_norm(const Args p) {
  __shared__ float sums[THREADS / 32];
  const long long start = (long long)blockIdx.x * OUTPUTS;
  start_next();
  Pack<1, 4> scale[TURNS];
#pragma unroll
  for (int t = 0; t < TURNS; t++) scale[t] = load<1, 4>(at<1>(p.norm, 4 * min((int)threadIdx.x + t * THREADS, OUTPUTS / 4 - 1)));
  await_previous();
  float value[TURNS][4], squares = 0.0f;
#pragma unroll
  for (int t = 0; t < TURNS; t++) {
    const int place = 4 * min((int)threadIdx.x + t * THREADS, OUTPUTS / 4 - 1);
    const Words before = fresh_words((const char*)(p.residual + start + place));
#pragma unroll
    for (int k = 0; k < 4; k++) value[t][k] = __uint_as_float(before.word[k]);
    if (ADDS) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const unsigned added = fresh_word(at<1>(p.x, start + place + 2 * k));
        value[t][2 * k] += low(added), value[t][2 * k + 1] += high(added);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TURNS; t++) {
    if (threadIdx.x + t * THREADS >= OUTPUTS / 4) continue;
#pragma unroll
    for (int k = 0; k < 4; k++) squares = fmaf(value[t][k], value[t][k], squares);
  }
  squares = sum_over_lanes<32>(squares);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) sum += sums[w];
  const float factor = 1.0f / sqrtf(sum / OUTPUTS + p.eps);
#pragma unroll
  for (int t = 0; t < TURNS; t++) {
    const int place = 4 * (threadIdx.x + t * THREADS);
    if (place >= OUTPUTS) continue;
    float scaled[4];
#pragma unroll
    for (int k = 0; k < 4; k++) scaled[k] = value[t][k] * factor * scale[t][k];
    if (ADDS) put<0>(p.residual + start + place, value[t]);
    put<1>(at<1>(p.normed, start + place), scaled);
  }
}
#endif

#ifdef UPDATE
// D_INNER, D_STATE, DT_RANK, OUTPUTS of x_proj (dt, B, C side by side); BLOCK_ROWS rows of the batch; SLICES: x_proj comes in so many
// parts, and dt_proj is done here; 0: x_proj comes as ``projected`` and dt_proj's product as ``delta``.
// LANES threads share a channel, 4 states each.
#define LANES (D_STATE / 4)
#define GROUPS ((DT_RANK / 8 + LANES - 1) / LANES)  // of 8 elements of dt, for a lane

__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) update(const Args p) {
  const int lane = threadIdx.x % LANES, channel = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  const int first = blockIdx.y * BLOCK_ROWS;
  start_next();
  const unsigned long long policy = leaves_first();
  Words state[BLOCK_ROWS];
#pragma unroll
  for (int r = 0; r < BLOCK_ROWS; r++)
    state[r] = passing_words(p.ssm_state + ((long long)min(first + r, p.batch - 1) * D_INNER + channel) * D_STATE + 4 * lane, policy);
  const Pack<0, 4> A_log = floats<4>(p.A_log + channel * D_STATE + 4 * lane);
  const float D = p.D[channel], bias = p.delta_bias[channel];
#if SLICES
  Words weight[GROUPS];
#pragma unroll
  for (int g = 0; g < GROUPS; g++)
    if (lane + g * LANES < DT_RANK / 8) weight[g] = weight_words(at<1>(p.dt_weight, channel * DT_RANK + 8 * (lane + g * LANES)));
#endif
  float decay[4];
#pragma unroll
  for (int k = 0; k < 4; k++) decay[k] = -expf(A_log[k]) * LOG2_E;
  await_previous();
  float x[BLOCK_ROWS], z[BLOCK_ROWS];
#pragma unroll
  for (int r = 0; r < BLOCK_ROWS; r++) {
    const long long row = min(first + r, p.batch - 1);
    x[r] = fresh_half(at<1>(p.mixed, row * D_INNER + channel));
    z[r] = fresh_half(at<1>(p.xz, (2 * row + 1) * D_INNER + channel));
  }
#if !SLICES
  float product[BLOCK_ROWS];
  unsigned words[BLOCK_ROWS][4];  // of B and C; before the loop, since a row's loads would wait for the row before
#pragma unroll
  for (int r = 0; r < BLOCK_ROWS; r++) {
    const long long row = min(first + r, p.batch - 1);
    product[r] = fresh_half(at<1>(p.delta, row * D_INNER + channel));
    const char* place = at<1>(p.projected, row * OUTPUTS + DT_RANK + 4 * lane);
#pragma unroll
    for (int k = 0; k < 2; k++) words[r][k] = fresh_word(place + 4 * k), words[r][2 + k] = fresh_word(place + 2 * D_STATE + 4 * k);
  }
#else
  __shared__ __align__(16) float inputs[BLOCK_ROWS * OUTPUTS];
  Words part[ROUNDS][TAKEN];
  take_parts(p, first, part);
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int e = threadIdx.x / 4 + round * (THREADS / 4);
    float sum[4];
    add_parts(part[round], sum);
    if (threadIdx.x % 4 == 0 && e < GIVEN) put<0>(inputs + 4 * e, sum);
  }
  __syncthreads();
#endif
#pragma unroll
  for (int r = 0; r < BLOCK_ROWS; r++) {
    const long long row = min(first + r, p.batch - 1);
    float B[4], C[4], raw;
#if SLICES
    const float* own = inputs + r * OUTPUTS;
    raw = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      if (lane + g * LANES >= DT_RANK / 8) continue;
      const float* dt = own + 8 * (lane + g * LANES);
#pragma unroll
      for (int k = 0; k < 4; k++) raw = fmaf(high(weight[g].word[k]), dt[2 * k + 1], fmaf(low(weight[g].word[k]), dt[2 * k], raw));
    }
    raw = sum_over_lanes<LANES>(raw);
#pragma unroll
    for (int k = 0; k < 4; k++) B[k] = own[DT_RANK + 4 * lane + k], C[k] = own[DT_RANK + D_STATE + 4 * lane + k];
#else
    raw = product[r];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      B[2 * k] = low(words[r][k]), B[2 * k + 1] = high(words[r][k]);
      C[2 * k] = low(words[r][2 + k]), C[2 * k + 1] = high(words[r][2 + k]);
    }
#endif
    const float delta = softplus(raw + bias);
    float next[4], y = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      next[k] = fmaf(exp2_fast(delta * decay[k]), __uint_as_float(state[r].word[k]), delta * x[r] * B[k]);
      y = fmaf(next[k], C[k], y);
    }
    y = sum_over_lanes<LANES>(y);
    if (first + r >= p.batch) break;
    put_passing(p.ssm_state + (row * D_INNER + channel) * D_STATE + 4 * lane, next, policy);
    const float gated[1] = {fmaf(D, x[r], y) * z[r] * sigmoid(z[r])};
    if (lane == 0) put<1>(at<1>(p.y, row * D_INNER + channel), gated);
  }
  ask_for_next(p);
}
#endif
