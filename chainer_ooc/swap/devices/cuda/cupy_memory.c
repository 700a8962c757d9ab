/* GPU memory for CuPy from page arenas: what CuPy's CFunctionAllocator calls, and the driver's functions.

   An allocation is granted here, in C, as long as memory in use and the allocation stay below a level that the engine has
   set for the thread. Beyond it, `before` of Python makes room, or raises.

   1. Freeing never runs Python, and calls the driver only after close(), when what is freed shall go back to the GPU.
   2. Nothing waits with the interpreter's lock, nor with the arena's: callbacks of streams may need the former.
   3. CuPy takes NULL for an address, and an exception for an error of its own. So an exception is put aside until the
      call is back in our own function, which CuPy has for its allocator.
   4. A child that was forked from a process with arenas has no GPU: it is told so, and frees nothing.
   5. While a program captures a CUDA graph, most calls of the driver are forbidden to it, or to all threads: those that are
      "potentially unsafe", since the graph does not repeat them. Ours are safe: what they do lasts as long as the graph.
      So the thread's mode is "relaxed" for each. No mode allows to wait for the GPU, to ask a stream that is captured, nor
      to record an event on it, which would belong to the graph.
   6. libcuda is reached by name: CuPy has loaded it. Nothing of CUDA is needed to build this. */

#include "../ram/allocator.h"
#include "page_arena.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* CUDA Driver API. */

typedef struct { int type, id; } Location; /* CUmemLocation */
typedef struct { Location location; int flags; } Access; /* CUmemAccessDesc */
typedef struct { /* CUmemAllocationProp */
    int type, handle_types;
    Location location;
    void *windows;
    unsigned char compression, direct;
    unsigned short usage;
    unsigned char reserved[4];
} Properties;

enum { ON_DEVICE = 1, PINNED = 1, READ_WRITE = 3, NO_TIMING = 2, LEGACY = 1, PER_THREAD = 2, RELAXED = 2 };
enum { CAPTURE_IMPLICIT = 906 }; /* CUresult */
enum { VIRTUAL_MEMORY = 102, DIRECT_WITH_VIRTUAL_MEMORY = 110 }; /* CUdevice_attribute */

static struct {
    int (*get_attribute)(int *value, int attribute, int device);
    int (*granularity)(size_t *size, const Properties *, int option);
    int (*reserve)(unsigned long long *start, size_t size, size_t alignment, unsigned long long wanted, unsigned long long flags);
    int (*create)(unsigned long long *page, size_t size, const Properties *, unsigned long long flags);
    int (*release)(unsigned long long page);
    int (*map)(unsigned long long start, size_t size, size_t offset, unsigned long long page, unsigned long long flags);
    int (*unmap)(unsigned long long start, size_t size);
    int (*set_access)(unsigned long long start, size_t size, const Access *, size_t count);
    int (*event_create)(void **event, unsigned flags);
    int (*event_record)(void *event, void *stream);
    int (*event_query)(void *event);
    int (*event_synchronize)(void *event);
    int (*get_context)(void **context);
    int (*set_context)(void *context);
    int (*synchronize)(void);
    int (*is_capturing)(void *stream, int *status);
    int (*exchange_mode)(int *mode);
} cuda;

static const struct { const char *name; void *function; } cuda_functions[] = {
    {"cuDeviceGetAttribute", &cuda.get_attribute}, {"cuMemGetAllocationGranularity", &cuda.granularity},
    {"cuMemAddressReserve", &cuda.reserve}, {"cuMemCreate", &cuda.create}, {"cuMemRelease", &cuda.release},
    {"cuMemMap", &cuda.map}, {"cuMemUnmap", &cuda.unmap}, {"cuMemSetAccess", &cuda.set_access},
    {"cuEventCreate", &cuda.event_create}, {"cuEventRecord", &cuda.event_record}, {"cuEventQuery", &cuda.event_query},
    {"cuEventSynchronize", &cuda.event_synchronize}, {"cuCtxGetCurrent", &cuda.get_context},
    {"cuCtxSetCurrent", &cuda.set_context}, {"cuCtxSynchronize", &cuda.synchronize},
    {"cuStreamIsCapturing", &cuda.is_capturing}, {"cuThreadExchangeStreamCaptureMode", &cuda.exchange_mode},
};

static bool has_driver; /* of a test */

/* Finds the driver's functions. Returns the name of one that is missing, or NULL. */
static const char *find_cuda(void)
{
    if (has_driver)
        return NULL;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (!library)
        library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library)
        return "libcuda.so.1";
    for (size_t n = 0; n < sizeof cuda_functions / sizeof *cuda_functions; n++) {
        void *found = dlsym(library, cuda_functions[n].name);
        if (!found)
            return cuda_functions[n].name;
        memcpy(cuda_functions[n].function, &found, sizeof found);
    }
    return NULL;
}

