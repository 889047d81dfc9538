// Merges states of attention: outputs v, and base-2 logarithms s of the sums of
// exponentials that the outputs were divided by. A state with s of -inf has no
// keys, and weighs nothing.
//
// A unit is a head of a row. `lanes` threads take its elements, 8 each, `parts`
// times as many divide its states, of which v and s have `count` for each row,
// and v_other and s_other, if not null, one more. Rows whose byte in `mask`, if
// it is not null, is 0 are left alone. The merged state may be v and s.
//
// merge_states.ptx is this, by nvcc 13.0 (-ptx -arch compute_80), with .version
// 7.0 and without comments.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr unsigned THREADS = 256;

__device__ float2 wide(__half2 pair) { return __half22float2(pair); }
__device__ float2 wide(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ void narrow(__half2& to, float2 from) { to = __float22half2_rn(from); }
__device__ void narrow(__nv_bfloat162& to, float2 from) { to = __float22bfloat162_rn(from); }

__device__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ float logarithm(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ float minus_infinity() { return __int_as_float(0xff800000); }

// Some states together: eight elements of the sum of their outputs, and the sum
// of their weights, both relative to 2^m.
struct Sum {
  float o[8], d, m;

  __device__ void add(const float (&other_o)[8], float other_d, float other_m) {
    const float m_new = fmaxf(m, other_m);
    const float keep = m == minus_infinity() ? 0.f : power(m - m_new);
    const float weight = power(other_m - m_new);
    for (int i = 0; i < 8; ++i) o[i] = o[i] * keep + other_o[i] * weight;
    d = d * keep + other_d * weight;
    m = m_new;
  }
};

template <typename Pair>
__device__ void merge(const uint4* v, const float* s, unsigned count, const uint4* v_other,
                      const float* s_other, const unsigned char* mask, uint4* v_merged,
                      float* s_merged, unsigned long long units, unsigned heads, unsigned lanes,
                      unsigned parts) {
  __shared__ Sum sums[THREADS];
  const unsigned group = lanes * parts, in_block = threadIdx.x / group, in_group = threadIdx.x % group;
  const unsigned part = in_group / lanes, lane = in_group % lanes, per_block = THREADS / group;
  const unsigned long long unit = (unsigned long long)blockIdx.x * per_block + in_block;
  const unsigned long long row = unit / heads;
  const unsigned head = unit % heads;
  const bool merges = in_block < per_block && unit < units && (!mask || mask[row]);

  Sum sum = {{}, 0, minus_infinity()};
  const unsigned states = merges ? count + (v_other ? 1 : 0) : 0;
#pragma unroll 2
  for (unsigned state = part; state < states; state += parts) {
    const bool is_other = state == count;
    const unsigned long long at = is_other ? unit : (row * count + state) * heads + head;
    const uint4 vector = (is_other ? v_other : v)[at * lanes + lane];
    const float m = (is_other ? s_other : s)[at];
    if (m == minus_infinity()) continue;
    const Pair* pairs = reinterpret_cast<const Pair*>(&vector);
    float o[8];
    for (int i = 0; i < 4; ++i) {
      const float2 pair = wide(pairs[i]);
      o[2 * i] = pair.x;
      o[2 * i + 1] = pair.y;
    }
    sum.add(o, 1.f, m);
  }
  if (parts > 1) sums[threadIdx.x] = sum;
  // Also because a unit's logarithm is read by all of its threads, and then
  // may be overwritten.
  __syncthreads();
  if (!merges || part > 0) return;
#pragma unroll 1
  for (unsigned other = 1; other < parts; ++other) {
    const Sum& that = sums[threadIdx.x + other * lanes];
    if (that.m != minus_infinity()) sum.add(that.o, that.d, that.m);
  }
  const float factor = sum.m == minus_infinity() ? 0.f : 1.f / sum.d;
  uint4 vector;
  Pair* pairs = reinterpret_cast<Pair*>(&vector);
  for (int i = 0; i < 4; ++i) {
    narrow(pairs[i], make_float2(sum.o[2 * i] * factor, sum.o[2 * i + 1] * factor));
  }
  v_merged[unit * lanes + lane] = vector;
  if (lane == 0) s_merged[unit] = sum.m + logarithm(sum.d);
}

#define KERNEL(name, Pair)                                                                       \
  extern "C" __global__ void name(const uint4* v, const float* s, const uint4* v_other,          \
                                  const float* s_other, const unsigned char* mask,               \
                                  uint4* v_merged, float* s_merged, unsigned long long units,    \
                                  unsigned count, unsigned heads, unsigned lanes,                \
                                  unsigned parts) {                                              \
    merge<Pair>(v, s, count, v_other, s_other, mask, v_merged, s_merged, units, heads, lanes,    \
                parts);                                                                          \
  }
KERNEL(merge_states_f16, __half2)
KERNEL(merge_states_bf16, __nv_bfloat162)
