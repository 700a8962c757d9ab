/* NumPy's memory handler (NEP 49) of out-of-core mode: large allocations are announced, and lie in a PagePool.

   An allocation is granted here, in C, as long as memory in use and the allocation stay below a level that the engine
   has set for the thread. Beyond it, `before(nbytes)` of Python makes room, or raises. What keeps a program as it is
   without us:

   1. Freeing never runs Python. NumPy frees while an exception is on its way.
   2. An exception that is pending while NumPy allocates is put aside while Python runs, and is pending again after it.
   3. What `before` raises arrives where the program computes, as itself. NumPy 2 gets NULL, with the exception set;
      most of its functions then raise a MemoryError of their own, an _ArrayMemoryError, in whose __new__ we raise the
      error that was stored for the thread. NumPy crashes on NULL in sort, argsort and partition, NumPy 2 for objects
      and strings: there (see sorting.c), for all of NumPy 1, for realloc, and where another exception is pending, the
      allocation is granted, and the error raised in this thread between two bytecodes.
   4. A stored error that nobody has taken is forgotten with the thread's next allocation, and where NumPy has left
      the exception as it was set, so that it has arrived already.
   5. Signals wait until `before` has returned: see engine_lock.c.
   6. Nothing here is ever freed: arrays may outlive the mode, the module and the interpreter. */

#include "allocator.h"
#include "page_pool.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

typedef struct { /* PyDataMemAllocator of numpy/ndarraytypes.h */
    void *context;
    void *(*malloc)(void *context, size_t nbytes);
    void *(*calloc)(void *context, size_t count, size_t size);
    void *(*realloc)(void *context, void *old, size_t nbytes);
    void (*free)(void *context, void *address, size_t nbytes);
} Allocator;

typedef struct { /* PyDataMem_Handler */
    char name[127];
    uint8_t version;
    Allocator allocator;
} Handler;

/* Indexes into NumPy's table of C functions (numpy/__multiarray_api.h; since 1.22). */
enum { SET_HANDLER = 304, GET_HANDLER = 305 };

static PyObject *(*set_handler)(PyObject *capsule);
static PyObject *(*get_handler)(void);
static PyObject *numpys_capsule, *our_capsule;
static Allocator numpys;

static PyObject *before;        /* called with the lock of the interpreter; NULL once it ends */
static size_t announced = SIZE_MAX, pooled = SIZE_MAX; /* bytes from which on an allocation is announced, and in the pool */
static struct page_pool *pool;  /* NULL: large arrays are NumPy's, too */
static bool may_fail;           /* NumPy can take NULL */
static atomic_bool ends;        /* the interpreter ends: nobody is asked any more */
static _Atomic unsigned epoch;  /* levels of earlier ones are void */
static _Atomic long long moved; /* bytes that moves have added to memory in use */

static _Thread_local struct {
    unsigned epoch;
    size_t level;   /* bytes up to which this thread's allocations are granted */
    long long peak; /* the most that memory in use would have been without moves, since it was taken last */
    bool asks;      /* `before` runs */
    bool has_stored;
    bool installed; /* between install() and uninstall() */
    PyObject *stored_traceback; /* that of the stored error when it was stored; for comparison alone */
} own;

unsigned allocation_epoch(void)
{
    return epoch;
}

bool thread_asks(void)
{
    return own.installed;
}

/* Errors. */

#define STORED "chainer_ooc.stored_error"     /* in a thread's dict: what NumPy's MemoryError is replaced by */
#define DEFERRED "chainer_ooc.deferred_error" /* what is raised between two bytecodes */
static PyObject *deferred_type, *stock_new;

/* Puts an error into the thread's dict. */
static void store(const char *name, PyObject *error)
{
    PyObject *of_thread = PyThreadState_GetDict();
    if (of_thread)
        PyDict_SetItemString(of_thread, name, error);
}

