/* A library of one's own, written in C by the TVM-FFI ABI and without its
 * headers, for the example `custom_module` and the tests.
 *
 *     cc -shared -fPIC -o libadd_one.so examples/add_one.c
 *
 * Libraries in C++ or CUDA are easier written with TVM-FFI's headers, which
 * make functions like these, with all their checks, from plain ones.
 */
#include <stddef.h>
#include <stdint.h>

/* A tagged value, as in tvm/ffi/c_api.h. */
typedef struct {
    int32_t type_index;
    uint32_t small_len;
    union {
        int64_t i;
        double f;
        void *p;
    } value;
} Any;

enum { NONE = 0, INT = 1, DL_TENSOR = 7 };

/* As in dlpack/dlpack.h. */
typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

/* In libtvm_ffi, which the process has. */
extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);

static int raise(const char *kind, const char *message) {
    TVMFFIErrorSetRaisedFromCStr(kind, message);
    return -1;
}

/* add_one(out, x): one more than each element of a float vector of the host. */
int __tvm_ffi_add_one(void *self, const Any *args, int32_t count, Any *result) {
    (void)self;
    if (count != 2) {
        return raise("TypeError", "Mismatched number of arguments when calling: "
                                  "`add_one(0: DLTensor*, 1: DLTensor*) -> void`. Expected 2");
    }
    for (int i = 0; i < 2; ++i) {
        if (args[i].type_index != DL_TENSOR) {
            return raise("TypeError", "add_one takes two tensors");
        }
    }
    const DLTensor *out = args[0].value.p, *x = args[1].value.p;
    if (x->device_type != 1 || out->device_type != 1) {
        return raise("ValueError", "add_one works on the host");
    }
    if (x->code != 2 || x->bits != 32 || out->code != 2 || out->bits != 32) {
        return raise("ValueError", "add_one takes tensors of 32-bit floats");
    }
    if (x->ndim != 1 || out->ndim != 1 || x->shape[0] != out->shape[0]) {
        return raise("ValueError", "add_one takes two vectors of one length");
    }
    float *to = out->data;
    const float *from = x->data;
    for (int64_t i = 0; i < x->shape[0]; ++i) {
        to[i * out->strides[0]] = from[i * x->strides[0]] + 1.0f;
    }
    result->type_index = NONE;
    return 0;
}

/* answer(): an integer. */
int __tvm_ffi_answer(void *self, const Any *args, int32_t count, Any *result) {
    (void)self;
    (void)args;
    if (count != 0) {
        return raise("TypeError", "Mismatched number of arguments when calling: `answer() -> int`. Expected 0");
    }
    result->type_index = INT;
    result->value.i = 42;
    return 0;
}