/* The arenas. */

#define MOST_DEVICES 64
/* After close(), free pages go back once there are so many bytes of them. */
#define WORTH_GIVING_BACK (32 << 20)
/* Streams are put in order so often for one allocation: other threads may free meanwhile. */
#define MOST_ORDERS 8

typedef struct {
    PyObject_HEAD
    struct page_arena *arena;
    int device;
    unsigned long long start;
    size_t space, page;
    void *context;
    Properties properties;
    Access access[MOST_DEVICES]; /* the GPU's own, then its peers' */
    size_t n_access;
    void **events; /* unused ones */
    size_t n_events, events_size;
    _Atomic size_t outside; /* bytes that count as used beside those of the arena */
    _Atomic long long moved; /* bytes that moves have added to memory in use */
    _Atomic size_t peak_taken;
    _Atomic size_t missing; /* bytes of pages, for the last allocation that found none */
    atomic_bool closed;
    _Atomic size_t kept; /* free bytes that could not be given back: in pages that are partly in use */
} Arena;

static Arena *arenas[MOST_DEVICES]; /* for ever: arrays outlive the mode */
static PyObject *before, *refused, *order, *make; /* of Python; NULL once the interpreter ends */
static size_t announced = SIZE_MAX;
static intptr_t (*current_stream)(void);
static atomic_bool forked;

#define OWN 8
static _Thread_local struct {
    struct {
        int device; /* and 1 */
        unsigned epoch;
        intptr_t stream;
        size_t level;
        long long peak;
    } of[OWN];
    PyObject *type, *error, *traceback; /* put aside */
    bool failed;
    bool has_no_arena; /* the GPU of the allocation that has returned NULL */
    bool is_quiet;   /* the engine itself allocates: nobody is asked, nothing is noted */
    intptr_t number; /* of its default stream */
} own;

static _Atomic intptr_t threads;

/* Lets the thread make calls that are potentially unsafe while a graph is captured. Returns its mode of before. */
static int relax(void)
{
    int mode = RELAXED;
    cuda.exchange_mode(&mode);
    return mode;
}

/* Undoes that. Returns whether the call between was without an error. */
static bool restore(int mode, int error)
{
    cuda.exchange_mode(&mode);
    return !error;
}

static void *handle_of(intptr_t stream)
{
    return (void *)(stream < 0 ? PER_THREAD : stream);
}

/* Returns whether a graph is being captured of a stream, of the legacy one whether of any that it comprises. */
static bool is_captured(intptr_t stream)
{
    int status = 0;
    int error = cuda.is_capturing(handle_of(stream), &status);
    return status || error == CAPTURE_IMPLICIT;
}

static bool driver_create(void *context, uint64_t *page)
{
    Arena *self = context;
    unsigned long long made;
    int mode = relax();
    if (!restore(mode, cuda.create(&made, self->page, &self->properties, 0)))
        return false;
    *page = made;
    return true;
}

static void driver_release(void *context, uint64_t page)
{
    (void)context;
    int mode = relax();
    restore(mode, cuda.release(page));
}

static bool driver_map(void *context, uint64_t offset, uint64_t page)
{
    Arena *self = context;
    int mode = relax();
    return restore(mode, cuda.map(self->start + offset, self->page, 0, page, 0));
}

static bool driver_allow(void *context, uint64_t offset, uint64_t nbytes)
{
    Arena *self = context;
    int mode = relax();
    return restore(mode, cuda.set_access(self->start + offset, nbytes, self->access, self->n_access));
}

static bool driver_unmap(void *context, uint64_t offset)
{
    Arena *self = context;
    int mode = relax();
    return restore(mode, cuda.unmap(self->start + offset, self->page));
}

/* Has the GPU's context be the current one. Returns the one before. A thread may have none yet. */
static void *enter(Arena *self)
{
    void *was = NULL;
    cuda.get_context(&was);
    if (was != self->context)
        cuda.set_context(self->context);
    return was;
}

static void leave(Arena *self, void *was)
{
    if (was != self->context)
        cuda.set_context(was);
}

static void *driver_record(void *context, intptr_t stream)
{
    Arena *self = context;
    void *event = NULL, *was = enter(self);
    int mode = relax();
    if (is_captured(stream))
        ;
    else if (self->n_events)
        event = self->events[--self->n_events];
    else if (cuda.event_create(&event, NO_TIMING))
        event = NULL;
    if (event && cuda.event_record(event, handle_of(stream)))
        event = NULL; /* the GPU is broken, or the stream is of another one */
    restore(mode, 0);
    leave(self, was);
    return event;
}

