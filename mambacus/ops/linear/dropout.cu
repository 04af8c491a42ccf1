// Dropout whose mask is computed and not kept, for NVIDIA GPUs, compiled at run time by NVRTC; dropout.py gives the macros and
// launches.
//
// Eight neighbouring elements take the 128 bits that Philox4x32-7 (Salmon et al. 2011) makes of their number and the seed, 16
// each: an element is kept if they are below `keep`.
//
// Macros: VEC (8 or 1), X_TYPE.

struct Args {
  const void* x;
  void* y;  // may be x
  const unsigned* seed;  // two words
  long long count;  // of groups of VEC
  int keep;  // of 65536
  float scale;
};

struct Words {
  unsigned word[4];
};

__device__ __forceinline__ Words philox(unsigned long long number, unsigned key0, unsigned key1) {
  unsigned c0 = (unsigned)number, c1 = (unsigned)(number >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const unsigned long long a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
    c0 = (unsigned)(b >> 32) ^ c1 ^ key0;
    c1 = (unsigned)b;
    c2 = (unsigned)(a >> 32) ^ c3 ^ key1;
    c3 = (unsigned)a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

extern "C" __global__ void dropout(const Args p) {
  const long long group = (long long)blockIdx.x * blockDim.x + threadIdx.x, first = group * VEC;
  if (group >= p.count) return;
  const Words random = philox(first / 8, p.seed[0], p.seed[1]);
  const Pack<X_TYPE, VEC> x = load<X_TYPE, VEC>(at<X_TYPE>(p.x, first));
  float y[VEC];
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    const int own = VEC == 1 ? (int)(first % 8) : k;
    const unsigned bits = random.word[own / 2] >> (own % 2 * 16) & 0xffffu;
    y[k] = bits < (unsigned)p.keep ? x[k] * p.scale : 0.0f;
  }
  put<X_TYPE>(at<X_TYPE>(p.y, first), y);
}
