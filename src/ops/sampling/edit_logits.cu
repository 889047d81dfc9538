// Changes some logits of each row: divides one that is above 0 by the edit's penalty, or
// multiplies another by it, and adds the edit's bias. A block for each row. Row `i` has the
// edits from `indptr[i]` to `indptr[i + 1]`, each of another token.

using u32 = unsigned int;
using u64 = unsigned long long;

extern "C" __global__ void edit_logits(
    float *logits, const u32 *indptr, const u32 *tokens, const float2 *edits, u32 vocab
) {
    float *row = logits + (u64)blockIdx.x * vocab;
    const u32 end = indptr[blockIdx.x + 1];
    for (u32 at = indptr[blockIdx.x] + threadIdx.x; at < end; at += blockDim.x) {
        const float logit = row[tokens[at]];
        const auto [penalty, bias] = edits[at];
        const float penalized = logit > 0 ? __fdiv_rn(logit, penalty) : __fmul_rn(logit, penalty);
        row[tokens[at]] = __fadd_rn(penalized, bias);
    }
}
