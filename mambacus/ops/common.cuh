// What the CUDA C++ kernels share: elements of tensors, groups of them, special functions. nvrtc.py puts this before each source.

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

// Types of elements: 0 float32, 1 bfloat16, 2 float16
template <int TYPE> struct Element { typedef unsigned short Type; };
template <> struct Element<0> { typedef float Type; };
#define ELEMENT_BYTES(TYPE) ((int)sizeof(typename Element<TYPE>::Type))

template <int TYPE> __device__ __forceinline__ float widen(typename Element<TYPE>::Type value);
template <> __device__ __forceinline__ float widen<0>(float value) { return value; }
template <> __device__ __forceinline__ float widen<1>(unsigned short bits) {
  return __uint_as_float((unsigned)bits << 16);
}
template <> __device__ __forceinline__ float widen<2>(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// A 32-bit word of two float16 or bfloat16, the first in the lower half.
template <int TYPE> __device__ __forceinline__ unsigned narrow(float low, float high) {
  unsigned word;
  if constexpr (TYPE == 1) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// A value rounded to a type, 0: left as it is.
template <int TYPE> __device__ __forceinline__ float rounded(float value) {
  if constexpr (TYPE == 0) return value;
  else return widen<TYPE>((unsigned short)narrow<TYPE>(value, 0.0f));
}

// N neighbouring elements, moved in as few accesses as their bytes allow; they lie at a multiple of 16 bytes or of their own.
template <int TYPE, int N> struct Pack {
  static constexpr bool WORDS = TYPE != 0 && N % 2 == 0;
  static constexpr int BYTES = N * ELEMENT_BYTES(TYPE), COUNT = WORDS ? N / 2 : N;
  template <bool IS_WORD, int OF> struct Unit { typedef unsigned Type; };
  template <int OF> struct Unit<false, OF> { typedef typename Element<OF>::Type Type; };
  struct alignas(BYTES < 16 ? BYTES : 16) Units { typename Unit<WORDS, TYPE>::Type unit[COUNT]; } units;

  __device__ __forceinline__ float operator[](int k) const {
    if constexpr (!WORDS) return widen<TYPE>(units.unit[k]);
    else if constexpr (TYPE == 1)
      return __uint_as_float(k % 2 == 0 ? units.unit[k / 2] << 16 : units.unit[k / 2] & 0xffff0000u);
    else return widen<2>((unsigned short)(k % 2 == 0 ? units.unit[k / 2] : units.unit[k / 2] >> 16));
  }
};

// Rows are addressed in bytes from a pointer at row 0, so that an address is one multiply-add.
template <int TYPE, int N = 1>
__device__ __forceinline__ Pack<TYPE, N> load(const char* origin, int row = 0, int stride = 0) {
  return *(const Pack<TYPE, N>*)(origin + (long long)row * stride);
}
template <int N> __device__ __forceinline__ Pack<0, N> floats(const float* place) { return *(const Pack<0, N>*)place; }

template <int TYPE, int N> __device__ __forceinline__ void put(void* place, const float (&values)[N]) {
  Pack<TYPE, N> pack;
#pragma unroll
  for (int k = 0; k < Pack<TYPE, N>::COUNT; k++) {
    if constexpr (Pack<TYPE, N>::WORDS) pack.units.unit[k] = narrow<TYPE>(values[2 * k], values[2 * k + 1]);
    else if constexpr (TYPE == 0) pack.units.unit[k] = values[k];
    else pack.units.unit[k] = (unsigned short)narrow<TYPE>(values[k], 0.0f);
  }
  *(Pack<TYPE, N>*)place = pack;
}

template <int TYPE> __device__ __forceinline__ char* at(const void* tensor, long long index) {
  return (char*)tensor + index * ELEMENT_BYTES(TYPE);
}

__device__ __forceinline__ float exp2_fast(float x) {  // results below 1e-38 become 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-x * LOG2_E)); }