/* Takes an error out of the thread's dict. NULL, with no exception set, if there is none. */
static PyObject *take(const char *name)
{
    PyObject *of_thread = PyThreadState_GetDict();
    PyObject *error = of_thread ? PyDict_GetItemString(of_thread, name) : NULL;
    if (error) {
        Py_INCREF(error);
        PyDict_DelItemString(of_thread, name);
    }
    return error;
}

/* Returns a borrowed reference, or NULL. The error has another one once it has passed a frame of Python. */
static PyObject *traceback_of(PyObject *error)
{
    PyObject *traceback = PyException_GetTraceback(error);
    Py_XDECREF(traceback);
    return traceback;
}

static void raise(PyObject *error)
{
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
}

/* Has an error raised in this thread between two of its bytecodes. `before` is made of such: one that waits comes first. */
void raise_later(PyObject *error)
{
    store(DEFERRED, error);
    PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), deferred_type);
    PyErr_Clear();
}

int raise_deferred(void)
{
    PyObject *error = take(DEFERRED);
    if (!error)
        return 0;
    PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), NULL);
    raise(error);
    return -1;
}

/* Has an error take the place of one that Python is about to make: what __new__ returns for it. Python 3.11 goes by the
   class that it was about to raise; later ones by that of what they get, and add a note to what is raised instead. */
static PyObject *instead(PyObject *error)
{
    if (Py_Version >= 0x030c0000)
        return error;
    raise(error);
    return NULL;
}

/* __new__ of the class of deferred errors. */
static PyObject *new_deferred(PyObject *self, PyObject *args)
{
    (void)self, (void)args;
    PyObject *error = take(DEFERRED);
    if (error)
        return instead(error);
    PyErr_SetString(PyExc_MemoryError, "an allocation has failed");
    return NULL;
}

/* __new__ of NumPy's _ArrayMemoryError: the thread's stored error if there is one. */
static PyObject *new_array_memory_error(PyObject *self, PyObject *args, PyObject *keywords)
{
    (void)self;
    if (own.has_stored) {
        own.has_stored = false;
        PyObject *error = take(STORED);
        if (error && traceback_of(error) == own.stored_traceback)
            return instead(error);
        Py_XDECREF(error); /* it has passed a frame of Python, as itself: this is another failure */
    }
    return PyObject_Call(stock_new, args, keywords);
}

/* Forgets an error that nobody has taken. */
static void forget_stored(void)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (!type) { /* one that is pending may be NumPy's MemoryError, which Python 3.11 makes when it is caught */
        own.has_stored = false;
        Py_XDECREF(take(STORED));
    }
    PyErr_Restore(type, value, traceback);
    PyGILState_Release(state);
}

/* Allocations. */

/* Returns whether an allocation can be granted here, and takes note of it for the peak if so. */
static bool is_granted(size_t nbytes)
{
    if (own.epoch != epoch || !pool)
        return false;
    size_t wanted = page_pool_used(pool) + nbytes;
    if (wanted > own.level)
        return false;
    if ((long long)wanted - moved > own.peak)
        own.peak = (long long)wanted - moved;
    return true;
}

/* Asks Python for room. Returns whether the allocation may be made; if not, the error is set and stored. */
static bool ask(size_t nbytes, bool can_fail)
{
    bool granted = true;
    PyGILState_STATE state = PyGILState_Ensure();
    if (!own.asks && before) {
        own.asks = true;
        hold_signals();
        PyObject *asked = before, *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        Py_INCREF(asked);
        PyObject *done = PyObject_CallFunction(asked, "n", (Py_ssize_t)nbytes);
        Py_DECREF(asked);
        if (!done) {
            PyObject *error_type, *error, *error_traceback;
            PyErr_Fetch(&error_type, &error, &error_traceback);
            PyErr_NormalizeException(&error_type, &error, &error_traceback);
            if (error_traceback)
                PyException_SetTraceback(error, error_traceback);
            if (type || !can_fail || is_sorting()) {
                raise_later(error);
            } else {
                granted = false;
                own.has_stored = true;
                own.stored_traceback = traceback_of(error);
                store(STORED, error);
            }
            if (granted)
                Py_XDECREF(error_type), Py_XDECREF(error), Py_XDECREF(error_traceback);
            else
                type = error_type, value = error, traceback = error_traceback;
        }
        Py_XDECREF(done);
        PyErr_Restore(type, value, traceback);
        let_signals(0);
        own.asks = false;
    }
    PyGILState_Release(state);
    return granted;
}