static bool driver_is_done(void *context, void *event)
{
    (void)context;
    int mode = relax();
    return restore(mode, cuda.event_query(event));
}

static void driver_forget(void *context, void *event)
{
    Arena *self = context;
    if (self->n_events == self->events_size) {
        size_t size = self->events_size ? 2 * self->events_size : 64;
        void **grown = realloc(self->events, size * sizeof *grown);
        if (!grown)
            return;
        self->events = grown;
        self->events_size = size;
    }
    self->events[self->n_events++] = event;
}

static const struct arena_driver driver = {
    driver_create, driver_release, driver_map, driver_allow, driver_unmap, driver_record, driver_is_done, driver_forget,
};

/* Takes an arena's lock. Another thread may have it while the driver works: others may run Python meanwhile. */
static void hold(Arena *self)
{
    while (!page_arena_try_lock(self->arena)) {
        Py_BEGIN_ALLOW_THREADS
        page_arena_lock(self->arena);
        page_arena_unlock(self->arena);
        Py_END_ALLOW_THREADS
    }
}

static void let_go(Arena *self)
{
    page_arena_unlock(self->arena);
}

static intptr_t stream_of_thread(void)
{
    intptr_t stream = current_stream ? current_stream() : 0;
    if (stream != PER_THREAD)
        return stream;
    if (!own.number)
        own.number = ++threads;
    return -own.number; /* each thread has its own, under the same name */
}

/* Waits for the GPU, without the interpreter's lock; what was freed before is idle then, and the stream's; with `graphs`
   also what belongs to graphs. Nobody may wait while a graph is captured: of other threads' streams that is not known. */
static bool wait_for_all(Arena *self, intptr_t stream, bool graphs)
{
    void *was = enter(self);
    bool is_possible = !is_captured(LEGACY) && !is_captured(stream_of_thread());
    leave(self, was);
    if (!is_possible)
        return false;
    hold(self);
    uint64_t tick = page_arena_now(self->arena);
    let_go(self);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    was = enter(self);
    failed = cuda.synchronize();
    leave(self, was);
    Py_END_ALLOW_THREADS
    hold(self);
    if (!failed)
        page_arena_settle(self->arena, stream, tick, graphs);
    let_go(self);
    return !failed;
}

static size_t trim(Arena *self, size_t nbytes, intptr_t stream)
{
    hold(self);
    bool is_done = page_arena_trim(self->arena, nbytes) <= nbytes;
    let_go(self);
    if (!is_done && wait_for_all(self, stream, false)) {
        hold(self);
        page_arena_trim(self->arena, nbytes);
        let_go(self);
    }
    return page_arena_taken(self->arena);
}

/* Puts the exception that is set aside. */
static void put_aside(void)
{
    if (!own.failed)
        PyErr_Fetch(&own.type, &own.error, &own.traceback);
    else
        PyErr_Clear();
    own.failed = true;
}

/* Calls a function of Python. Returns whether it returned, and something true if `wants` is. */
static bool ask(PyObject *function, int device, size_t nbytes, bool wants)
{
    if (!function)
        return false;
    PyObject *result = PyObject_CallFunction(function, "in", device, (Py_ssize_t)nbytes);
    int is_true = result ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    if (is_true < 0)
        put_aside();
    return is_true > 0 || (is_true == 0 && !wants);
}

/* Takes memory, for which nobody is asked. Returns 0 if there is none. */
static unsigned long long take(Arena *self, size_t nbytes, intptr_t stream)
{
    struct arena_wait wait;
    uint64_t offset;
    bool captures = (stream < 0 || stream > LEGACY) && is_captured(stream);
    for (int orders = 0; orders < MOST_ORDERS;) {
        uint64_t tick;
        hold(self);
        enum arena_result result = page_arena_allocate(self->arena, nbytes, stream, captures, &offset, &wait);
        let_go(self);
        switch (result) {
        case ARENA_DONE: {
            size_t taken = page_arena_taken(self->arena);
            if (taken > self->peak_taken)
                self->peak_taken = taken;
            return self->start + offset;
        }
        case ARENA_FULL:
            self->missing = wait.missing;
            return 0;
        case ARENA_WAIT: {
            bool has_passed;
            Py_BEGIN_ALLOW_THREADS
            int mode = relax();
            has_passed = restore(mode, cuda.event_synchronize(wait.event));
            Py_END_ALLOW_THREADS
            if (!has_passed)
                return 0;
            hold(self);
            page_arena_waited(self->arena, &wait);
            let_go(self);
            break;
        }
        case ARENA_ORDER:
            orders++;
            hold(self);
            tick = page_arena_now(self->arena);
            let_go(self);
            if (ask(order, self->device, nbytes, true)) {
                hold(self);
                page_arena_adopt(self->arena, stream, tick);
                let_go(self);
            } else if (own.failed || !wait_for_all(self, stream, false)) {
                return 0;
            }
        }
    }
    return 0;
}


