// Writes the LSE of queries that see no key: -inf, or the logit of the head's
// sink, in base 2. Upstream's kernels write about -50000.
//
// empty_states.ptx is this, by nvcc 13.0 (-ptx -arch compute_80), with .version
// 7.0 and without comments.

__device__ void write(float* lse, const float* sinks, unsigned heads, unsigned first, unsigned step) {
  for (unsigned head = first; head < heads; head += step) {
    lse[head] = sinks ? sinks[head] * 1.44269504f : __int_as_float(0xff800000);
  }
}

// A warp for each of up to `rows` queries, which are those of `batch` requests.
//
// Request r has the queries from qo_indptr[r] on, or is one query if that is
// null. Its keys are in the pages from kv_indptr[r] on, of page_size keys but
// for the last, of last_page_len[r]; that is null for pages of one key. With
// kv_indptr of null there is one request, of `rows` queries and `keys` keys.
// Bits of `mask`, if not null, are those of a custom mask, which each request
// has from byte mask_indptr[r] on; window_left, if not negative, a window's.
extern "C" __global__ void empty_states(float* lse, const int* qo_indptr, const int* kv_indptr,
                                        const int* last_page_len, const unsigned char* mask,
                                        const int* mask_indptr, const float* sinks, unsigned rows,
                                        unsigned batch, unsigned heads, int page_size,
                                        int keys, int window_left) {
  const unsigned row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  unsigned request = 0;
  long long query = 0, queries = 1;
  if (!kv_indptr) {
    query = row, queries = rows;
  } else if (!qo_indptr) {
    request = row;
  } else {
    if (row >= (unsigned)qo_indptr[batch]) return;
    // The last request that starts at the row or in front of it.
    for (unsigned end = batch; end - request > 1;) {
      const unsigned middle = request + (end - request) / 2;
      if ((unsigned)qo_indptr[middle] <= row) {
        request = middle;
      } else {
        end = middle;
      }
    }
    query = row - qo_indptr[request], queries = qo_indptr[request + 1] - qo_indptr[request];
  }
  long long len = keys;
  if (kv_indptr) {
    len = kv_indptr[request + 1] - kv_indptr[request];
    if (last_page_len && len > 0) len = (len - 1) * page_size + last_page_len[request];
  }
  bool seen = len > 0;
  if (seen && mask) {
    if (mask_indptr) mask += mask_indptr[request];
    long long start = window_left < 0 ? 0 : len - queries + query - window_left;
    start = query * len + (start < 0 ? 0 : start);
    const long long end = (query + 1) * len;
    seen = false;
    // All lanes go round as often.
    for (long long first = start / 8; first * 8 < end && !seen; first += 32) {
      const long long byte = first + lane;
      unsigned bits = 0;
      if (byte * 8 < end) {
        bits = mask[byte];
        if (byte * 8 < start) bits &= 0xff << (start % 8);
        if (byte * 8 + 8 > end) bits &= 0xff >> (8 - end % 8);
      }
      seen = __any_sync(~0u, bits & 0xff);
    }
  }
  if (!seen) write(lse + (unsigned long long)row * heads, sinks, heads, lane, 32);
}

// A block for each work item of a mixed batch, of which there are *count, and
// which is of the q_len[i] queries from q_indptr[i] on over kv_len[i] keys.
extern "C" __global__ void empty_works(float* lse, const int* q_indptr, const int* q_len,
                                       const int* kv_len, const int* q_start,
                                       const int* kv_head, const int* count, unsigned heads) {
  for (int work = blockIdx.x; work < *count; work += gridDim.x) {
    // The request's first item writes for all.
    if (kv_len[work] > 0 || q_start[work] > 0 || kv_head[work] > 0) continue;
    const unsigned long long first = (unsigned long long)q_indptr[work] * heads;
    write(lse + first, nullptr, q_len[work] * heads, threadIdx.x, blockDim.x);
  }
}