static bool is_announced(size_t nbytes)
{
    return nbytes >= announced && !ends;
}

static void *allocate(size_t nbytes, bool clear, size_t count, size_t size)
{
    if (own.has_stored)
        forget_stored();
    if (is_announced(nbytes) && !is_granted(nbytes) && !ask(nbytes, may_fail))
        return NULL;
    void *address = pool && nbytes >= pooled ? page_pool_allocate(pool, nbytes, clear) : NULL;
    if (address)
        return address;
    return clear ? numpys.calloc(numpys.context, count, size) : numpys.malloc(numpys.context, nbytes);
}

static void *our_malloc(void *context, size_t nbytes)
{
    (void)context;
    return allocate(nbytes, false, 1, nbytes);
}

static void *our_calloc(void *context, size_t count, size_t size)
{
    (void)context;
    size_t nbytes;
    return __builtin_mul_overflow(count, size, &nbytes) ? NULL : allocate(nbytes, true, count, size);
}

static void our_free(void *context, void *address, size_t nbytes)
{
    (void)context;
    if (address && pool && page_pool_contains(pool, address))
        page_pool_free(pool, address);
    else
        numpys.free(numpys.context, address, nbytes);
}

static void *our_realloc(void *context, void *old, size_t nbytes)
{
    if (is_announced(nbytes) && !is_granted(nbytes))
        ask(nbytes, false);
    if (!old || !pool || !page_pool_contains(pool, old))
        return numpys.realloc(numpys.context, old, nbytes);
    size_t have = page_pool_size_of(pool, old);
    void *address = nbytes >= pooled ? page_pool_allocate(pool, nbytes, false) : NULL;
    if (!address)
        address = numpys.malloc(numpys.context, nbytes);
    if (address) {
        memcpy(address, old, have < nbytes ? have : nbytes);
        our_free(context, old, have);
    }
    return address;
}

static Handler handler = {"chainer_ooc", 1, {NULL, our_malloc, our_calloc, our_realloc, our_free}};

/* PagePool for Python: the tests', and the one that NumPy's arrays lie in. */

typedef struct {
    PyObject_HEAD
    struct page_pool *pool;
} PagePool;

static struct page_pool *of(PyObject *self)
{
    return ((PagePool *)self)->pool;
}

/* Reads a size that may not be negative. Returns false with an exception set if it is none. */
static bool read_size(PyObject *number, size_t *result)
{
    *result = PyLong_AsSize_t(number);
    return *result != (size_t)-1 || !PyErr_Occurred();
}

static bool read_block(PyObject *self, PyObject *number, void **address)
{
    size_t value;
    if (!read_size(number, &value))
        return false;
    *address = (void *)value;
    if (page_pool_contains(of(self), *address))
        return true;
    PyErr_Format(PyExc_ValueError, "address=%zu is not in this pool", value);
    return false;
}

static int pool_init(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"nbytes", "worth_moving", "most_boundaries", "failing_move", NULL};
    Py_ssize_t nbytes, worth_moving = -1, most_boundaries = -1, failing_move = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "n|nnn", names, &nbytes, &worth_moving, &most_boundaries, &failing_move))
        return -1;
    ((PagePool *)self)->pool = nbytes < 0 ? NULL : page_pool_new((size_t)nbytes);
    if (!of(self)) {
        PyErr_Format(PyExc_MemoryError, "%zd bytes of address space cannot be mapped, or it is limited", nbytes);
        return -1;
    }
    if (worth_moving >= 0)
        page_pool_tune(of(self), (size_t)worth_moving, (size_t)most_boundaries, (size_t)failing_move);
    return 0;
}

