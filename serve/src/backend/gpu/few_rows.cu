// Up to eight rows of `f16` or `bf16` times the rows of a matrix of that type, or of `e4m3` with a
// scale for each of its rows. The matrix is read once, for tensor cores. A launch may norm the rows
// before, and add to what was there, or take the activated gate times up after.
//
// A launch may overlap the one before (programmatic dependent launch): the matrix, which no kernel
// writes, is asked for before that is over.
// Architecture: compute_90

#include "half.cuh"

// A warp multiplies a tile of so many rows of the matrix by eight rows of `x`.
const u32 TILE = 16, ROWS = 8;
// How a block reads the matrix. Its warps share a tile: each sums up other columns. A thread reads so many
// vectors of each of its two rows together; and so many of these groups are under way at once.
template <u32 WARPS_, u32 READS_, u32 GROUPS_>
struct Shape {
    static const u32 WARPS = WARPS_, THREADS = 32 * WARPS, READS = READS_, GROUPS = GROUPS_;
    // Vectors of a row of the matrix that a block takes in one read, and in a group.
    static const u32 READ_WIDTH = 4 * WARPS, GROUP_WIDTH = READS * READ_WIDTH;
};
// Vectors between rows of `x` in shared memory, so that two of them are in other banks.
const u32 X_PADDING = 4;

// What a thread reads at once.
struct __align__(16) Vector {
    u32 words[4];
};

// What a launch computes: its copy on the host is `Arguments`.
struct Arguments {
    // `rows` of `outputs` numbers, of `f32` if they are `wide`.
    void *out;
    // `outputs` rows of `width` vectors; or as many for gates, then as many for what they are of.
    const Vector *weight;
    // Of each row of the matrix; none without.
    const float *scales;
    const Vector *x;
    // What normed rows are multiplied by; rows are not normed without.
    const u16 *norm;
    // Of each row of the matrix; none without.
    const u16 *bias;
    u32 rows, outputs, width;
    // Of gates: 1 is SiLU, 2 is GELU by its approximation with `tanh`; 0 if there are none.
    u32 activation;
    // Whether the output is added to.
    u32 added;
    u32 wide;
    float factor, eps;
};

// A tile's sums: of two rows of the matrix by two rows of `x` in each thread.
struct Sums {
    float of[4];
};

// Adds the products of a tile and sixteen columns: `a` are two numbers of two rows of the matrix, and
// two more of each; `b` those of a row of `x`. Which columns a thread has is the same for both.
__device__ void multiply(F16, Sums &sums, const u32 (&a)[4], u32 first, u32 second) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums.of[0]), "+f"(sums.of[1]), "+f"(sums.of[2]), "+f"(sums.of[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}
__device__ void multiply(Bf16, Sums &sums, const u32 (&a)[4], u32 first, u32 second) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums.of[0]), "+f"(sums.of[1]), "+f"(sums.of[2]), "+f"(sums.of[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}

// Two numbers of `e4m3`, which are exact in either type.
__device__ u32 widened(F16, u16 pair) {
    u32 both;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(pair));
    return both;
}
__device__ u32 widened(Bf16, u16 pair) {
    const u32 both = widened(F16{}, pair);
    return Bf16::bits(F16::number((u16)both)) | (u32)Bf16::bits(F16::number((u16)(both >> 16))) << 16;
}

// Weights of the type of `x`.
struct Same {
    // Pairs of numbers in a vector.
    static const u32 PAIRS = 4;
    template <class Number>
    static __device__ u32 pair(const Vector &vector, u32 index) {
        return vector.words[index];
    }
};
// Weights of 8 bits.
struct E4m3 {
    static const u32 PAIRS = 8;
    template <class Number>
    static __device__ u32 pair(const Vector &vector, u32 index) {
        return widened(Number{}, (u16)(vector.words[index / 2] >> 16 * (index % 2)));
    }
};

// Has a vector copied to shared memory, or zeros.
__device__ void fetch(Vector *to, const Vector *from, bool exists) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(exists ? 16u : 0u)
                 : "memory");
}

// The numbers of a vector, two in each word.
template <class Number>
__device__ float number(const Vector &vector, u32 index) {
    return Number::number((u16)(vector.words[index / 2] >> 16 * (index % 2)));
}

