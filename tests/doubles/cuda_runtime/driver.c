/* The device, and the driver's modules and kernels, which do nothing. */

#include "double.h"

#include <dlfcn.h>
#include <stdio.h>

#define NAME "NVIDIA H200 (double)"
#define CONTEXT ((void *)0x10)

static int version = 13000;

void double_set_version(int cuda) { version = cuda; }

int cudaGetDevice(int *number)
{
    ENTER_ANYWAY;
    *number = 0;
    return OK;
}

int cudaSetDevice(int number)
{
    ENTER_ANYWAY;
    return number ? failed(INVALID_DEVICE) : OK;
}

int cudaGetDeviceCount(int *count)
{
    ENTER_ANYWAY;
    *count = 1;
    return OK;
}

int cudaDriverGetVersion(int *number)
{
    ENTER_ANYWAY;
    *number = version;
    return OK;
}

int cudaRuntimeGetVersion(int *number) { return cudaDriverGetVersion(number); }
int cuDriverGetVersion(int *number) { return cudaDriverGetVersion(number); }

/* cudaDeviceAttr and CUdevice_attribute: these have the same numbers. What is not here is 0, a "no". */
static const struct {
    int number, value;
} attributes[] = {
    {1, 1024},                                    /* threads in a block */
    {2, 1024}, {3, 1024}, {4, 64},                /* its sides */
    {5, 2147483647}, {6, 65535}, {7, 65535},      /* the sides of a grid */
    {8, 49152}, {81, 233472}, {97, 232448},       /* shared memory: of a block, of a multiprocessor, at most */
    {9, 65536},                                   /* constant memory */
    {10, 32},                                     /* threads in a warp */
    {11, 2147483647},                             /* pitch */
    {12, 65536}, {82, 65536},                     /* registers */
    {13, 1980000}, {36, 3201000}, {37, 6144},     /* clocks (kHz), bus (bits) */
    {14, 512},                                    /* alignment of textures */
    {16, 132},                                    /* multiprocessors */
    {19, 1}, {31, 1}, {32, 1}, {40, 3}, {41, 1},  /* maps host memory, concurrent, ECC, copy engines, unified */
    {38, 50 << 20},                               /* L2 cache */
    {39, 2048}, {106, 32},                        /* threads, and blocks, in a multiprocessor */
    {75, 9}, {76, 0},                             /* compute capability */
    {78, 1}, {79, 1}, {80, 1}, {83, 1}, {89, 1},  /* priorities, caches, managed memory */
    {90, 1}, {95, 1},                             /* preemption, cooperative launches */
    {99, 1}, {102, 1}, {115, 1},                  /* registers host memory, virtual memory, pools */
};

int cudaDeviceGetAttribute(int *value, int attribute, int number)
{
    ENTER_ANYWAY;
    if (number)
        return failed(INVALID_DEVICE);
    *value = 0;
    for (size_t i = 0; i < sizeof attributes / sizeof attributes[0]; i++)
        if (attributes[i].number == attribute)
            *value = attributes[i].value;
    return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int number)
{
    return cudaDeviceGetAttribute(value, attribute, number);
}

/* The beginning of cudaDeviceProp. CUDA 13 left out some fields of 12: the clock, where there is a gap now, overlap. */
struct properties {
    char name[256], uuid[16], luid[8];
    unsigned mask;
    size_t memory, shared_per_block;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3], clock;
    size_t constant;
    int major, minor;
    size_t texture, texture_pitch;
    int rest[5]; /* from CUDA 12's overlap, or CUDA 13's multiprocessors, on */
};

int cudaGetDeviceProperties(void *place, int number)
{
    ENTER_ANYWAY;
    if (number)
        return failed(INVALID_DEVICE);
    struct properties properties = {
        .name = NAME,
        .memory = memory.total,
        .shared_per_block = 49152,
        .registers = 65536,
        .warp = 32,
        .pitch = 2147483647,
        .threads = 1024,
        .block = {1024, 1024, 64},
        .grid = {2147483647, 65535, 65535},
        .constant = 65536,
        .major = 9,
        .texture = 512,
        .texture_pitch = 32,
    };
    /* Overlap (12), multiprocessors, timeout (12), integrated, maps host memory. */
    int in_12[] = {1, 132, 0, 0, 1}, in_13[] = {132, 0, 1};
    if (version < 13000)
        memcpy(properties.rest, in_12, sizeof in_12);
    else
        memcpy(properties.rest, in_13, sizeof in_13);
    memset(place, 0, 1000);
    memcpy(place, &properties, offsetof(struct properties, rest) + (version < 13000 ? sizeof in_12 : sizeof in_13));
    return OK;
}

int cudaGetDeviceProperties_v2(void *place, int number) { return cudaGetDeviceProperties(place, number); }

