/* The calls: counts, failures, complaints; the tables; and what Python asks of the double. */

#include "double.h"

#include <stdarg.h>
#include <stdio.h>

struct call {
    const char *name;
    long count;
    long fails_at; /* the count from which it fails; 0: never */
    long failures; /* how many times */
    int error;
    long breaks_at; /* the count after which the device is broken; 0: never */
    int break_error;
};

#define MOST_CALLS 512
#define MOST_COMPLAINTS 64

static struct call calls[MOST_CALLS];
static int number_of_calls;
static char complaints[MOST_COMPLAINTS][256];
static int number_of_complaints;
static int broken; /* the error of the context, for ever */
static bool in_child;
static const char *current; /* the call that is under way */
static __thread int last_error;

pthread_mutex_t double_lock;

static void make_lock(void)
{
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&double_lock, &recursive);
}

static void note_child(void)
{
    in_child = true;
    make_lock(); /* another thread may have had it at the fork */
}

__attribute__((constructor)) static void begin(void)
{
    make_lock();
    pthread_atfork(NULL, NULL, note_child);
}

int lock_double(void)
{
    pthread_mutex_lock(&double_lock);
    return 0;
}

void unlock_double(int *locked)
{
    (void)locked;
    pthread_mutex_unlock(&double_lock);
}

static struct call *call_named(const char *name)
{
    for (int i = 0; i < number_of_calls; i++)
        if (!strcmp(calls[i].name, name))
            return &calls[i];
    if (number_of_calls == MOST_CALLS)
        abort();
    calls[number_of_calls].name = strdup(name);
    return &calls[number_of_calls++];
}

int enter(struct call **place, const char *name, bool needs_device)
{
    if (!*place)
        *place = call_named(name);
    struct call *call = *place;
    current = name;
    call->count++;
    if (in_child && needs_device)
        return failed(NOT_INITIALIZED);
    if (call->fails_at && call->count >= call->fails_at && call->failures) {
        call->failures--;
        return failed(call->error);
    }
    int error = needs_device && broken ? failed(broken) : OK;
    if (call->count == call->breaks_at)
        broken = call->break_error;
    return error;
}

int failed(int error)
{
    if (error && error != NOT_READY)
        last_error = error;
    return error;
}

void complain(const char *format, ...)
{
    if (getenv("CUDA_DOUBLE_ABORTS")) /* with Python's faulthandler, to see who */
        abort();
    if (number_of_complaints == MOST_COMPLAINTS)
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(complaints[number_of_complaints++], sizeof complaints[0], format, arguments);
    va_end(arguments);
}

/* Errors. */

