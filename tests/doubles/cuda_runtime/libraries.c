/* cuBLAS, cuRAND and cuSPARSE, as far as Chainer calls them: handles are real, nothing is computed.

   What CuPy needs of these and other libraries to be loaded, and is not here, is made by the Python module: it fails,
   with a complaint. */

#include "double.h"

/* Each library has its own number for a handle that is none. */
#define HANDLE(pointer, what, error)                \
    ENTER;                                          \
    struct library *library = object(pointer, MODULE, what); \
    if (!library)                                   \
        return error;

struct library {
    struct object object;
    void *stream;
    int math, pointers;
};

static int create(void **pointer)
{
    *pointer = new_object(MODULE, sizeof(struct library));
    return OK;
}

int cublasCreate_v2(void **pointer)
{
    ENTER;
    return create(pointer);
}

int cublasDestroy_v2(void *pointer)
{
    HANDLE(pointer, "cuBLAS handle", 1)
    library->object.destroyed = true;
    return OK;
}

int cublasGetVersion_v2(void *pointer, int *version)
{
    HANDLE(pointer, "cuBLAS handle", 1)
    *version = 130000;
    return OK;
}

int cublasSetStream_v2(void *pointer, void *stream)
{
    HANDLE(pointer, "cuBLAS handle", 1)
    library->stream = stream;
    return stream_of(stream) ? OK : INVALID_VALUE;
}

int cublasGetStream_v2(void *pointer, void **stream)
{
    HANDLE(pointer, "cuBLAS handle", 1)
    *stream = library->stream;
    return OK;
}

int cublasSetMathMode(void *pointer, int mode)
{
    HANDLE(pointer, "cuBLAS handle", 1)
    library->math = mode;
    return OK;
}

int cublasGetMathMode(void *pointer, int *mode)
{
    HANDLE(pointer, "cuBLAS handle", 1)
    *mode = library->math;
    return OK;
}

int cublasSetPointerMode_v2(void *pointer, int mode)
{
    HANDLE(pointer, "cuBLAS handle", 1)
    library->pointers = mode;
    return OK;
}

int cublasGetPointerMode_v2(void *pointer, int *mode)
{
    HANDLE(pointer, "cuBLAS handle", 1)
    *mode = library->pointers;
    return OK;
}

/* Products: the stream must be there. Their arguments are not looked at. */
#define PRODUCT(name)                                                         \
    int name(void *pointer)                                                   \
    {                                                                         \
        HANDLE(pointer, "cuBLAS handle", 1)                                   \
        return stream_of(library->stream) ? OK : 13; /* EXECUTION_FAILED */   \
    }

PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasDgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasSger_v2)
PRODUCT(cublasDger_v2)
PRODUCT(cublasSgeam)
PRODUCT(cublasDgeam)
PRODUCT(cublasSdgmm)
PRODUCT(cublasDdgmm)
PRODUCT(cublasSsyrk_v2)
PRODUCT(cublasDsyrk_v2)

int curandCreateGenerator(void **pointer, int kind)
{
    ENTER;
    (void)kind;
    return create(pointer);
}

int curandDestroyGenerator(void *pointer)
{
    HANDLE(pointer, "cuRAND generator", 101)
    library->object.destroyed = true;
    return OK;
}

int curandSetStream(void *pointer, void *stream)
{
    HANDLE(pointer, "cuRAND generator", 101)
    library->stream = stream;
    return stream_of(stream) ? OK : 103;
}

/* Numbers: the memory must be there. They stay what they are. */
static int check_numbers(const void *numbers, size_t size)
{
    if (is_device_memory((uintptr_t)numbers, size))
        return OK;
    complain("cuRAND: %p is no memory of the device of %zu bytes", numbers, size);
    return 103; /* CURAND_STATUS_OUT_OF_RANGE */
}

#define NUMBERS(name, type)                                        \
    int name(void *pointer, type *numbers, size_t count)             \
    {                                                              \
        HANDLE(pointer, "cuRAND generator", 101)                   \
        return check_numbers(numbers, count * sizeof(type));       \
    }

NUMBERS(curandGenerate, unsigned)
NUMBERS(curandGenerateUniform, float)
NUMBERS(curandGenerateUniformDouble, double)
NUMBERS(curandGenerateNormal, float)
NUMBERS(curandGenerateNormalDouble, double)
NUMBERS(curandGenerateLogNormal, float)
NUMBERS(curandGenerateLogNormalDouble, double)
NUMBERS(curandGeneratePoisson, unsigned)

int curandSetPseudoRandomGeneratorSeed(void *pointer, unsigned long long seed)
{
    HANDLE(pointer, "cuRAND generator", 101)
    (void)seed;
    return OK;
}

int curandSetGeneratorOffset(void *pointer, unsigned long long offset)
{
    HANDLE(pointer, "cuRAND generator", 101)
    (void)offset;
    return OK;
}

int curandGetVersion(int *version)
{
    ENTER;
    *version = 10400;
    return OK;
}

int cusparseCreate(void **pointer)
{
    ENTER;
    return create(pointer);
}

int cusparseDestroy(void *pointer)
{
    HANDLE(pointer, "cuSPARSE handle", 1)
    library->object.destroyed = true;
    return OK;
}

int cusparseSetStream(void *pointer, void *stream)
{
    HANDLE(pointer, "cuSPARSE handle", 1)
    library->stream = stream;
    return stream_of(stream) ? OK : INVALID_VALUE;
}

int cusparseGetVersion(void *pointer, int *version)
{
    HANDLE(pointer, "cuSPARSE handle", 1)
    *version = 12600;
    return OK;
}