int cudaDeviceGetPCIBusId(char *text, int length, int number)
{
    ENTER_ANYWAY;
    snprintf(text, length, "0000:01:00.0");
    return number ? failed(INVALID_DEVICE) : OK;
}

int cudaDeviceGetByPCIBusId(int *number, const char *text)
{
    ENTER_ANYWAY;
    (void)text;
    *number = 0;
    return OK;
}

int cudaDeviceCanAccessPeer(int *can, int from, int to)
{
    ENTER_ANYWAY;
    (void)from, (void)to;
    *can = 0;
    return OK;
}

int cudaDeviceGetLimit(size_t *value, int limit)
{
    ENTER_ANYWAY;
    (void)limit;
    *value = 1024;
    return OK;
}

int cudaDeviceSetLimit(int limit, size_t value)
{
    ENTER_ANYWAY;
    (void)limit, (void)value;
    return OK;
}

int cudaProfilerStart(void) { return OK; }
int cudaProfilerStop(void) { return OK; }

int cuInit(unsigned flags)
{
    ENTER;
    return flags ? failed(INVALID_VALUE) : OK;
}

int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }

int cuDeviceGet(int *device, int number)
{
    ENTER_ANYWAY;
    *device = 0;
    return number ? failed(INVALID_DEVICE) : OK;
}

int cuDeviceGetName(char *name, int length, int device)
{
    ENTER_ANYWAY;
    snprintf(name, length, NAME);
    return device ? failed(INVALID_DEVICE) : OK;
}

int cuDeviceTotalMem_v2(size_t *total, int device)
{
    ENTER_ANYWAY;
    *total = memory.total;
    return device ? failed(INVALID_DEVICE) : OK;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    ENTER;
    *context = CONTEXT;
    return device ? failed(INVALID_DEVICE) : OK;
}

int cuDevicePrimaryCtxRelease(int device) { return device ? INVALID_DEVICE : OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device ? INVALID_DEVICE : OK; }

int cuCtxGetCurrent(void **context)
{
    ENTER;
    *context = CONTEXT;
    return OK;
}

int cuCtxSetCurrent(void *context)
{
    ENTER;
    return context == CONTEXT ? OK : failed(201); /* CUDA_ERROR_INVALID_CONTEXT */
}

int cuCtxGetDevice(int *device)
{
    ENTER;
    *device = 0;
    return OK;
}

int cuStreamGetCtx(void *stream, void **context)
{
    ENTER;
    *context = CONTEXT;
    return stream_of(stream) ? OK : failed(INVALID_HANDLE);
}

/* Modules: nothing is read but the names that are asked for. */

int cudaMalloc(void **, size_t);

struct function {
    struct object object;
    char *name;
    long launches;
    struct function *next;
};
static struct function *functions;

static int load(void **module, const void *image)
{
    if (!image)
        return failed(INVALID_VALUE);
    *module = new_object(MODULE, sizeof(struct object));
    return OK;
}

int cuModuleLoad(void **module, const char *path)
{
    ENTER;
    return load(module, path);
}

int cuModuleLoadData(void **module, const void *image)
{
    ENTER;
    return load(module, image);
}

int cuModuleUnload(void *pointer)
{
    ENTER;
    struct object *module = object(pointer, MODULE, "module");
    if (!module)
        return failed(INVALID_HANDLE);
    module->destroyed = true;
    return OK;
}

int cuModuleGetFunction(void **pointer, void *module, const char *name)
{
    ENTER;
    if (!object(module, MODULE, "module"))
        return failed(INVALID_HANDLE);
    struct function *function = *pointer = new_object(FUNCTION, sizeof *function);
    function->name = strdup(name);
    function->next = functions;
    functions = function;
    return OK;
}

int cuModuleGetGlobal_v2(unsigned long long *place, size_t *size, void *module, const char *name)
{
    ENTER;
    (void)name;
    if (!object(module, MODULE, "module"))
        return failed(INVALID_HANDLE);
    void *pointer;
    int error = cudaMalloc(&pointer, 4096); /* lives as long as the process */
    *place = (uintptr_t)pointer;
    if (size)
        *size = 4096;
    return error;
}

int cuModuleGetGlobal(unsigned long long *place, size_t *size, void *module, const char *name)
{
    return cuModuleGetGlobal_v2(place, size, module, name);
}

/* The kernels that were launched: the name and the count of the index-th, NULL after the last. */
const char *double_kernel(int index, long *launches)
{
    struct function *function = functions;
    while (function && index--)
        function = function->next;
    if (function)
        *launches = function->launches;
    return function ? function->name : NULL;
}

void double_reset_kernels(void)
{
    for (struct function *function = functions; function; function = function->next)
        function->launches = 0;
}