static const struct {
    int number;
    const char *name, *text;
} errors[] = {
    {OK, "cudaSuccess", "no error"},
    {INVALID_VALUE, "cudaErrorInvalidValue", "invalid argument"},
    {OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "out of memory"},
    {NOT_INITIALIZED, "cudaErrorInitializationError", "initialization error"},
    {INVALID_DEVICE, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {NOT_FOUND, "cudaErrorSymbolNotFound", "named symbol not found"},
    {NOT_READY, "cudaErrorNotReady", "device not ready"},
    {ILLEGAL_ADDRESS, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {ALREADY_REGISTERED, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {NOT_REGISTERED, "cudaErrorHostMemoryNotRegistered", "pointer does not correspond to a registered memory region"},
    {LAUNCH_FAILED, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {NOT_SUPPORTED, "cudaErrorNotSupported", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {CAPTURE_IMPLICIT, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CAPTURED_EVENT, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {901, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {999, "cudaErrorUnknown", "unknown error"},
};

static int error_index(int number)
{
    for (int i = 0; i < (int)(sizeof errors / sizeof errors[0]); i++)
        if (errors[i].number == number)
            return i;
    return sizeof errors / sizeof errors[0] - 1;
}

const char *cudaGetErrorName(int error) { return errors[error_index(error)].name; }
const char *cudaGetErrorString(int error) { return errors[error_index(error)].text; }

int cuGetErrorName(int error, const char **name)
{
    *name = cudaGetErrorName(error);
    return OK;
}

int cuGetErrorString(int error, const char **text)
{
    *text = cudaGetErrorString(error);
    return OK;
}

int cudaPeekAtLastError(void) { return broken ? broken : last_error; }

int cudaGetLastError(void)
{
    int error = cudaPeekAtLastError();
    last_error = OK;
    return error;
}

/* Tables. */

size_t range_index(const struct ranges *ranges, uintptr_t address)
{
    size_t low = 0, high = ranges->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges->items[middle].start + ranges->items[middle].size <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct range *range_at(const struct ranges *ranges, uintptr_t address)
{
    size_t index = range_index(ranges, address);
    bool inside = index < ranges->count && ranges->items[index].start <= address;
    return inside ? &ranges->items[index] : NULL;
}

struct range *range_from(const struct ranges *ranges, uintptr_t address)
{
    struct range *range = range_at(ranges, address);
    return range && range->start == address ? range : NULL;
}

bool ranges_overlap(const struct ranges *ranges, uintptr_t start, size_t size)
{
    size_t index = range_index(ranges, start);
    return index < ranges->count && ranges->items[index].start < start + size;
}

void range_add(struct ranges *ranges, struct range range)
{
    if (ranges->count == ranges->room) {
        ranges->room = ranges->room ? 2 * ranges->room : 64;
        ranges->items = realloc(ranges->items, ranges->room * sizeof *ranges->items);
    }
    size_t index = range_index(ranges, range.start);
    struct range *place = ranges->items + index;
    memmove(place + 1, place, (ranges->count++ - index) * sizeof *place);
    *place = range;
}

void range_remove(struct ranges *ranges, struct range *range)
{
    size_t after = ranges->items + ranges->count - range - 1;
    memmove(range, range + 1, after * sizeof *range);
    ranges->count--;
}

void *new_object(enum kind kind, size_t size)
{
    struct object *object = calloc(1, size);
    object->kind = kind;
    return object;
}

void *object(void *pointer, enum kind kind, const char *what)
{
    struct object *object = pointer;
    if (!object || object->kind != kind)
        complain("%s: %p is no %s", current, pointer, what);
    else if (object->destroyed)
        complain("%s: the %s %p is used after it was destroyed", current, what, pointer);
    else
        return object;
    return NULL;
}

/* What Python asks. */

int double_number_of_calls(void) { return number_of_calls; }
const char *double_call_name(int index) { return calls[index].name; }
long double_call_count(int index) { return calls[index].count; }
int double_number_of_complaints(void) { return number_of_complaints; }
const char *double_complaint(int index) { return complaints[index]; }
const struct memory *double_memory(void) { return &memory; }

/* Let the calls of that name fail from the `at`-th from now on, `times` times. */
void double_fail(const char *name, long at, long times, int error)
{
    LOCKED;
    (void)locked;
    struct call *call = call_named(name);
    call->fails_at = call->count + at;
    call->failures = times;
    call->error = error;
}

/* Let CUDA work in this forked child: for tests that want a fresh process at little cost. */
void double_allow_child(void) { in_child = false; }

/* Fail as a kernel does: all later calls that need the device return the error. */
void double_break(int error) { broken = error; }

void double_break_after(const char *name, long number, int error)
{
    LOCKED;
    (void)locked;
    struct call *call = call_named(name);
    call->breaks_at = call->count + number;
    call->break_error = error;
}

void double_reset(void)
{
    LOCKED;
    (void)locked;
    for (int i = 0; i < number_of_calls; i++)
        calls[i].count = calls[i].fails_at = calls[i].failures = calls[i].breaks_at = 0;
    number_of_complaints = broken = 0;
    memory.peak = memory.used;
    memory.pinned_peak = memory.pinned;
    memory.copied_in = memory.copied_out = memory.copied_within = memory.copied_pageable = 0;
}

/* For what the double does not have: the stubs call it. */
int double_unsupported(const char *name, int error)
{
    LOCKED;
    (void)locked;
    call_named(name)->count++;
    return MISTAKE(error, "%s is not in the double", name);
}
