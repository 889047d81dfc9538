// Behind `chain_speculative_sampling`, which writes what shared memory held where the
// target has nowhere more than the draft: the last token of each chain becomes -1 unless
// the target has more of it than the draft. A thread for each request.

using u32 = unsigned int;
using u64 = unsigned long long;

extern "C" __global__ void check_last_tokens(
    int *tokens, const float *draft_probs, const float *target_probs, u32 batch, u32 drafts, u32 vocab
) {
    const u64 request = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (request >= batch) return;
    int *chain = tokens + request * (drafts + 1);
    u32 last = drafts;
    while (last > 0 && chain[last] == -1) --last;
    const u32 token = chain[last];
    if (token < vocab) {
        const float target = target_probs[(request * (drafts + 1) + last) * vocab + token];
        const float draft = last < drafts ? draft_probs[(request * drafts + last) * vocab + token] : 0;
        if (target > draft) return;
    }
    chain[last] = -1;
}