static void *cupys_malloc(void *unused, size_t nbytes, int device)
{
    (void)unused;
    if (device < 0 || device >= MOST_DEVICES || forked) {
        PyErr_Format(PyExc_RuntimeError, "GPU %d has no memory for this process%s", device, forked ? ", which was forked" : "");
        put_aside();
        return NULL;
    }
    if (!arenas[device] && !ask(make, device, 0, true)) {
        own.has_no_arena = !own.failed;
        return NULL;
    }
    Arena *self = arenas[device];
    intptr_t stream = stream_of_thread();
    for (;;) {
        bool is_known = own.of[device % OWN].device == device + 1 && own.of[device % OWN].epoch == allocation_epoch() &&
                        own.of[device % OWN].stream == stream;
        size_t wanted = page_arena_used(self->arena) + nbytes;
        bool is_granted = is_known && (nbytes < announced || wanted <= own.of[device % OWN].level);
        if (own.is_quiet) {
            ;
        } else if (!is_granted && before) {
            own.of[device % OWN].device = 0; /* it may be known once more, by what it sets */
            if (!ask(before, device, nbytes, false))
                return NULL;
            own.of[device % OWN].device = device + 1;
            own.of[device % OWN].stream = stream;
        } else if (is_granted && nbytes >= announced) {
            long long used = (long long)(wanted + self->outside) - self->moved;
            if (used > own.of[device % OWN].peak)
                own.of[device % OWN].peak = used;
        }
        unsigned long long address = take(self, nbytes, stream);
        if (address)
            return (void *)(uintptr_t)address;
        if (own.failed || !ask(refused, device, nbytes, true)) {
            if (!own.failed) {
                PyErr_Format(PyExc_MemoryError, "out of memory allocating %zu bytes of GPU %d", nbytes, device);
                put_aside();
            }
            return NULL;
        }
    }
}

static void cupys_free(void *unused, void *address, int device)
{
    (void)unused;
    Arena *self = device >= 0 && device < MOST_DEVICES ? arenas[device] : NULL;
    if (!self || forked)
        return;
    hold(self);
    page_arena_free(self->arena, (unsigned long long)(uintptr_t)address - self->start);
    let_go(self);
    if (self->closed && before) {
        size_t used = page_arena_used(self->arena), taken = page_arena_taken(self->arena);
        if (taken > used + self->kept + WORTH_GIVING_BACK || (taken && !used))
            self->kept = trim(self, used, 0) - used;
    }
}

/* Says why a GPU cannot have an arena, if so. */
static bool is_possible(int device, char problem[100])
{
    int value = 0;
    const char *missing = find_cuda();
    if (missing)
        snprintf(problem, 100, "the driver has no %s", missing);
    else if (device >= MOST_DEVICES || cuda.get_attribute(&value, VIRTUAL_MEMORY, device) || !value)
        snprintf(problem, 100, "GPU %d has no virtual memory management", device);
    else
        return true;
    return false;
}

/* PageArena for Python. */

static Arena *of(PyObject *self)
{
    return (Arena *)self;
}

static bool read_size(PyObject *number, size_t *result)
{
    *result = PyLong_AsSize_t(number);
    return *result != (size_t)-1 || !PyErr_Occurred();
}

