// Small kernels of the network, for `f16` and `bf16`, and of the choice of tokens. A block of 256
// threads for each row, but for those whose grid covers all numbers.

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

// A token by its source: the same, if it is not negative; for -2 - row, what was chosen of that row;
// else none, which is negative.
__device__ int token_of(int source, const int *chosen, u32 rows) {
    if (source >= -1)
        return source;
    const u32 row = (u32)(-2 - source);
    return row < rows ? chosen[row] : -1;
}

// The rows of the tokens of `sources`. The table has `vocab` tokens, from `first` on; others have zeros.
template <class Number>
__device__ void embed(Eight *out, const Eight *table, u32 vocab, u32 first, const int *sources, const int *chosen,
                      u32 rows, u32 width, float scale) {
    const int token = token_of(sources[blockIdx.x], chosen, rows);
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

// The largest number of each row of `part` columns, whose places are known, and the token that it is of, of which the
// first column's is `first`. NaN where there is no place.
extern "C" __global__ void tell_largest(float2 *told, const float *logits, const int *places, u32 rows, u32 part,
                                        u32 first) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows)
        return;
    const u32 place = (u32)places[row];
    told[row] = place < part ? float2{logits[(u64)row * part + place], __uint_as_float(first + place)}
                             : float2{__uint_as_float(0x7fc00000), 0.0f};
}

// The token of the largest number of each row, out of what so many ranks told, one behind the other; of equal ones the
// first rank's. -1 where one is NaN.
extern "C" __global__ void choose_largest(int *tokens, const float2 *told, u32 rows, u32 ranks) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows)
        return;
    float2 best = told[row];
    bool nan = best.x != best.x;
    for (u32 rank = 1; rank < ranks; ++rank) {
        const float2 other = told[(u64)rank * rows + row];
        nan |= other.x != other.x;
        if (other.x > best.x)
            best = other;
    }
    tokens[row] = nan ? -1 : __float_as_int(best.y);
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

// Edits the logit of one token of each row, in place of what became of it: divides the model's, if it is
// above 0, by a penalty, or else multiplies it by that, and adds a bias. `indices` are the sources of the
// tokens of `room` rows, where the other edits of each row begin, and the tokens of these; `numbers` are
// the penalty and bias of most tokens, row by row, and then those of the others.
extern "C" __global__ void edit_last(float *edited, const float *logits, u32 vocab, const int *indices,
                                     const float2 *numbers, u32 room, const int *chosen, u32 rows) {
    const u32 row = blockIdx.x;
    const int token = token_of(indices[row], chosen, rows);
    if (token < 0 || (u32)token >= vocab)
        return;
    const int *places = indices + room, *tokens = places + room + 1;
    // A token is there once at most.
    int place = -1;
    for (int at = places[row] + (int)threadIdx.x; at < places[row + 1]; at += blockDim.x)
        if (tokens[at] == token)
            place = at;
    const bool is_other = __syncthreads_or(place >= 0);
    if (is_other ? place < 0 : threadIdx.x > 0)
        return;
    const float2 edit = numbers[is_other ? room + (u32)place : row];
    const u64 at = (u64)row * vocab + (u32)token;
    const float logit = logits[at];
    edited[at] = __fadd_rn(logit > 0 ? __fdiv_rn(logit, edit.x) : __fmul_rn(logit, edit.x), edit.y);
}
