/* The driver's virtual memory: addresses are reserved, physical memory is made, and mapped to addresses.

   It is as strict as the documentation (CUDA Driver API, "Virtual Memory Management") allows: each of these is
   CUDA_ERROR_INVALID_VALUE, and a complaint. A size or an address that is no multiple of the granularity; mapping
   outside of one reservation, over what is mapped, or more than the handle has; unmapping what is not mapped, or part
   of a mapping; access to part of a mapping or to what is none; freeing addresses that are not a whole reservation, or
   in which something is mapped; releasing a handle twice, or mapping one after that. Physical memory lives until it is
   released and nowhere mapped.

   With data, physical memory is a part of one file without a name, and is mapped where CUDA's would be: an access to
   what is not mapped ends the process, and memory mapped elsewhere has its bytes there. Without data the addresses of
   a reservation are plain memory that nobody writes to, and the rest is bookkeeping: Linux lets a process have 65,530
   mappings, an H200 has 71,885 pages. */

#include "double.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

struct physical {
    struct object object; /* destroyed: released */
    size_t size;
    off_t offset; /* in the file */
    long mappings;
};

enum { NONE = 0, READ = 1, READ_WRITE = 3 }; /* CUmemAccess_flags; the kind of a mapping */
enum { PLAIN, BACKED };                      /* kinds of a reservation: without and with data */

typedef unsigned long long address; /* CUdeviceptr */
typedef unsigned long long handle;  /* CUmemGenericAllocationHandle */

struct location {
    int type, id;
};

struct properties { /* CUmemAllocationProp */
    int type, handle_types;
    struct location location;
    void *windows;
    unsigned char flags[8];
};

struct access { /* CUmemAccessDesc */
    struct location location;
    int flags;
};

static struct ranges reservations, mappings;
static int file = -1;
static off_t file_end;

static bool is_the_device(struct location location)
{
    return location.type == 1 && location.id == 0; /* CU_MEM_LOCATION_TYPE_DEVICE */
}

static bool is_aligned(unsigned long long value)
{
    return value % GRANULARITY == 0;
}

bool touches_reserved(uintptr_t start, size_t size)
{
    return ranges_overlap(&reservations, start, size);
}

/* Tell whether whole mappings, without a gap, are all of these addresses. */
static bool are_whole_mappings(uintptr_t start, size_t size)
{
    uintptr_t end = start + size;
    for (uintptr_t next = start; next < end;) {
        struct range *mapping = range_from(&mappings, next);
        if (!mapping || mapping->start + mapping->size > end)
            return false;
        next = mapping->start + mapping->size;
    }
    return true;
}

bool is_mapped(uintptr_t start, size_t size)
{
    for (uintptr_t next = start; next < start + size;) {
        struct range *mapping = range_at(&mappings, next);
        if (!mapping || mapping->kind != READ_WRITE)
            return false;
        next = mapping->start + mapping->size;
    }
    return true;
}

static bool check_properties(const struct properties *properties)
{
    enum { PINNED = 1 }; /* CU_MEM_ALLOCATION_TYPE_PINNED */
    return properties && properties->type == PINNED && is_the_device(properties->location);
}

int cuMemGetAllocationGranularity(size_t *granularity, const struct properties *properties, int option)
{
    ENTER;
    if (!granularity || !check_properties(properties) || (option != 0 && option != 1))
        return MISTAKE(INVALID_VALUE, "cuMemGetAllocationGranularity: bad properties or option");
    *granularity = GRANULARITY;
    return OK;
}

int cuMemAddressReserve(address *start, size_t size, size_t alignment, address wanted, unsigned long long flags)
{
    ENTER_UNSAFE;
    (void)wanted; /* a hint */
    if (!size || !is_aligned(size) || !is_aligned(wanted) || flags || (alignment & (alignment - 1)))
        return MISTAKE(INVALID_VALUE, "cuMemAddressReserve(%zu, alignment %zu, flags %llu)", size, alignment, flags);
    if (alignment < GRANULARITY)
        alignment = GRANULARITY;
    void *addresses = reserve_addresses(size, alignment, !moves_data);
    if (!addresses)
        return failed(OUT_OF_MEMORY);
    *start = (uintptr_t)addresses;
    range_add(&reservations, (struct range){*start, size, moves_data ? BACKED : PLAIN, 0, NULL});
    memory.reserved += size;
    return OK;
}

int cuMemAddressFree(address start, size_t size)
{
    ENTER_UNSAFE;
    struct range *reservation = range_from(&reservations, start);
    if (!reservation || reservation->size != size)
        return MISTAKE(INVALID_VALUE, "cuMemAddressFree(%#llx, %zu): no reservation is that", start, size);
    if (ranges_overlap(&mappings, start, size))
        return MISTAKE(INVALID_VALUE, "cuMemAddressFree(%#llx, %zu): something is mapped there", start, size);
    munmap((void *)(uintptr_t)start, size);
    memory.reserved -= size;
    range_remove(&reservations, reservation);
    return OK;
}