static void pool_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (of(self) && of(self) != pool)
        page_pool_delete(of(self));
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *pool_allocate(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"nbytes", "clear", NULL};
    Py_ssize_t nbytes;
    int clear = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "n|p", names, &nbytes, &clear))
        return NULL;
    void *address;
    Py_BEGIN_ALLOW_THREADS
    address = page_pool_allocate(of(self), (size_t)nbytes, clear);
    Py_END_ALLOW_THREADS
    if (!address)
        Py_RETURN_NONE;
    return PyLong_FromVoidPtr(address);
}

static PyObject *pool_free(PyObject *self, PyObject *number)
{
    void *address;
    if (!read_block(self, number, &address))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    page_pool_free(of(self), address);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *pool_size_of(PyObject *self, PyObject *number)
{
    void *address;
    return read_block(self, number, &address) ? PyLong_FromSize_t(page_pool_size_of(of(self), address)) : NULL;
}

static PyObject *pool_untouched(PyObject *self, PyObject *number)
{
    void *address;
    return read_block(self, number, &address) ? PyLong_FromSize_t(page_pool_untouched(of(self), address)) : NULL;
}

static int pool_contains(PyObject *self, PyObject *number)
{
    size_t address;
    return read_size(number, &address) ? page_pool_contains(of(self), (void *)address) : -1;
}

static PyObject *pool_decommit(PyObject *self, PyObject *number)
{
    size_t nbytes;
    return read_size(number, &nbytes) ? PyLong_FromSize_t(page_pool_decommit(of(self), nbytes)) : NULL;
}

static PyObject *pool_set_cached_limit(PyObject *self, PyObject *number)
{
    size_t nbytes;
    if (!read_size(number, &nbytes))
        return NULL;
    page_pool_set_cached_limit(of(self), nbytes);
    Py_RETURN_NONE;
}

static PyObject *pool_set_arriving_bytes(PyObject *self, PyObject *number)
{
    size_t nbytes;
    if (!read_size(number, &nbytes))
        return NULL;
    page_pool_set_arriving(of(self), nbytes);
    Py_RETURN_NONE;
}

static PyObject *pool_used_bytes(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromSize_t(page_pool_used(of(self)));
}

static PyObject *pool_cached_bytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(page_pool_cached(of(self)));
}

static PyObject *pool_counts(PyObject *self, void *unused)
{
    (void)unused;
    struct page_pool_counts counts = page_pool_counts(of(self));
    return Py_BuildValue("{s:n,s:n,s:n,s:n}", "moves", (Py_ssize_t)counts.moves, "maps", (Py_ssize_t)counts.maps,
                         "looks", (Py_ssize_t)counts.looks, "boundaries", (Py_ssize_t)counts.boundaries);
}

#define WITH_KEYWORDS(function) ((PyCFunction)(void (*)(void))function), METH_VARARGS | METH_KEYWORDS