static int arena_init(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"device", "nbytes", NULL};
    Py_ssize_t nbytes;
    int device, value = 0, error;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "in", names, &device, &nbytes))
        return -1;
    Arena *self = of(object);
    if (self->arena || device < 0 || device >= MOST_DEVICES || nbytes <= 0) {
        PyErr_Format(PyExc_ValueError, "device=%d or nbytes=%zd is not possible", device, nbytes);
        return -1;
    }
    char problem[100];
    if (!is_possible(device, problem)) {
        PyErr_SetString(PyExc_RuntimeError, problem);
        return -1;
    }
    self->device = device;
    self->properties = (Properties){.type = PINNED, .location = {ON_DEVICE, device}};
    if (!cuda.get_attribute(&value, DIRECT_WITH_VIRTUAL_MEMORY, device) && value)
        self->properties.direct = 1; /* network cards may read it */
    self->access[0] = (Access){{ON_DEVICE, device}, READ_WRITE};
    self->n_access = 1;
    if ((error = cuda.granularity(&self->page, &self->properties, 0)) || !self->page) {
        PyErr_Format(PyExc_RuntimeError, "cuMemGetAllocationGranularity: error %d", error);
        return -1;
    }
    self->space = ((size_t)nbytes + 8 * self->page) / self->page * self->page;
    int mode = relax();
    if (!restore(mode, error = cuda.reserve(&self->start, self->space, 0, 0, 0))) {
        PyErr_Format(PyExc_RuntimeError, "cuMemAddressReserve of %zu bytes: error %d", self->space, error);
        return -1;
    }
    cuda.get_context(&self->context);
    self->arena = page_arena_new(self->space / self->page, self->page, self->page / 2, &driver, self);
    if (!self->arena) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void arena_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (of(self)->arena)
        page_arena_delete(of(self)->arena); /* only in tests: what it has of the GPU stays taken */
    free(of(self)->events);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *arena_allocate(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"nbytes", "stream", NULL};
    Py_ssize_t nbytes, stream = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "n|n", names, &nbytes, &stream))
        return NULL;
    unsigned long long address = take(of(self), (size_t)nbytes, stream);
    if (address)
        return PyLong_FromUnsignedLongLong(address);
    if (own.failed) {
        own.failed = false;
        PyErr_Restore(own.type, own.error, own.traceback);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *arena_free(PyObject *self, PyObject *number)
{
    size_t address;
    if (!read_size(number, &address))
        return NULL;
    hold(of(self));
    bool is_block = page_arena_free(of(self)->arena, address - of(self)->start);
    let_go(of(self));
    if (!is_block)
        return PyErr_Format(PyExc_ValueError, "address=%zu is not of a block in use", address);
    Py_RETURN_NONE;
}

static int arena_contains(PyObject *self, PyObject *number)
{
    size_t address;
    return read_size(number, &address) ? address - of(self)->start < of(self)->space : -1;
}

static PyObject *arena_set_limit(PyObject *self, PyObject *number)
{
    size_t nbytes;
    if (!read_size(number, &nbytes))
        return NULL;
    hold(of(self));
    page_arena_set_limit(of(self)->arena, nbytes);
    let_go(of(self));
    Py_RETURN_NONE;
}

static PyObject *arena_trim(PyObject *self, PyObject *number)
{
    size_t nbytes;
    return read_size(number, &nbytes) ? PyLong_FromSize_t(trim(of(self), nbytes, stream_of_thread())) : NULL;
}

static PyObject *arena_forget_graphs(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (page_arena_graphs(of(self)->arena))
        wait_for_all(of(self), stream_of_thread(), true);
    Py_RETURN_NONE;
}

static PyObject *arena_close(PyObject *self, PyObject *is_closed)
{
    of(self)->closed = PyObject_IsTrue(is_closed);
    if (of(self)->closed)
        trim(of(self), 0, stream_of_thread());
    Py_RETURN_NONE;
}

static PyObject *arena_set_level(PyObject *self, PyObject *args)
{
    Py_ssize_t level, outside;
    long long moved;
    int n = of(self)->device % OWN;
    if (!PyArg_ParseTuple(args, "nnL", &level, &outside, &moved))
        return NULL;
    of(self)->outside = (size_t)outside;
    of(self)->moved = moved;
    own.of[n].level = level > outside ? (size_t)(level - outside) : 0;
    own.of[n].epoch = allocation_epoch();
    Py_RETURN_NONE;
}

static PyObject *arena_set_moved_bytes(PyObject *self, PyObject *number)
{
    long long moved = PyLong_AsLongLong(number);
    if (moved == -1 && PyErr_Occurred())
        return NULL;
    of(self)->moved = moved;
    Py_RETURN_NONE;
}

static PyObject *arena_take_peak(PyObject *self, PyObject *unused)
{
    (void)unused;
    int n = of(self)->device % OWN;
    long long peak = own.of[n].peak;
    own.of[n].peak = 0;
    return PyLong_FromLongLong(peak);
}

static PyObject *arena_check(PyObject *self, PyObject *unused)
{
    (void)unused;
    hold(of(self));
    const char *wrong = page_arena_check(of(self)->arena);
    let_go(of(self));
    if (!wrong)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_AssertionError, wrong);
    return NULL;
}

static PyObject *arena_used(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(page_arena_used(of(self)->arena));
}

static PyObject *arena_taken(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(page_arena_taken(of(self)->arena));
}

static PyObject *arena_peak(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(of(self)->peak_taken);
}

static PyObject *arena_missing(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(of(self)->missing);
}

static PyObject *arena_page(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(of(self)->page);
}