static int launch(void *pointer, const unsigned grid[3], const unsigned block[3], unsigned shared, void *on)
{
    struct function *function = object(pointer, FUNCTION, "kernel");
    struct stream *stream = function ? stream_of(on) : NULL;
    if (!stream)
        return failed(INVALID_HANDLE);
    unsigned long long threads = (unsigned long long)block[0] * block[1] * block[2];
    if (!grid[0] || !grid[1] || !grid[2] || !threads || threads > 1024 || block[2] > 64 || grid[0] > 2147483647 ||
        grid[1] > 65535 || grid[2] > 65535 || shared > 232448)
        return MISTAKE(INVALID_VALUE, "%s: no grid of (%u, %u, %u) blocks of (%u, %u, %u) threads, %u bytes shared",
                       function->name, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared);
    int error = use_stream(stream);
    if (error)
        return error;
    function->launches++;
    stream_works(stream, KERNEL_TIME);
    return OK;
}

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y,
                   unsigned z, unsigned shared, void *stream, void **arguments, void **extra)
{
    ENTER;
    (void)arguments, (void)extra;
    return launch(function, (unsigned[]){grid_x, grid_y, grid_z}, (unsigned[]){x, y, z}, shared, stream);
}

int cuLaunchCooperativeKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y,
                              unsigned z, unsigned shared, void *stream, void **arguments)
{
    ENTER;
    (void)arguments;
    return launch(function, (unsigned[]){grid_x, grid_y, grid_z}, (unsigned[]){x, y, z}, shared, stream);
}

int cuFuncGetAttribute(int *value, int attribute, void *function)
{
    ENTER;
    *value = attribute == 0 ? 1024 : 0; /* CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK */
    return object(function, FUNCTION, "kernel") ? OK : failed(INVALID_HANDLE);
}

int cuFuncSetAttribute(void *function, int attribute, int value)
{
    ENTER;
    (void)attribute, (void)value;
    return object(function, FUNCTION, "kernel") ? OK : failed(INVALID_HANDLE);
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared)
{
    ENTER;
    (void)shared;
    *blocks = 2048 / threads;
    return object(function, FUNCTION, "kernel") ? OK : failed(INVALID_HANDLE);
}

int cuOccupancyMaxPotentialBlockSize(int *grid, int *block, void *function, void *shared_of, size_t shared, int most)
{
    ENTER;
    (void)shared_of, (void)shared, (void)most;
    *grid = 132;
    *block = 256;
    return object(function, FUNCTION, "kernel") ? OK : failed(INVALID_HANDLE);
}

/* Linking of several objects, as CuPy does for device code in pieces: a module is what comes out. */
int cuLinkCreate_v2(unsigned options, void *names, void **values, void **state)
{
    ENTER;
    (void)options, (void)names, (void)values;
    *state = new_object(MODULE, sizeof(struct object));
    return OK;
}

int cuLinkCreate(unsigned options, void *names, void **values, void **state)
{
    return cuLinkCreate_v2(options, names, values, state);
}

int cuLinkComplete(void *state, void **image, size_t *size)
{
    ENTER;
    *image = "linked";
    *size = 7;
    return object(state, MODULE, "linker") ? OK : failed(INVALID_HANDLE);
}

int cuLinkDestroy(void *state)
{
    ENTER;
    return object(state, MODULE, "linker") ? OK : failed(INVALID_HANDLE);
}

int cuLinkAddData_v2(void *state)
{
    ENTER;
    return object(state, MODULE, "linker") ? OK : failed(INVALID_HANDLE);
}

int cuLinkAddData(void *state) { return cuLinkAddData_v2(state); }

/* Where a function of the driver is: its newest version is meant, as far as there are several. */
int cuGetProcAddress_v2(const char *name, void **place, int cuda, unsigned long long flags, int *status)
{
    ENTER_ANYWAY;
    (void)cuda, (void)flags;
    static void *self;
    if (!self) {
        Dl_info information;
        dladdr((void *)cuInit, &information);
        self = dlopen(information.dli_fname, RTLD_NOW);
    }
    char newer[128];
    snprintf(newer, sizeof newer, "%s_v2", name);
    *place = dlsym(self, newer);
    if (!*place)
        *place = dlsym(self, name);
    if (status)
        *status = *place ? 0 : 1; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND */
    return *place ? OK : failed(NOT_FOUND);
}

int cuGetProcAddress(const char *name, void **place, int cuda, unsigned long long flags)
{
    return cuGetProcAddress_v2(name, place, cuda, flags, NULL);
}

/* NVIDIA's own libraries ask for tables of functions that are not documented. There are none. */
int cuGetExportTable(const void **table, const void *id)
{
    ENTER_ANYWAY;
    (void)id;
    *table = NULL;
    return NOT_FOUND;
}