static PyMethodDef pool_methods[] = {
    {"allocate", WITH_KEYWORDS(pool_allocate), "Return the address of `nbytes`, zero if `clear`; None if there is none."},
    {"free", pool_free, METH_O, "Take back the block at an address."},
    {"size_of", pool_size_of, METH_O, "Return the size of a block in use (bytes): in whole pages, with a gap."},
    {"untouched_bytes", pool_untouched, METH_O, "Return how much of a block had no pages when it was handed out (bytes)."},
    {"decommit", pool_decommit, METH_O, "Give at least so many cached bytes back to the system, or all. Return how many."},
    {"set_cached_limit", pool_set_cached_limit, METH_O,
     "Cap resident memory plus cached pages (bytes), also as memory grows unannounced; 0 disables caching."},
    {"set_arriving_bytes", pool_set_arriving_bytes, METH_O,
     "Count so many bytes as used that copies in under way are about to touch."},
    {"used_bytes", pool_used_bytes, METH_NOARGS,
     "Return resident memory and arriving bytes less cached pages (bytes); trim the cache."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef pool_attributes[] = {
    {"cached_bytes", pool_cached_bytes, NULL, "The bytes of cached pages: resident, and in no block in use.", NULL},
    {"counts", pool_counts, NULL, "How often the kernel was asked for what.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot pool_slots[] = {
    {Py_tp_doc, "Memory for large arrays whose pages are used again. See page_pool.c.\n\n"
                "Args: nbytes: the address space that is reserved; it takes no memory. The others are for tests.\n"
                "Raises: MemoryError: if there is no address space, as under a limit of it (RLIMIT_AS)."},
    {Py_tp_init, pool_init},
    {Py_tp_dealloc, pool_dealloc},
    {Py_tp_methods, pool_methods},
    {Py_tp_getset, pool_attributes},
    {Py_sq_contains, pool_contains},
    {0, NULL},
};

static PyType_Spec pool_spec = {
    "chainer_ooc.swap.devices.ram._allocator.PagePool", sizeof(PagePool), 0, Py_TPFLAGS_DEFAULT, pool_slots,
};

/* The module. */

static PyTypeObject *pool_type;

static PyObject *configure(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"before", "announced", "pool", "pooled", NULL};
    PyObject *function, *of_arrays;
    Py_ssize_t from, pooled_from;
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OnOn", names, &function, &from, &of_arrays, &pooled_from))
        return NULL;
    if (pool && (!PyObject_TypeCheck(of_arrays, pool_type) || of(of_arrays) != pool)) {
        PyErr_SetString(PyExc_ValueError, "pool is another one than before: arrays may lie in that");
        return NULL;
    }
    if (of_arrays != Py_None && !PyObject_TypeCheck(of_arrays, pool_type)) {
        PyErr_SetString(PyExc_TypeError, "pool must be a PagePool or None");
        return NULL;
    }
    PyObject *old = before;
    Py_INCREF(function);
    before = function;
    Py_XDECREF(old);
    announced = function == Py_None ? SIZE_MAX : (size_t)from;
    pooled = (size_t)pooled_from;
    if (of_arrays != Py_None && !pool) {
        Py_INCREF(of_arrays); /* for ever: its blocks are */
        pool = of(of_arrays);
    }
    epoch++;
    Py_RETURN_NONE;
}

static PyObject *install(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *old = set_handler(our_capsule);
    if (!old)
        return NULL;
    own.installed = true;
    Py_DECREF(old);
    Py_RETURN_NONE;
}

static PyObject *uninstall(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *now = get_handler();
    if (!now)
        return NULL;
    own.installed = false;
    Py_DECREF(now);
    PyObject *old = now == our_capsule ? set_handler(numpys_capsule) : NULL;
    Py_XDECREF(old);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *set_level(PyObject *self, PyObject *number)
{
    (void)self;
    if (!read_size(number, &own.level))
        return NULL;
    own.epoch = epoch;
    Py_RETURN_NONE;
}

static PyObject *ask_again(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    epoch++;
    Py_RETURN_NONE;
}

static PyObject *take_peak(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    long long peak = own.peak;
    own.peak = 0;
    return PyLong_FromLongLong(peak);
}

static PyObject *set_moved_bytes(PyObject *self, PyObject *number)
{
    (void)self;
    long long value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred())
        return NULL;
    moved = value;
    Py_RETURN_NONE;
}

static PyObject *resident(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyLong_FromSize_t(resident_bytes());
}

static PyObject *end(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    ends = true;
    Py_CLEAR(before); /* all that it knows would live until the very end */
    end_arenas();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"configure", WITH_KEYWORDS(configure),
     "Call `before(nbytes)` before allocations of `announced` bytes and more that are beyond the thread's level, None for\n"
     "no call; take those of `pooled` bytes and more from `pool`, which is the same for ever once it is one."},
    {"install", install, METH_NOARGS, "Take over the allocations of NumPy arrays in the calling context."},
    {"uninstall", uninstall, METH_NOARGS, "Let them go to NumPy's own handler again."},
    {"set_level", set_level, METH_O,
     "Grant this thread's allocations unasked while memory in use stays below so many bytes, until ask_again()."},
    {"ask_again", ask_again, METH_NOARGS, "Void the levels of all threads."},
    {"take_peak", take_peak, METH_NOARGS,
     "Return the most that memory in use would have been with no moves at those allocations of this thread that were\n"
     "granted unasked since the last call (bytes); 0 if there were none."},
    {"set_moved_bytes", set_moved_bytes, METH_O, "Tell by how much moves have changed memory in use (bytes)."},
    {"resident_bytes", resident, METH_NOARGS, "Return this process's resident memory (bytes)."},
    {"end", end, METH_NOARGS, "Ask nobody any more: the interpreter ends."},
    {NULL, NULL, 0, NULL},
};

/* Has NumPy's own MemoryError raise ours where there is one. */
static bool follow_memory_errors(void)
{
    static PyMethodDef of_arrays = {"__new__", WITH_KEYWORDS(new_array_memory_error), NULL};
    static PyMethodDef of_deferred = {"__new__", new_deferred, METH_VARARGS, NULL};
    stock_new = PyObject_GetAttrString(PyExc_MemoryError, "__new__");
    PyObject *new_error = PyCFunction_New(&of_deferred, NULL);
    deferred_type = new_error ? PyObject_CallFunction((PyObject *)&PyType_Type, "s(O){sO}", "DeferredError",
                                                      PyExc_BaseException, "__new__", new_error) : NULL;
    Py_XDECREF(new_error);
    if (!stock_new || !deferred_type)
        return false;
    PyObject *exceptions = PyImport_ImportModule("numpy._core._exceptions");
    if (!exceptions) { /* NumPy 1 */
        PyErr_Clear();
        return true;
    }
    PyObject *error = PyObject_GetAttrString(exceptions, "_ArrayMemoryError");
    PyObject *made = error ? PyCFunction_New(&of_arrays, NULL) : NULL;
    may_fail = made && !PyObject_SetAttrString(error, "__new__", made);
    Py_XDECREF(made);
    Py_XDECREF(error);
    Py_DECREF(exceptions);
    PyErr_Clear();
    return true;
}

static bool reach_numpy(void)
{
    PyObject *numpy = PyImport_ImportModule("numpy._core.multiarray");
    if (!numpy) { /* NumPy 1 */
        PyErr_Clear();
        numpy = PyImport_ImportModule("numpy.core.multiarray");
    }
    PyObject *api = numpy ? PyObject_GetAttrString(numpy, "_ARRAY_API") : NULL;
    void **table = api ? PyCapsule_GetPointer(api, NULL) : NULL;
    Py_XDECREF(numpy); /* the table stays: modules of C are never unloaded */
    if (!table)
        return false;
    *(void **)&set_handler = table[SET_HANDLER];
    *(void **)&get_handler = table[GET_HANDLER];
    find_sorts(table);
    numpys_capsule = get_handler();
    Handler *found = numpys_capsule ? PyCapsule_GetPointer(numpys_capsule, "mem_handler") : NULL;
    if (!found)
        return false;
    numpys = found->allocator;
    our_capsule = PyCapsule_New(&handler, "mem_handler", NULL);
    return our_capsule;
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_allocator",
    "NumPy's memory handler of out-of-core mode, its pool of pages, and the engine's lock.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__allocator(void)
{
    if (!reach_numpy() || !follow_memory_errors())
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    pool_type = module ? (PyTypeObject *)PyType_FromSpec(&pool_spec) : NULL;
    if (!pool_type || PyModule_AddObjectRef(module, "PagePool", (PyObject *)pool_type) || add_engine_lock(module) ||
        add_fast_property(module) || add_margin(module) || add_page_arena(module)) {
        Py_XDECREF(module);
        return NULL;
    }
    return module;
}