// Norms of rows of `count` vectors by their roots of mean squares, in shared memory with `stride`
// vectors between rows. As many warps as there can be share a row.
template <class Number, u32 WARPS>
__device__ void norm_rows(Vector *to, const Arguments &of, u32 count, u32 stride) {
    __shared__ float squares[ROWS][WARPS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 of_row = of.rows == 1 ? WARPS : of.rows == 2 ? WARPS / 2 : of.rows <= 4 ? WARPS / 4 : WARPS / 8;
    const u32 row = warp / of_row, part = warp % of_row;
    const bool exists = row < of.rows;
    Vector *mine = to + row * stride;
    if (exists) {
        float sum = 0.0f;
#pragma unroll 4
        for (u32 at = 32 * part + lane; at < count; at += 32 * of_row) {
            const Vector vector = of.x[(u64)row * count + at];
            mine[at] = vector;
#pragma unroll
            for (u32 index = 0; index < 8; ++index) {
                const float x = number<Number>(vector, index);
                sum = fmaf(x, x, sum);
            }
        }
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2)
            sum += __shfl_xor_sync(~0u, sum, distance);
        if (lane == 0)
            squares[row][part] = sum;
    }
    __syncthreads();
    if (exists) {
        float sum = 0.0f;
        for (u32 index = 0; index < of_row; ++index)
            sum += squares[row][index];
        const float root = rsqrtf(sum / (float)(8 * count) + of.eps);
#pragma unroll 4
        for (u32 at = 32 * part + lane; at < count; at += 32 * of_row) {
            const Vector vector = mine[at], weight = ((const Vector *)of.norm)[at];
            Vector normed;
#pragma unroll
            for (u32 word = 0; word < 4; ++word) {
                const u32 low = Number::bits(number<Number>(vector, 2 * word) * root * number<Number>(weight, 2 * word));
                const u32 high =
                    Number::bits(number<Number>(vector, 2 * word + 1) * root * number<Number>(weight, 2 * word + 1));
                normed.words[word] = low | high << 16;
            }
            mine[at] = normed;
        }
    }
    __syncthreads();
}