static PyObject *arena_counts(PyObject *self, void *unused)
{
    (void)unused;
    hold(of(self));
    struct arena_counts counts = page_arena_counts(of(self)->arena);
    let_go(of(self));
    const struct { const char *name; uint64_t count; } all[] = {
        {"exact", counts.exact}, {"fitted", counts.fitted}, {"mapped_anew", counts.mapped_anew}, {"maps", counts.maps},
        {"unmaps", counts.unmaps}, {"rows", counts.rows}, {"creates", counts.creates}, {"releases", counts.releases},
        {"marks", counts.marks}, {"waits", counts.waits}, {"orders", counts.orders},
    };
    PyObject *table = PyDict_New();
    for (size_t n = 0; table && n < sizeof all / sizeof *all; n++) {
        PyObject *number = PyLong_FromUnsignedLongLong(all[n].count);
        if (!number || PyDict_SetItemString(table, all[n].name, number))
            Py_CLEAR(table);
        Py_XDECREF(number);
    }
    return table;
}

static PyObject *arena_streams(PyObject *self, void *unused)
{
    (void)unused;
    intptr_t streams[64];
    hold(of(self));
    size_t n = page_arena_streams(of(self)->arena, streams, 64);
    let_go(of(self));
    if (n == 64) /* more than anybody could put in order */
        Py_RETURN_NONE;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *number = PyLong_FromSsize_t(streams[i]);
        if (!number || PyList_Append(list, number))
            Py_CLEAR(list);
        Py_XDECREF(number);
    }
    return list;
}

#define WITH_KEYWORDS(function) ((PyCFunction)(void (*)(void))function), METH_VARARGS | METH_KEYWORDS

