/* Device memory, which is host memory, page-locked memory and copies. */

#include "double.h"

#include <sys/mman.h>

enum { PLAIN, ASYNCHRONOUS };               /* kinds of device memory */
enum { HOST_ALLOCATED, HOST_REGISTERED };   /* kinds of page-locked memory */
enum { HOST_TO_HOST, IN, OUT, WITHIN, ANY }; /* cudaMemcpyKind */

/* Without data, copies of fewer bytes are made all the same: flags and the like, by which programs decide. */
#define SMALL 4096

struct memory memory = {.total = 143771 * MIB}; /* an H200 */
bool moves_data = true;
static struct ranges device, host;

void double_setup(size_t total, int data)
{
    LOCKED;
    (void)locked;
    memory.total = total;
    moves_data = data;
}

bool take_memory(size_t size)
{
    if (size > memory.total - memory.used)
        return false;
    memory.used += size;
    if (memory.used > memory.peak)
        memory.peak = memory.used;
    return true;
}

void give_memory(size_t size)
{
    memory.used -= size;
}

void *reserve_addresses(size_t size, size_t alignment, bool usable)
{
    int protection = usable ? PROT_READ | PROT_WRITE : PROT_NONE;
    char *start = mmap(NULL, size + alignment, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    size_t before = alignment ? -(uintptr_t)start % alignment : 0;
    if (before)
        munmap(start, before);
    if (alignment > before)
        munmap(start + before + size, alignment - before);
    return start + before;
}

bool is_device_memory(uintptr_t start, size_t size)
{
    struct range *range = range_at(&device, start);
    if (range)
        return size <= range->start + range->size - start;
    return is_mapped(start, size);
}

bool touches_device_memory(uintptr_t start, size_t size)
{
    return ranges_overlap(&device, start, size) || touches_reserved(start, size);
}

/* The driver hands small memory out of blocks; large memory is whole pages of 2 MiB. */
static size_t charge(size_t size)
{
    size_t unit = size < MIB ? 512 : GRANULARITY;
    return (size + unit - 1) / unit * unit;
}

int cudaMalloc(void **pointer, size_t size)
{
    ENTER_UNSAFE;
    *pointer = NULL;
    if (!size)
        return OK;
    if (size > memory.total || !take_memory(charge(size)))
        return failed(OUT_OF_MEMORY);
    *pointer = reserve_addresses(size, 0, true);
    if (!*pointer) {
        give_memory(charge(size));
        return failed(OUT_OF_MEMORY);
    }
    memory.allocated += charge(size);
    range_add(&device, (struct range){(uintptr_t)*pointer, size, PLAIN, charge(size), NULL});
    return OK;
}

static int free_asynchronous(struct range *);

int cudaFree(void *pointer)
{
    ENTER_UNSAFE;
    if (!pointer)
        return OK;
    struct range *range = range_from(&device, (uintptr_t)pointer);
    if (!range)
        return MISTAKE(INVALID_VALUE, "cudaFree(%p): nothing was allocated there", pointer);
    if (range->kind == ASYNCHRONOUS)
        return free_asynchronous(range);
    munmap(pointer, range->size);
    give_memory(range->charged);
    memory.allocated -= range->charged;
    range_remove(&device, range);
    return OK;
}

/* Memory that moves where it is needed: it takes none of the device's for good. */
int cudaMallocManaged(void **pointer, size_t size, unsigned flags)
{
    ENTER_UNSAFE;
    if (flags != 1 && flags != 2)
        return MISTAKE(INVALID_VALUE, "cudaMallocManaged(%zu, flags %u)", size, flags);
    if (!size)
        return MISTAKE(INVALID_VALUE, "cudaMallocManaged(0)");
    *pointer = reserve_addresses(size, 0, true);
    if (!*pointer)
        return failed(OUT_OF_MEMORY);
    range_add(&device, (struct range){(uintptr_t)*pointer, size, PLAIN, 0, NULL});
    return OK;
}

int cudaMemGetInfo(size_t *free, size_t *total)
{
    ENTER;
    *free = memory.total - memory.used;
    *total = memory.total;
    return OK;
}

int cuMemGetInfo_v2(size_t *free, size_t *total)
{
    return cudaMemGetInfo(free, total);
}

/* Pools of cudaMallocAsync. The driver maps pages where it needs them, so a pool's memory is never in pieces: memory
   in use and memory reserved are two numbers. What is reserved beyond the release threshold goes back at a
   synchronization (CUDA C++ Programming Guide, "Stream Ordered Memory Allocator"). */

struct pool {
    struct object object;
    size_t used, reserved, used_peak, reserved_peak, threshold;
    struct pool *next;
};
static struct pool *pools, *default_pool, *current_pool;
#define POOL_UNIT (32 * MIB)

enum { THRESHOLD = 4, RESERVED, RESERVED_HIGH, USED, USED_HIGH }; /* cudaMemPoolAttr */

static struct pool *new_pool(void)
{
    struct pool *pool = new_object(POOL, sizeof *pool);
    pool->next = pools;
    return pools = pool;
}

static struct pool *the_default_pool(void)
{
    return default_pool ? default_pool : (default_pool = new_pool());
}

static void set_reserved(struct pool *pool, size_t size)
{
    memory.pool_reserved += size - pool->reserved;
    pool->reserved = size;
    if (size > pool->reserved_peak)
        pool->reserved_peak = size;
}

static void trim(struct pool *pool, size_t least)
{
    size_t kept = (pool->used + POOL_UNIT - 1) / POOL_UNIT * POOL_UNIT;
    if (kept < least)
        kept = least;
    if (kept < pool->reserved) {
        give_memory(pool->reserved - kept);
        set_reserved(pool, kept);
    }
}

void trim_pools(void)
{
    for (struct pool *pool = pools; pool; pool = pool->next)
        trim(pool, pool->threshold);
}

static int allocate_from(struct pool *pool, void **pointer, size_t size, void *stream)
{
    *pointer = NULL;
    if (!stream_of(stream))
        return failed(INVALID_HANDLE);
    if (!size)
        return OK;
    size_t charged = (size + 511) / 512 * 512;
    if (size > memory.total)
        return failed(OUT_OF_MEMORY);
    if (pool->used + charged > pool->reserved) {
        size_t wanted = (pool->used + charged + POOL_UNIT - 1) / POOL_UNIT * POOL_UNIT;
        for (struct pool *other = pools; other; other = other->next)
            if (other != pool && wanted - pool->reserved > memory.total - memory.used)
                trim(other, 0);
        if (!take_memory(wanted - pool->reserved))
            return failed(OUT_OF_MEMORY);
        set_reserved(pool, wanted);
    }
    *pointer = reserve_addresses(size, 0, true);
    if (!*pointer)
        return failed(OUT_OF_MEMORY);
    pool->used += charged;
    memory.pool_used += charged;
    if (pool->used > pool->used_peak)
        pool->used_peak = pool->used;
    range_add(&device, (struct range){(uintptr_t)*pointer, size, ASYNCHRONOUS, charged, pool});
    return OK;
}

static int free_asynchronous(struct range *range)
{
    struct pool *pool = range->object;
    pool->used -= range->charged;
    memory.pool_used -= range->charged;
    munmap((void *)range->start, range->size);
    range_remove(&device, range);
    return OK;
}

int cudaMallocAsync(void **pointer, size_t size, void *stream)
{
    ENTER;
    return allocate_from(current_pool ? current_pool : the_default_pool(), pointer, size, stream);
}

int cudaMallocFromPoolAsync(void **pointer, size_t size, void *pool, void *stream)
{
    ENTER;
    if (!object(pool, POOL, "pool"))
        return failed(INVALID_VALUE);
    return allocate_from(pool, pointer, size, stream);
}

int cudaFreeAsync(void *pointer, void *stream)
{
    ENTER;
    if (!stream_of(stream))
        return failed(INVALID_HANDLE);
    if (!pointer)
        return OK;
    struct range *range = range_from(&device, (uintptr_t)pointer);
    if (!range || range->kind != ASYNCHRONOUS)
        return MISTAKE(INVALID_VALUE, "cudaFreeAsync(%p): cudaMallocAsync gave no memory there", pointer);
    return free_asynchronous(range);
}

int cudaDeviceGetDefaultMemPool(void **pool, int number)
{
    ENTER;
    *pool = the_default_pool();
    return number ? failed(INVALID_DEVICE) : OK;
}

int cudaDeviceGetMemPool(void **pool, int number)
{
    ENTER;
    *pool = current_pool ? current_pool : the_default_pool();
    return number ? failed(INVALID_DEVICE) : OK;
}

int cudaDeviceSetMemPool(int number, void *pool)
{
    ENTER;
    if (number || !object(pool, POOL, "pool"))
        return failed(INVALID_VALUE);
    current_pool = pool;
    return OK;
}

int cudaMemPoolCreate(void **pool, const void *properties)
{
    ENTER;
    (void)properties;
    *pool = new_pool();
    return OK;
}

int cudaMemPoolDestroy(void *pointer)
{
    ENTER;
    struct pool *pool = object(pointer, POOL, "pool");
    if (!pool || pool == default_pool)
        return failed(INVALID_VALUE);
    trim(pool, 0);
    pool->threshold = 0;
    pool->object.destroyed = true;
    if (current_pool == pool)
        current_pool = NULL;
    return OK;
}

int cudaMemPoolTrimTo(void *pool, size_t least)
{
    ENTER;
    if (!object(pool, POOL, "pool"))
        return failed(INVALID_VALUE);
    trim(pool, least);
    return OK;
}

int cudaMemPoolGetAttribute(void *pointer, int attribute, void *value)
{
    ENTER;
    struct pool *pool = object(pointer, POOL, "pool");
    if (!pool)
        return failed(INVALID_VALUE);
    size_t values[] = {
        [THRESHOLD] = pool->threshold,
        [RESERVED] = pool->reserved,
        [RESERVED_HIGH] = pool->reserved_peak,
        [USED] = pool->used,
        [USED_HIGH] = pool->used_peak,
    };
    if (attribute < THRESHOLD) /* reuse policies: all allowed */
        *(int *)value = 1;
    else if (attribute <= USED_HIGH)
        memcpy(value, &values[attribute], sizeof(size_t));
    else
        return failed(INVALID_VALUE);
    return OK;
}

int cudaMemPoolSetAttribute(void *pointer, int attribute, void *value)
{
    ENTER;
    struct pool *pool = object(pointer, POOL, "pool");
    if (!pool)
        return failed(INVALID_VALUE);
    if (attribute == THRESHOLD)
        memcpy(&pool->threshold, value, sizeof(size_t));
    else if (attribute == RESERVED_HIGH)
        pool->reserved_peak = pool->reserved;
    else if (attribute == USED_HIGH)
        pool->used_peak = pool->used;
    return OK;
}

/* Page-locked host memory. */

static void add_host(void *pointer, size_t size, int kind)
{
    range_add(&host, (struct range){(uintptr_t)pointer, size, kind, 0, NULL});
    memory.pinned += size;
    if (memory.pinned > memory.pinned_peak)
        memory.pinned_peak = memory.pinned;
}

static void remove_host(struct range *range)
{
    memory.pinned -= range->size;
    range_remove(&host, range);
}

int cudaHostAlloc(void **pointer, size_t size, unsigned flags)
{
    ENTER_UNSAFE;
    (void)flags;
    *pointer = NULL;
    if (!size)
        return OK;
    *pointer = reserve_addresses(size, 0, true);
    if (!*pointer)
        return failed(OUT_OF_MEMORY);
    add_host(*pointer, size, HOST_ALLOCATED);
    return OK;
}

int cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

int cudaFreeHost(void *pointer)
{
    ENTER_UNSAFE;
    if (!pointer)
        return OK;
    struct range *range = range_from(&host, (uintptr_t)pointer);
    if (!range || range->kind != HOST_ALLOCATED)
        return MISTAKE(INVALID_VALUE, "cudaFreeHost(%p): cudaHostAlloc gave no memory there", pointer);
    munmap(pointer, range->size);
    remove_host(range);
    return OK;
}

int cudaHostRegister(void *pointer, size_t size, unsigned flags)
{
    ENTER_UNSAFE;
    (void)flags;
    if (!pointer || !size)
        return failed(INVALID_VALUE);
    if (ranges_overlap(&host, (uintptr_t)pointer, size))
        return MISTAKE(ALREADY_REGISTERED, "cudaHostRegister(%p): it is page-locked already", pointer);
    add_host(pointer, size, HOST_REGISTERED);
    return OK;
}

int cudaHostUnregister(void *pointer)
{
    ENTER_UNSAFE;
    struct range *range = range_from(&host, (uintptr_t)pointer);
    if (!range || range->kind != HOST_REGISTERED)
        return MISTAKE(NOT_REGISTERED, "cudaHostUnregister(%p): it is not registered", pointer);
    remove_host(range);
    return OK;
}

int cudaPointerGetAttributes(void *attributes, const void *pointer)
{
    ENTER;
    struct {
        int type, device;
        void *on_device, *on_host;
    } known = {0, -2, NULL, (void *)pointer}; /* cudaMemoryTypeUnregistered, cudaInvalidDeviceId */
    if (range_at(&host, (uintptr_t)pointer)) {
        known.type = 1;
        known.device = 0;
        known.on_device = (void *)pointer;
    } else if (is_device_memory((uintptr_t)pointer, 1)) {
        known.type = 2;
        known.device = 0;
        known.on_device = (void *)pointer;
        known.on_host = NULL;
    }
    memcpy(attributes, &known, sizeof known);
    return OK;
}

/* Copies. */

static int check_copy(const char *name, const void *target, const void *source, size_t size, int kind)
{
    bool to_device = touches_device_memory((uintptr_t)target, size);
    bool from_device = touches_device_memory((uintptr_t)source, size);
    if (kind == ANY)
        kind = to_device ? (from_device ? WITHIN : IN) : (from_device ? OUT : HOST_TO_HOST);
    if (to_device != (kind == IN || kind == WITHIN) || from_device != (kind == OUT || kind == WITHIN))
        return MISTAKE(INVALID_VALUE, "%s(%p, %p, %zu, kind %d): no memory of the device, or on the wrong side",
                       name, target, source, size, kind);
    if ((to_device && !is_device_memory((uintptr_t)target, size)) ||
        (from_device && !is_device_memory((uintptr_t)source, size)))
        return MISTAKE(INVALID_VALUE, "%s(%p, %p, %zu, kind %d): some of it is not allocated, or not accessible",
                       name, target, source, size, kind);
    const void *on_host = kind == IN ? source : target;
    if (kind == IN || kind == OUT) {
        struct range *range = range_at(&host, (uintptr_t)on_host);
        if (!range || (uintptr_t)on_host + size > range->start + range->size)
            memory.copied_pageable += size;
    }
    *(kind == IN ? &memory.copied_in : kind == OUT ? &memory.copied_out : &memory.copied_within) += size;
    return OK;
}

int copy_memory(const char *name, void *target, const void *source, size_t size, int kind)
{
    if (!size)
        return OK;
    int error = check_copy(name, target, source, size, kind);
    if (!error && (moves_data || size < SMALL))
        memmove(target, source, size);
    return error;
}

int cudaMemcpy(void *target, const void *source, size_t size, int kind)
{
    ENTER_UNSAFE;
    int error = use_stream(stream_of(NULL));
    if (error)
        return error;
    wait_for_all();
    trim_pools();
    return copy_memory("cudaMemcpy", target, source, size, kind);
}

int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *pointer)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    int error = use_stream(stream);
    if (error)
        return error;
    if (keep_copy(stream, target, source, size, kind))
        return OK;
    stream_works(stream, COPY_TIME(size));
    return copy_memory("cudaMemcpyAsync", target, source, size, kind);
}

