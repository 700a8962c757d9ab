/* cuDNN 9: descriptors are real, sizes are plausible, nothing is computed.

   The functions that are not here check what they are given and do nothing: cudnn.py writes them, with the parameters
   of cuDNN's headers. */

#include "cudnn.h"

#include <stdio.h>

static size_t workspace = 16 * MIB; /* of each convolution */

void double_set_workspace(size_t size) { workspace = size; }

size_t cudnnGetVersion(void) { return 92800; }
size_t cudnnGetCudartVersion(void)
{
    int version;
    cudaRuntimeGetVersion(&version);
    return version;
}

const char *cudnnGetErrorString(int status) { return status ? "CUDNN_STATUS_OF_THE_DOUBLE" : "CUDNN_STATUS_SUCCESS"; }

void cudnnGetLastErrorString(char *text, size_t size)
{
    int count = double_number_of_complaints();
    snprintf(text, size, "%s", count ? double_complaint(count - 1) : "");
}

void *new_descriptor(void) { return new_object(DESCRIPTOR, sizeof(struct descriptor)); }

bool is_descriptor(const char *function, const char *name, void *pointer, bool may_be_null)
{
    if ((may_be_null && !pointer) || object(pointer, DESCRIPTOR, "descriptor or handle of cuDNN"))
        return true;
    complain("%s: %s", function, name);
    return false;
}

bool is_data(const char *function, const char *name, const void *pointer, size_t size)
{
    if (!pointer || is_device_memory((uintptr_t)pointer, size ? size : 1))
        return true;
    complain("%s: %s is %p, which is no memory of the device of %zu bytes", function, name, pointer, size);
    return false;
}

size_t size_of(void *pointer)
{
    struct descriptor *descriptor = pointer;
    return descriptor ? descriptor->bytes : 0;
}

static size_t element(int type)
{
    return type == 1 ? 8 : type == 2 ? 2 : 4; /* cudnnDataType_t: float, double, half */
}

int cudnnSetStream(void *handle, void *stream)
{
    ENTER;
    return is_descriptor(__func__, "handle", handle, false) && stream_of(stream) ? OK : BAD_PARAMETER;
}

int cudnnSetTensorNdDescriptor(void *pointer, int type, int count, const int *sides, const int *strides)
{
    ENTER;
    struct descriptor *descriptor = pointer;
    if (!is_descriptor(__func__, "tensorDesc", pointer, false) || count < 3 || count > 8)
        return BAD_PARAMETER;
    size_t last = 0;
    for (int i = 0; i < count; i++) {
        if (sides[i] <= 0 || strides[i] <= 0) {
            complain("%s: side %d of %d, with stride %d", __func__, i, sides[i], strides[i]);
            return BAD_PARAMETER;
        }
        last += (sides[i] - 1) * (size_t)strides[i];
        descriptor->sides[i] = sides[i];
        descriptor->strides[i] = strides[i];
    }
    descriptor->type = type;
    descriptor->count = count;
    descriptor->bytes = (last + 1) * element(type);
    return OK;
}

int cudnnGetTensorNdDescriptor(void *pointer, int most, int *type, int *count, int *sides, int *strides)
{
    ENTER;
    struct descriptor *descriptor = pointer;
    if (!is_descriptor(__func__, "tensorDesc", pointer, false))
        return BAD_PARAMETER;
    *type = descriptor->type;
    *count = descriptor->count;
    for (int i = 0; i < most && i < descriptor->count; i++) {
        sides[i] = descriptor->sides[i];
        strides[i] = descriptor->strides[i];
    }
    return OK;
}

int cudnnSetFilterNdDescriptor(void *pointer, int type, int format, int count, const int *sides)
{
    ENTER;
    (void)format;
    struct descriptor *descriptor = pointer;
    if (!is_descriptor(__func__, "filterDesc", pointer, false))
        return BAD_PARAMETER;
    descriptor->bytes = element(type);
    for (int i = 0; i < count; i++)
        descriptor->bytes *= sides[i];
    return OK;
}

/* Offer the algorithm 1 with a workspace, and 0 with none. */
void offer_algorithms(int most, int *count, struct performance *results)
{
    *count = most < 2 ? most : 2;
    for (int i = 0; i < *count; i++)
        results[i] = (struct performance){.algorithm = 1 - i, .milliseconds = 1, .memory = i ? 0 : workspace,
                                          .deterministic = 1, .math_type = 3}; /* CUDNN_FMA_MATH */
}

size_t workspace_of(int algorithm) { return algorithm ? workspace : 0; }
