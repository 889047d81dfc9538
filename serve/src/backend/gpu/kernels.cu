// Small kernels of the network, for `f16` and `bf16`. A block of 256 threads
// for each row, but for those whose grid covers all numbers.

#include "half.cuh"

// Eight numbers, which a thread reads and writes at once; widths are in these.
struct __align__(16) Eight {
    u16 bits[8];
};

template <class Number>
__device__ Eight scaled(Eight numbers, float factor) {
    for (u16 &bits : numbers.bits)
        bits = Number::bits(Number::number(bits) * factor);
    return numbers;
}

// A row of a table, multiplied by a number; zeros where the index is negative.
template <class Number>
__device__ void copy_row(Eight *out, const Eight *table, int index, u32 width, float scale) {
    Eight *to = out + (u64)blockIdx.x * width;
    const Eight *from = table + (u64)(index < 0 ? 0 : index) * width;
    for (u32 at = threadIdx.x; at < width; at += blockDim.x)
        to[at] = index < 0 ? Eight{} : scale == 1.0f ? from[at] : scaled<Number>(from[at], scale);
}

// Rows of a table.
template <class Number>
__device__ void gather_rows(Eight *out, const Eight *table, const int *indices, u32 width, float scale) {
    copy_row<Number>(out, table, indices[blockIdx.x], width, scale);
}

// The rows of tokens: those of `sources` that are not negative; for -2 - row, what was chosen of
// that row; else none. The table has `vocab` tokens, from `first` on; others have zeros.
template <class Number>
__device__ void embed(Eight *out, const Eight *table, u32 vocab, u32 first, const int *sources, const int *chosen,
                      u32 rows, u32 width, float scale) {
    int token = sources[blockIdx.x];
    if (token < -1) {
        const u32 row = (u32)(-2 - token);
        token = row < rows ? chosen[row] : -1;
    }
    const u32 index = token < 0 ? vocab : (u32)token - first;
    copy_row<Number>(out, table, index < vocab ? (int)index : -1, width, scale);
}

// Multiplies rows by a factor each. A row whose factor is 0 becomes zeros, whatever is in it.
template <class Number>
__device__ void scale_rows(Eight *data, const float *factors, u32 width) {
    const float factor = factors[blockIdx.x];
    Eight *row = data + (u64)blockIdx.x * width;
    for (u32 at = threadIdx.x; at < width; at += blockDim.x)
        row[at] = factor == 0.0f ? Eight{} : scaled<Number>(row[at], factor);
}

extern "C" __global__ void gather_rows_f16(Eight *out, const Eight *table, const int *indices, u32 width, float scale) {
    gather_rows<F16>(out, table, indices, width, scale);
}
extern "C" __global__ void gather_rows_bf16(Eight *out, const Eight *table, const int *indices, u32 width, float scale) {
    gather_rows<Bf16>(out, table, indices, width, scale);
}
extern "C" __global__ void embed_f16(Eight *out, const Eight *table, u32 vocab, u32 first, const int *sources,
                                     const int *chosen, u32 rows, u32 width, float scale) {
    embed<F16>(out, table, vocab, first, sources, chosen, rows, width, scale);
}
extern "C" __global__ void embed_bf16(Eight *out, const Eight *table, u32 vocab, u32 first, const int *sources,
                                      const int *chosen, u32 rows, u32 width, float scale) {
    embed<Bf16>(out, table, vocab, first, sources, chosen, rows, width, scale);
}
extern "C" __global__ void scale_rows_f16(Eight *data, const float *factors, u32 width) {
    scale_rows<F16>(data, factors, width);
}
extern "C" __global__ void scale_rows_bf16(Eight *data, const float *factors, u32 width) {
    scale_rows<Bf16>(data, factors, width);
}

// The shares of experts that were chosen, as they were before what is left of them was
// made to add up to one: `shares` is 0 where one was not chosen.
extern "C" __global__ void keep_chosen(float *shares, const float *probs, u64 count) {
    const u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count && shares[at] != 0.0f)
        shares[at] = probs[at];
}

// Rows of `width` numbers, out of parts of them that lie one behind the other: `part` columns of each row,
// of which the last parts have some too many.
extern "C" __global__ void join_columns(float *out, const float *parts, u32 rows, u32 width, u32 part) {
    const u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (u64)rows * width)
        return;
    const u32 row = (u32)(at / width), column = (u32)(at % width);
    out[at] = parts[((u64)(column / part) * rows + row) * part + column % part];
}

// `1 / (1 + exp(-x))` of each number.
extern "C" __global__ void sigmoid(float *numbers, u64 count) {
    const u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count)
        numbers[at] = 1.0f / (1.0f + expf(-numbers[at]));
}

// `cap · tanh(x / cap)` of each number.
extern "C" __global__ void soft_cap(float *numbers, u64 count, float cap) {
    const u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count)
        numbers[at] = cap * tanhf(numbers[at] / cap);
}