static int copy_rows(const char *name, char *target, size_t target_pitch, const char *source, size_t source_pitch,
                     size_t width, size_t height, int kind)
{
    if (width > target_pitch || width > source_pitch)
        return failed(INVALID_VALUE);
    int error = OK;
    for (size_t row = 0; !error && row < height; row++)
        error = copy_memory(name, target + row * target_pitch, source + row * source_pitch, width, kind);
    return error;
}

int cudaMemcpy2D(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                 size_t height, int kind)
{
    ENTER;
    return copy_rows("cudaMemcpy2D", target, target_pitch, source, source_pitch, width, height, kind);
}

int cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                      size_t height, int kind, void *pointer)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    stream_works(stream, COPY_TIME(width * height));
    return copy_rows("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, height, kind);
}

int cudaMemcpyPeer(void *target, int to, const void *source, int from, size_t size)
{
    ENTER;
    return to || from ? failed(INVALID_DEVICE) : copy_memory("cudaMemcpyPeer", target, source, size, WITHIN);
}

int cudaMemcpyPeerAsync(void *target, int to, const void *source, int from, size_t size, void *stream)
{
    ENTER;
    if (!stream_of(stream))
        return failed(INVALID_HANDLE);
    return to || from ? failed(INVALID_DEVICE) : copy_memory("cudaMemcpyPeerAsync", target, source, size, WITHIN);
}

static int set(const char *name, void *target, int value, size_t size)
{
    if (!size)
        return OK;
    if (!is_device_memory((uintptr_t)target, size))
        return MISTAKE(INVALID_VALUE, "%s(%p, %zu): no memory of the device", name, target, size);
    if (moves_data || size < SMALL)
        memset(target, value, size);
    return OK;
}

int cudaMemset(void *target, int value, size_t size)
{
    ENTER;
    return set("cudaMemset", target, value, size);
}

int cudaMemsetAsync(void *target, int value, size_t size, void *pointer)
{
    ENTER;
    struct stream *stream = stream_of(pointer);
    if (!stream)
        return failed(INVALID_HANDLE);
    stream_works(stream, KERNEL_TIME);
    return set("cudaMemsetAsync", target, value, size);
}