int cuMemCreate(handle *made, size_t size, const struct properties *properties, unsigned long long flags)
{
    ENTER_UNSAFE;
    if (!size || !is_aligned(size) || flags || !check_properties(properties))
        return MISTAKE(INVALID_VALUE, "cuMemCreate(%zu, flags %llu): bad size, flags or properties", size, flags);
    if (!take_memory(size))
        return failed(OUT_OF_MEMORY);
    struct physical *physical = new_object(PHYSICAL, sizeof *physical);
    physical->size = size;
    physical->offset = file_end; /* the file has holes: what was released takes no memory */
    file_end += size;
    memory.physical += size;
    *made = (uintptr_t)physical;
    return OK;
}

static void free_if_unused(struct physical *physical)
{
    if (!physical->object.destroyed || physical->mappings)
        return;
    if (file >= 0)
        fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, physical->offset, physical->size);
    memory.physical -= physical->size;
    give_memory(physical->size);
}

int cuMemRelease(handle number)
{
    ENTER_UNSAFE;
    struct physical *physical = object((void *)(uintptr_t)number, PHYSICAL, "handle of physical memory");
    if (!physical)
        return failed(INVALID_VALUE);
    physical->object.destroyed = true;
    free_if_unused(physical);
    return OK;
}

/* Give addresses of a reservation with data the memory of the file, or none. */
static bool map_file(uintptr_t start, struct range *mapping)
{
    if (file < 0)
        file = memfd_create("device memory", MFD_CLOEXEC);
    struct physical *physical = mapping->object;
    if (file < 0 || ftruncate(file, file_end))
        return false;
    int protection = mapping->kind == NONE ? PROT_NONE : mapping->kind == READ ? PROT_READ : PROT_READ | PROT_WRITE;
    return mmap((void *)start, mapping->size, protection, MAP_SHARED | MAP_FIXED, file, physical->offset) != MAP_FAILED;
}

static bool is_backed(uintptr_t start)
{
    return range_at(&reservations, start)->kind == BACKED;
}

int cuMemMap(address start, size_t size, size_t offset, handle number, unsigned long long flags)
{
    ENTER_UNSAFE;
    struct physical *physical = object((void *)(uintptr_t)number, PHYSICAL, "handle of physical memory");
    if (!physical)
        return failed(INVALID_VALUE);
    if (!size || !is_aligned(start) || !is_aligned(size) || offset || flags || size > physical->size)
        return MISTAKE(INVALID_VALUE, "cuMemMap(%#llx, %zu, offset %zu, flags %llu) of a handle of %zu bytes", start,
                       size, offset, flags, physical->size);
    struct range *reservation = range_at(&reservations, start);
    if (!reservation || start + size > reservation->start + reservation->size)
        return MISTAKE(INVALID_VALUE, "cuMemMap(%#llx, %zu): not inside of one reservation", start, size);
    if (ranges_overlap(&mappings, start, size))
        return MISTAKE(INVALID_VALUE, "cuMemMap(%#llx, %zu): something is mapped there", start, size);
    struct range mapping = {start, size, NONE, 0, physical};
    if (reservation->kind == BACKED && !map_file(start, &mapping))
        return failed(OUT_OF_MEMORY);
    range_add(&mappings, mapping);
    physical->mappings++;
    memory.mapped += size;
    return OK;
}

int cuMemUnmap(address start, size_t size)
{
    ENTER_UNSAFE;
    if (!size || !are_whole_mappings(start, size))
        return MISTAKE(INVALID_VALUE, "cuMemUnmap(%#llx, %zu): not whole mappings", start, size);
    if (is_backed(start) && mmap((void *)(uintptr_t)start, size, PROT_NONE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
        return failed(OUT_OF_MEMORY);
    while (ranges_overlap(&mappings, start, size)) {
        struct range *mapping = &mappings.items[range_index(&mappings, start)];
        struct physical *physical = mapping->object;
        memory.mapped -= mapping->size;
        range_remove(&mappings, mapping);
        physical->mappings--;
        free_if_unused(physical);
    }
    return OK;
}

int cuMemSetAccess(address start, size_t size, const struct access *access, size_t count)
{
    ENTER_UNSAFE;
    if (!size || !is_aligned(size) || !are_whole_mappings(start, size))
        return MISTAKE(INVALID_VALUE, "cuMemSetAccess(%#llx, %zu): not whole mappings", start, size);
    if (count != 1 || !is_the_device(access->location) ||
        (access->flags != NONE && access->flags != READ && access->flags != READ_WRITE))
        return MISTAKE(INVALID_VALUE, "cuMemSetAccess(%#llx, %zu): bad location or flags", start, size);
    int protection = access->flags == NONE ? PROT_NONE : access->flags == READ ? PROT_READ : PROT_READ | PROT_WRITE;
    if (is_backed(start) && mprotect((void *)(uintptr_t)start, size, protection))
        return failed(OUT_OF_MEMORY);
    for (size_t i = range_index(&mappings, start); i < mappings.count && mappings.items[i].start < start + size; i++)
        mappings.items[i].kind = access->flags;
    return OK;
}

int cuMemGetAccess(unsigned long long *flags, const struct location *location, address start)
{
    ENTER;
    struct range *mapping = range_at(&mappings, start);
    if (!mapping || !is_the_device(*location))
        return failed(INVALID_VALUE);
    *flags = mapping->kind;
    return OK;
}