static PyMethodDef arena_methods[] = {
    {"allocate", WITH_KEYWORDS(arena_allocate), "Return the address of `nbytes` for work on a stream; None if there are none."},
    {"free", arena_free, METH_O, "Take back the block at an address."},
    {"set_limit", arena_set_limit, METH_O, "Set the most bytes that are taken of the GPU; what is taken already stays."},
    {"trim", arena_trim, METH_O, "Give free pages back until at most so many bytes are taken; wait for the GPU. Return the bytes taken."},
    {"forget_graphs", arena_forget_graphs, METH_NOARGS,
     "Let everybody have what was freed of memory that was allocated while CUDA graphs were captured: none that was captured\n"
     "before may be launched again. Wait for the GPU if there is such memory; do nothing while a graph is captured."},
    {"close", arena_close, METH_O, "Give free pages back, and from now on what is freed, too; or, with false, no more."},
    {"set_level", arena_set_level, METH_VARARGS,
     "Grant this thread's allocations unasked while memory in use stays below `level`, until ask_again(). Tell how many\n"
     "bytes are in use outside of the arena, and by how many bytes moves have changed memory in use."},
    {"set_moved_bytes", arena_set_moved_bytes, METH_O, "Tell by how much moves have changed memory in use (bytes)."},
    {"take_peak", arena_take_peak, METH_NOARGS,
     "Return the most that memory in use would have been with no moves at allocations of this thread that were granted\n"
     "unasked since the last call (bytes); 0 if there were none."},
    {"check", arena_check, METH_NOARGS, "Raise AssertionError if an invariant does not hold. For tests."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef arena_attributes[] = {
    {"used_bytes", arena_used, NULL, "The bytes of blocks in use, each rounded up to 512, and of what is kept for CUDA graphs.", NULL},
    {"taken_bytes", arena_taken, NULL, "The bytes taken of the GPU, free pages included.", NULL},
    {"peak_bytes", arena_peak, NULL, "The most bytes that were taken of the GPU.", NULL},
    {"missing_bytes", arena_missing, NULL, "The bytes of free pages that the last refused allocation lacked.", NULL},
    {"page_bytes", arena_page, NULL, "The size of a page (bytes).", NULL},
    {"streams", arena_streams, NULL, "The streams that own free memory, None for very many; negative numbers are threads' default streams.", NULL},
    {"counts", arena_counts, NULL, "How allocations were served, and what the driver was asked for.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot arena_slots[] = {
    {Py_tp_doc, "A GPU's memory in pages that are mapped wherever they are wanted. See page_arena.c.\n\n"
                "Args: device: the GPU's number, which must be the current one; nbytes: the address space that is reserved; it\n"
                "takes no memory.\n"
                "Raises: RuntimeError: if the driver or the GPU has no virtual memory management, or no address space."},
    {Py_tp_init, arena_init},
    {Py_tp_dealloc, arena_dealloc},
    {Py_tp_methods, arena_methods},
    {Py_tp_getset, arena_attributes},
    {Py_sq_contains, arena_contains},
    {0, NULL},
};

static PyType_Spec arena_spec = {
    "chainer_ooc.swap.devices.ram._allocator.PageArena", sizeof(Arena), 0, Py_TPFLAGS_DEFAULT, arena_slots,
};

static PyTypeObject *arena_type;

static void set_reference(PyObject **variable, PyObject *value)
{
    PyObject *old = *variable;
    Py_INCREF(value);
    *variable = value;
    Py_XDECREF(old);
}

/* ArenaAllocator: what is given to cupy.cuda.set_allocator(). */

typedef struct {
    PyObject_HEAD
    PyObject *allocate, *otherwise, *free_all_blocks;
} Allocator;

static int allocator_init(PyObject *self, PyObject *args, PyObject *keywords)
{
    PyObject *allocate, *otherwise, *free_all_blocks;
    static char *names[] = {"allocate", "otherwise", "free_all_blocks", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO", names, &allocate, &otherwise, &free_all_blocks))
        return -1;
    set_reference(&((Allocator *)self)->otherwise, otherwise);
    set_reference(&((Allocator *)self)->allocate, allocate);
    set_reference(&((Allocator *)self)->free_all_blocks, free_all_blocks);
    return 0;
}

static PyObject *allocator_free_all_blocks(PyObject *self, PyObject *args, PyObject *keywords)
{
    return PyObject_Call(((Allocator *)self)->free_all_blocks, args, keywords);
}

static PyMethodDef allocator_methods[] = {
    {"free_all_blocks", WITH_KEYWORDS(allocator_free_all_blocks), "Give the current GPU's free memory back to it; wait for it."},
    {NULL, NULL, 0, NULL},
};

static void allocator_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(((Allocator *)self)->allocate);
    Py_XDECREF(((Allocator *)self)->otherwise);
    Py_XDECREF(((Allocator *)self)->free_all_blocks);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *allocator_call(PyObject *self, PyObject *args, PyObject *keywords)
{
    (void)keywords;
    PyObject *result = PyObject_Call(((Allocator *)self)->allocate, args, NULL);
    if (own.failed) {
        own.failed = false;
        Py_XDECREF(result);
        PyErr_Restore(own.type, own.error, own.traceback);
        return NULL;
    }
    if (own.has_no_arena) {
        own.has_no_arena = false;
        Py_XDECREF(result);
        return PyObject_Call(((Allocator *)self)->otherwise, args, NULL);
    }
    return result;
}

static PyType_Slot allocator_slots[] = {
    {Py_tp_doc, "Call CuPy's CFunctionAllocator.malloc, and raise what its C functions have put aside.\n\nArgs: allocate: that method; otherwise: what allocates on a GPU that has no arena; free_all_blocks: a function."},
    {Py_tp_init, allocator_init},
    {Py_tp_dealloc, allocator_dealloc},
    {Py_tp_methods, allocator_methods},
    {Py_tp_call, allocator_call},
    {0, NULL},
};

static PyType_Spec allocator_spec = {
    "chainer_ooc.swap.devices.ram._allocator.ArenaAllocator", sizeof(Allocator), 0, Py_TPFLAGS_DEFAULT, allocator_slots,
};

/* The module's functions. */

static PyObject *configure_arenas(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"make", "before", "refused", "order", "announced", "stream", NULL};
    PyObject *functions[4], *stream;
    Py_ssize_t from;
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOnO", names, &functions[0], &functions[1], &functions[2],
                                     &functions[3], &from, &stream))
        return NULL;
    const char *name = PyCapsule_GetName(stream);
    void *function = name ? PyCapsule_GetPointer(stream, name) : NULL;
    if (!function)
        return NULL;
    memcpy(&current_stream, &function, sizeof function);
    set_reference(&make, functions[0]);
    set_reference(&before, functions[1]);
    set_reference(&refused, functions[2]);
    set_reference(&order, functions[3]);
    announced = (size_t)from;
    return Py_BuildValue("KK", (unsigned long long)(uintptr_t)cupys_malloc, (unsigned long long)(uintptr_t)cupys_free);
}

static PyObject *set_arena(PyObject *self, PyObject *object)
{
    (void)self;
    if (!PyObject_TypeCheck(object, arena_type) || arenas[of(object)->device]) {
        PyErr_SetString(PyExc_ValueError, "it is no PageArena, or its GPU has one");
        return NULL;
    }
    Py_INCREF(object); /* for ever: its blocks are */
    arenas[of(object)->device] = of(object);
    Py_RETURN_NONE;
}

static PyObject *why_no_arena(PyObject *self, PyObject *number)
{
    (void)self;
    char problem[100];
    long device = PyLong_AsLong(number);
    if (device == -1 && PyErr_Occurred())
        return NULL;
    if (is_possible((int)device, problem))
        Py_RETURN_NONE;
    return PyUnicode_FromString(problem);
}

static PyObject *in_arena(PyObject *self, PyObject *number)
{
    (void)self;
    size_t address;
    if (!read_size(number, &address))
        return NULL;
    for (int device = 0; device < MOST_DEVICES; device++)
        if (arenas[device] && address - arenas[device]->start < arenas[device]->space)
            Py_RETURN_TRUE;
    Py_RETURN_FALSE;
}

static PyObject *all_arenas(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *table = PyDict_New();
    for (int device = 0; table && device < MOST_DEVICES; device++) {
        PyObject *number = arenas[device] ? PyLong_FromLong(device) : NULL;
        if (number && PyDict_SetItem(table, number, (PyObject *)arenas[device]))
            Py_CLEAR(table);
        Py_XDECREF(number);
    }
    return table;
}

static PyObject *be_quiet(PyObject *self, PyObject *is_quiet)
{
    (void)self;
    own.is_quiet = PyObject_IsTrue(is_quiet);
    Py_RETURN_NONE;
}

static PyObject *set_driver(PyObject *self, PyObject *table)
{
    (void)self;
    has_driver = table != Py_None;
    for (size_t n = 0; has_driver && n < sizeof cuda_functions / sizeof *cuda_functions; n++) {
        PyObject *number = PyDict_GetItemString(table, cuda_functions[n].name);
        void *function = number ? PyLong_AsVoidPtr(number) : NULL;
        if (!function)
            return PyErr_Format(PyExc_ValueError, "there must be an address of %s", cuda_functions[n].name);
        memcpy(cuda_functions[n].function, &function, sizeof function);
    }
    memset(arenas, 0, sizeof arenas);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"configure_arenas", WITH_KEYWORDS(configure_arenas),
     "Return the addresses of malloc and free for CuPy's CFunctionAllocator.\n\n"
     "They call, with a GPU's number and a size (bytes): `make` before the GPU's first allocation, which calls set_arena() or\n"
     "returns something false;\n"
     "`before` an allocation of `announced` bytes and more that is beyond the thread's level, or the first one on another\n"
     "stream or after ask_again(); `refused` when there is no memory, to be told whether there is now; `order` to be told\n"
     "whether the current stream's later work comes after all earlier work of the others. `stream` is the capsule of the\n"
     "C function that returns the current stream."},
    {"set_driver", set_driver, METH_O,
     "Call these functions, by the names of the driver's, and forget all arenas; with None the driver's again. For tests."},
    {"why_no_arena", why_no_arena, METH_O, "Return why a GPU cannot have an arena, or None."},
    {"in_arena", in_arena, METH_O, "Return whether an address lies in an arena."},
    {"arenas", all_arenas, METH_NOARGS, "Return the arenas by their GPUs' numbers."},
    {"be_quiet", be_quiet, METH_O, "Ask nobody before this thread's allocations in arenas, and do not count them for the peak; or do."},
    {"set_arena", set_arena, METH_O, "Let a GPU's allocations be served by an arena, for ever."},
    {NULL, NULL, 0, NULL},
};