__device__ float activated(u32 activation, float x) {
    if (activation == 1)
        return x / (1.0f + expf(-x));
    const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

// Tiles of the matrix, whose rows have `width` vectors. A row's results do not depend on the other
// rows of `x`.
template <class Number, class Weight, class Shape>
__device__ void few_rows(const Arguments &of) {
    const u32 WARPS = Shape::WARPS, THREADS = Shape::THREADS, READS = Shape::READS, GROUPS = Shape::GROUPS;
    // Vectors of `x` for each of the matrix.
    const u32 WIDER = Weight::PAIRS / 4;
    extern __shared__ Vector shared[];
    Vector(*ring)[READS][2][THREADS] = (Vector(*)[READS][2][THREADS])shared;
    __shared__ float parts[2][WARPS][TILE][ROWS];
    // The kernel after this may begin what it does before it waits for this.
    asm volatile("griddepcontrol.launch_dependents;");
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, row = lane / 4;
    const u32 width = of.width, start = 4 * warp + quad;
    // A tile has as many results, and its second half is so many rows of the matrix further.
    const bool gated = of.activation != 0;
    const u32 results = gated ? TILE / 2 : TILE, half = gated ? of.outputs : TILE / 2;
    const u32 tiles = (of.outputs + results - 1) / results;

    // What is asked for next.
    u32 next_tile = blockIdx.x, next_at = start, slot = 0;
    const auto ask = [&] {
        if (next_tile < tiles) {
            // What is beyond the last row of the matrix is that row once more.
            const u32 last = gated ? 2 * of.outputs - 1 : of.outputs - 1, first = next_tile * results + row;
            const u32 rows[2] = {min(first, of.outputs - 1), min(first + half, last)};
#pragma unroll
            for (u32 read = 0; read < READS; ++read)
#pragma unroll
                for (u32 which = 0; which < 2; ++which) {
                    const u32 at = next_at + Shape::READ_WIDTH * read;
                    const bool exists = at < width;
                    fetch(&ring[slot][read][which][threadIdx.x],
                          of.weight + (u64)rows[which] * width + (exists ? at : 0), exists);
                }
            next_at += Shape::GROUP_WIDTH;
            if (next_at - start >= width)
                next_at = start, next_tile += gridDim.x;
            slot = slot + 1 < GROUPS ? slot + 1 : 0;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (u32 group = 0; group < GROUPS; ++group)
        ask();
    // The kernel before is over, which may have written `x`, or read what this writes.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const Vector *x = of.x;
    u32 stride = width * WIDER;
    if (of.norm) {
        Vector *normed = shared + GROUPS * READS * 2 * THREADS;
        norm_rows<Number, WARPS>(normed, of, width * WIDER, stride + X_PADDING);
        x = normed, stride += X_PADDING;
    }
    x += (u64)row * stride;

    // The result of a tile that a thread writes, if it does: of which row of `x`, and which.
    const u32 of_x = threadIdx.x / results, in_tile = threadIdx.x % results;
    u32 taken = 0, parity = 0;
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        const u32 output = tile * results + in_tile;
        const bool writes = of_x < of.rows && output < of.outputs;
        const u64 at = (u64)of_x * of.outputs + output;
        // What results are scaled by and added to is asked for before it is needed.
        float scales[2] = {of.factor, of.factor}, biases[2] = {}, before = 0.0f;
        if (writes) {
#pragma unroll
            for (u32 second = 0; second < 2; ++second)
                if (!second || gated) {
                    const u32 of_matrix = output + second * of.outputs;
                    if (of.scales)
                        scales[second] *= of.scales[of_matrix];
                    if (of.bias)
                        biases[second] = Number::number(of.bias[of_matrix]);
                }
            if (of.added)
                before = Number::number(((const u16 *)of.out)[at]);
        }
        Sums sums = {};
        for (u32 begin = start; begin - start < width; begin += Shape::GROUP_WIDTH) {
            Vector columns[READS][WIDER];
#pragma unroll
            for (u32 read = 0; read < READS; ++read)
#pragma unroll
                for (u32 part = 0; part < WIDER; ++part) {
                    const u32 at = begin + Shape::READ_WIDTH * read;
                    columns[read][part] = at < width && row < of.rows ? x[at * WIDER + part] : Vector{};
                }
            asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS - 1) : "memory");
#pragma unroll
            for (u32 read = 0; read < READS; ++read) {
                const Vector weights[2] = {ring[taken][read][0][threadIdx.x], ring[taken][read][1][threadIdx.x]};
#pragma unroll
                for (u32 part = 0; part < WIDER; ++part)
#pragma unroll
                    for (u32 two = 0; two < 4; two += 2) {
                        u32 a[4];
#pragma unroll
                        for (u32 index = 0; index < 4; ++index)
                            a[index] = Weight::template pair<Number>(weights[index % 2], 4 * part + two + index / 2);
                        multiply(Number{}, sums, a, columns[read][part].words[two],
                                 columns[read][part].words[two + 1]);
                    }
            }
            taken = taken + 1 < GROUPS ? taken + 1 : 0;
            ask();
        }
#pragma unroll
        for (u32 second = 0; second < 2; ++second)
#pragma unroll
            for (u32 which = 0; which < 2; ++which)
                parts[parity][warp][row + 8 * second][2 * quad + which] = sums.of[2 * second + which];
        // What the tile before left is read before another such barrier.
        __syncthreads();
        if (!writes)
            continue;
        const auto result = [&](u32 second) {
            float sum = 0.0f;
#pragma unroll
            for (u32 part = 0; part < WARPS; ++part)
                sum += parts[parity][part][in_tile + second * (TILE / 2)][of_x];
            return fmaf(sum, scales[second], biases[second]);
        };
        float value = result(0);
        if (gated)
            value = activated(of.activation, value) * result(1);
        if (of.wide)
            ((float *)of.out)[at] = value;
        else
            ((u16 *)of.out)[at] = Number::bits(value + before);
    }
}

// Their names and shapes are those of `SHAPES` on the host.
#define KERNEL(name, Number, Weight, WARPS, READS, GROUPS)                                                         \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                       \
        name##_##WARPS##x##READS##x##GROUPS(const __grid_constant__ Arguments of) {                                \
        few_rows<Number, Weight, Shape<WARPS, READS, GROUPS>>(of);                                                 \
    }
#define SHAPE(WARPS, READS, GROUPS)                                                                                \
    KERNEL(few_rows_f16_by_f16, F16, Same, WARPS, READS, GROUPS)                                                   \
    KERNEL(few_rows_bf16_by_bf16, Bf16, Same, WARPS, READS, GROUPS)                                                \
    KERNEL(few_rows_f16_by_e4m3, F16, E4m3, WARPS, READS, GROUPS)                                                  \
    KERNEL(few_rows_bf16_by_e4m3, Bf16, E4m3, WARPS, READS, GROUPS)
SHAPE(16, 4, 2)
SHAPE(8, 4, 3)
SHAPE(16, 2, 2)
