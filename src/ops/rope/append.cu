// Queries that are turned in place, and keys, turned, and values that are written to a paged cache, of
// `f16` or `bf16`. A thread has sixteen elements of a head.
//
// A launch may overlap the one before (programmatic dependent launch).
// Architecture: compute_90

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct F16 {
    static __device__ float number(u16 bits) {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
    static __device__ u16 bits(float x) {
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
};

struct Bf16 {
    static __device__ float number(u16 bits) { return __uint_as_float((u32)bits << 16); }
    static __device__ u16 bits(float x) {
        u16 bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
        return bits;
    }
};

// Elements of a thread, and those that it reads at once.
const u32 ELEMENTS = 16, VECTOR = 8;

struct __align__(16) Vector {
    u16 bits[VECTOR];
};

// HeadRows `[tokens, heads, head_dim]`; strides are in elements.
struct HeadRows {
    u16 *data;
    u64 token, head;
    u32 heads;
};

// Its copy on the host is `Arguments`.
struct Arguments {
    HeadRows q, k, v;
    // Pages of keys and of values, whose strides are equal.
    u16 *pages[2];
    u64 page, slot, head;
    // In each row the cosines, then the sines.
    const float *cos_sin;
    // Of each token: its position, `i64` if they are `wide`; its request, and its place in it.
    const void *pos_ids;
    const int *requests, *places;
    // Where the pages of each request are in `indices`.
    const int *indptr, *indices;
    u32 wide, page_size, head_dim, rotary_dim, interleave;
    // Blocks of a token.
    u32 blocks;
};

template <class Number>
__device__ void turn(u16 &x, u16 &y, float cosine, float sine) {
    const float from_x = Number::number(x), from_y = Number::number(y);
    x = Number::bits(from_x * cosine - from_y * sine);
    y = Number::bits(from_y * cosine + from_x * sine);
}

template <class Number>
__device__ void rope_append(const Arguments &of) {
    // The kernel after this may begin what it does before it waits for this; this one waits for the kernel
    // before.
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const u32 token = blockIdx.x / of.blocks, parts = of.head_dim / ELEMENTS;
    const u32 unit = blockIdx.x % of.blocks * blockDim.x + threadIdx.x;
    u32 head = unit / parts;
    const u32 part = unit % parts;
    if (head >= of.q.heads + of.k.heads + of.v.heads)
        return;
    const bool is_query = head < of.q.heads, is_key = !is_query && head < of.q.heads + of.k.heads;
    const bool turns = (is_query || is_key) && part < of.rotary_dim / ELEMENTS;
    if (is_query && !turns)
        return;
    const HeadRows &rows = is_query ? of.q : is_key ? of.k : of.v;
    head -= is_query ? 0 : is_key ? of.q.heads : of.q.heads + of.k.heads;
    // The two vectors of pairs in two halves, or neighbours.
    const bool halves = turns && !of.interleave;
    const u32 first = halves ? VECTOR * part : ELEMENTS * part;
    const u32 second = halves ? first + of.rotary_dim / 2 : first + VECTOR;
    u16 *from = rows.data + token * rows.token + head * rows.head;
    Vector one = *(const Vector *)(from + first), two = *(const Vector *)(from + second);
    if (turns) {
        const u64 position = of.wide ? ((const u64 *)of.pos_ids)[token] : (u64)((const u32 *)of.pos_ids)[token];
        const float *cosines = of.cos_sin + position * of.rotary_dim + VECTOR * part;
        const float *sines = cosines + of.rotary_dim / 2;
#pragma unroll
        for (u32 pair = 0; pair < VECTOR; ++pair) {
            if (halves) {
                turn<Number>(one.bits[pair], two.bits[pair], cosines[pair], sines[pair]);
            } else {
                Vector &both = pair < VECTOR / 2 ? one : two;
                const u32 at = 2 * (pair % (VECTOR / 2));
                turn<Number>(both.bits[at], both.bits[at + 1], cosines[pair], sines[pair]);
            }
        }
    }
    u16 *to = from;
    if (!is_query) {
        const u32 place = (u32)of.places[token];
        const u64 page = (u64)of.indices[of.indptr[of.requests[token]] + place / of.page_size];
        to = of.pages[is_key ? 0 : 1] + page * of.page + place % of.page_size * of.slot + head * of.head;
    }
    *(Vector *)(to + first) = one;
    *(Vector *)(to + second) = two;
}

extern "C" __global__ void rope_append_f16(const __grid_constant__ Arguments of) { rope_append<F16>(of); }
extern "C" __global__ void rope_append_bf16(const __grid_constant__ Arguments of) { rope_append<Bf16>(of); }