void end_arenas(void)
{
    Py_CLEAR(before);
    Py_CLEAR(refused);
    Py_CLEAR(order);
    Py_CLEAR(make);
}

static void before_fork(void)
{
    for (int device = 0; device < MOST_DEVICES; device++)
        if (arenas[device])
            page_arena_lock(arenas[device]->arena);
}

static void after_fork(void)
{
    for (int device = 0; device < MOST_DEVICES; device++)
        if (arenas[device])
            page_arena_unlock(arenas[device]->arena);
}

static void after_fork_in_child(void)
{
    for (int device = 0; device < MOST_DEVICES; device++)
        forked |= !!arenas[device]; /* else the child may be the first to use a GPU */
    after_fork();
}

int add_page_arena(PyObject *module)
{
    pthread_atfork(before_fork, after_fork, after_fork_in_child);
    arena_type = (PyTypeObject *)PyType_FromSpec(&arena_spec);
    PyObject *allocator_type = PyType_FromSpec(&allocator_spec);
    int failed = !arena_type || !allocator_type || PyModule_AddObjectRef(module, "PageArena", (PyObject *)arena_type) ||
                 PyModule_AddObjectRef(module, "ArenaAllocator", allocator_type) || PyModule_AddFunctions(module, functions);
    Py_XDECREF(allocator_type);
    return failed ? -1 : 0;
}
