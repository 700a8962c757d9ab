/* EngineLock: the recursive lock of an engine whose work no signal handler interrupts half-way.

   Python runs the handler of a signal (Ctrl-C, say) in the main thread between two bytecodes, wherever that may be,
   and what the handler raises aborts whatever runs there. A storage whose state has changed and whose bytes have not
   would be lost. So while the main thread has this lock, signals that Python would handle are only noted; when it
   lets go of the lock they are delivered, and the handler runs where the program computes, as it would have.

   For that our function is put in front of Python's own at the level of C (sigaction). Nothing that Python shows
   changes: signal.getsignal() is the program's handler. What signal.signal() sets later is followed before it returns:
   it calls _signal.signal, in whose place a function of ours is, as in that of _thread.interrupt_main, which notes a
   signal that the system never sees. What libraries of C put back is found when the lock is taken: the process's
   actions are looked at then, at most ten times a second, since that takes 64 calls of the kernel. */

#include "allocator.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>

#define LOOK_PERIOD 100000000 /* nanoseconds */

typedef void (*handler)(int);

static pthread_t main_thread;
static _Thread_local sig_atomic_t depth;    /* how often this thread has asked that signals wait */
static sig_atomic_t *volatile depth_of_main; /* that of the main thread; NULL: it never has */
static sig_atomic_t noted[NSIG], any_noted;
static handler pythons; /* function of C that notes a signal for Python; NULL: not known yet */

/* Takes a note back. Returns whether there was one: whoever takes it delivers the signal. */
static bool take_note(int number)
{
    return __atomic_exchange_n(&noted[number], 0, __ATOMIC_SEQ_CST);
}

static bool main_has_lock(void)
{
    return depth_of_main && __atomic_load_n(depth_of_main, __ATOMIC_SEQ_CST);
}

/* Notes a signal if the main thread has the lock. Returns whether that will deliver it. The signal may come in another
   thread: if the main one has let go of the lock meanwhile, it need not have seen the note. */
static bool note(int number)
{
    if (!main_has_lock())
        return false;
    __atomic_store_n(&noted[number], 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&any_noted, 1, __ATOMIC_SEQ_CST);
    return main_has_lock() || !take_note(number);
}

static void note_signal(int number)
{
    if (!note(number))
        pythons(number);
}

static void follow_handler(int number)
{
    struct sigaction action;
    if (!sigaction(number, NULL, &action) && action.sa_handler == pythons) {
        action.sa_handler = note_signal;
        sigaction(number, &action, NULL);
    }
}

static void follow_handlers(void)
{
    static struct timespec last;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!pythons || (last.tv_sec && (now.tv_sec - last.tv_sec) * 1000000000 + now.tv_nsec - last.tv_nsec < LOOK_PERIOD))
        return;
    last = now;
    for (int number = 1; number < NSIG; number++)
        follow_handler(number);
}

static PyObject *stock_signal, *stock_interrupt_main;

/* Takes the place of _signal.signal(number, handler). */
static PyObject *set_handler(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *before = PyObject_Call(stock_signal, args, NULL);
    if (before) {
        int number = (int)PyLong_AsLong(PyTuple_GetItem(args, 0));
        struct sigaction action;
        if (!pythons && !sigaction(number, NULL, &action) && action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN)
            pythons = action.sa_handler;
        follow_handler(number);
    }
    return before;
}

/* Takes the place of _thread.interrupt_main(number=SIGINT). */
static PyObject *interrupt_main(PyObject *self, PyObject *args)
{
    int number = SIGINT;
    (void)self;
    if (PyArg_ParseTuple(args, "|i", &number) && number > 0 && number < NSIG && note(number))
        Py_RETURN_NONE;
    PyErr_Clear();
    return PyObject_Call(stock_interrupt_main, args, NULL);
}

/* Has a function of a module go by way of ours. Returns it, NULL with an exception set if there is none. */
static PyObject *replace(const char *module_name, PyMethodDef *ours)
{
    PyObject *module = PyImport_ImportModule(module_name);
    PyObject *stock = module ? PyObject_GetAttrString(module, ours->ml_name) : NULL;
    PyObject *name = stock ? PyUnicode_FromString(module_name) : NULL;
    PyObject *function = name ? PyCFunction_NewEx(ours, module, name) : NULL;
    if (!function || PyObject_SetAttrString(module, ours->ml_name, function))
        Py_CLEAR(stock);
    Py_XDECREF(function);
    Py_XDECREF(name);
    Py_XDECREF(module);
    return stock;
}

/* Finds out which function Python has for signals that it handles: that of a signal for which it has just been set.
   In the main thread. Returns -1 with an exception set if a handler has raised one meanwhile. */
static int find_pythons(void)
{
    PyObject *signals = PyImport_ImportModule("signal");
    PyObject *before = signals ? PyObject_CallMethod(signals, "getsignal", "i", SIGRTMAX) : NULL;
    PyObject *any = before ? PyObject_GetAttrString(signals, "default_int_handler") : NULL;
    if (any && before != Py_None) {
        PyObject *set = PyObject_CallMethod(signals, "signal", "iO", SIGRTMAX, any); /* see set_handler() */
        PyObject *reset = set ? PyObject_CallMethod(signals, "signal", "iO", SIGRTMAX, before) : NULL;
        Py_XDECREF(reset);
        Py_XDECREF(set);
    }
    Py_XDECREF(any);
    Py_XDECREF(before);
    Py_XDECREF(signals);
    return PyErr_Occurred() ? -1 : 0;
}

void hold_signals(void)
{
    if (!depth && pthread_equal(pthread_self(), main_thread)) {
        depth_of_main = &depth;
        follow_handlers();
    }
    __atomic_store_n(&depth, depth + 1, __ATOMIC_SEQ_CST);
}

int let_signals(int now)
{
    int failed = 0;
    __atomic_store_n(&depth, depth - 1, __ATOMIC_SEQ_CST);
    if (depth || !pthread_equal(pthread_self(), main_thread) || !__atomic_exchange_n(&any_noted, 0, __ATOMIC_SEQ_CST))
        return 0;
    for (int number = 1; number < NSIG; number++)
        if (take_note(number)) {
            PyErr_SetInterruptEx(number); /* as Python's own function does, which interrupt_main() needs not know */
            /* One at a time: a handler that raises would leave those behind it to be forgotten until the next signal. */
            if (now && !failed)
                failed = PyErr_CheckSignals();
        }
    return failed;
}

static void after_fork_in_child(void)
{
    main_thread = pthread_self(); /* as it is for Python */
    depth_of_main = &depth;
}

typedef struct {
    PyObject_HEAD
    pthread_mutex_t mutex;
    pthread_t owner;
    unsigned count; /* how often its owner has taken it; 0: nobody has it */
} EngineLock;

static bool is_owned(EngineLock *self)
{
    return __atomic_load_n(&self->count, __ATOMIC_RELAXED) && pthread_equal(self->owner, pthread_self());
}

/* Takes the lock within so many seconds; negative: whenever it is free. Returns 0 if it was not, -1 with an exception set. */
static int acquire(EngineLock *self, double seconds)
{
    if (!pythons && pthread_equal(pthread_self(), main_thread) && find_pythons() < 0)
        return -1;
    if (!is_owned(self)) {
        if (pthread_mutex_trylock(&self->mutex)) {
            int failed;
            struct timespec until;
            clock_gettime(CLOCK_REALTIME, &until);
            double end = (double)until.tv_nsec / 1e9 + seconds;
            until.tv_sec += (time_t)end;
            until.tv_nsec = (long)((end - (double)(time_t)end) * 1e9);
            Py_BEGIN_ALLOW_THREADS
            failed = seconds < 0 ? pthread_mutex_lock(&self->mutex) : pthread_mutex_timedlock(&self->mutex, &until);
            Py_END_ALLOW_THREADS
            if (failed)
                return 0;
        }
        self->owner = pthread_self();
    }
    self->count++;
    hold_signals();
    /* A signal that came before is handled now, with nothing begun. */
    if (self->count == 1 && (PyErr_CheckSignals() < 0 || raise_deferred() < 0)) {
        self->count = 0;
        pthread_mutex_unlock(&self->mutex);
        let_signals(0);
        return -1;
    }
    return 1;
}

static PyObject *lock_enter(PyObject *object, PyObject *unused)
{
    (void)unused;
    if (acquire((EngineLock *)object, -1) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *lock_acquire(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"blocking", "timeout", NULL};
    int blocking = 1;
    double timeout = -1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|pd", names, &blocking, &timeout))
        return NULL;
    int done = acquire((EngineLock *)object, blocking ? timeout : 0);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *lock_exit(PyObject *object, PyObject *unused)
{
    EngineLock *self = (EngineLock *)object;
    (void)unused;
    if (!is_owned(self)) {
        PyErr_SetString(PyExc_RuntimeError, "cannot release an EngineLock that another thread has");
        return NULL;
    }
    if (!--self->count)
        pthread_mutex_unlock(&self->mutex);
    /* Handlers run now, as they do when os.kill() has sent the signal: in a child that was forked from another thread
       than the main one, Python 3.13 and later run none between two bytecodes. */
    if (let_signals(1) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *lock_is_owned(PyObject *object, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(is_owned((EngineLock *)object));
}

static int lock_init(PyObject *object, PyObject *args, PyObject *keywords)
{
    if (PyTuple_Size(args) || (keywords && PyDict_Size(keywords))) {
        PyErr_SetString(PyExc_TypeError, "EngineLock() takes no arguments");
        return -1;
    }
    pthread_mutex_init(&((EngineLock *)object)->mutex, NULL);
    return 0;
}

static void lock_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    pthread_mutex_destroy(&((EngineLock *)object)->mutex);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef lock_methods[] = {
    {"__enter__", lock_enter, METH_NOARGS, "Take the lock; wait until no other thread has it."},
    {"acquire", (PyCFunction)(void (*)(void))lock_acquire, METH_VARARGS | METH_KEYWORDS,
     "Take the lock, as with threading.RLock; return whether it was free in time."},
    {"release", lock_exit, METH_NOARGS, "Let go of the lock. Signals that came meanwhile are delivered."},
    {"__exit__", lock_exit, METH_VARARGS, "Let go of the lock. Signals that came meanwhile are delivered."},
    {"_is_owned", lock_is_owned, METH_NOARGS, "Return whether the calling thread has the lock."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot lock_slots[] = {
    {Py_tp_doc, "A recursive lock for a `with`; no signal handler of Python runs in a main thread that has it."},
    {Py_tp_init, lock_init},
    {Py_tp_dealloc, lock_dealloc},
    {Py_tp_methods, lock_methods},
    {0, NULL},
};

static PyType_Spec lock_spec = {
    "chainer_ooc.swap.devices.ram._allocator.EngineLock", sizeof(EngineLock), 0, Py_TPFLAGS_DEFAULT, lock_slots,
};

/* Mortal: a base class. `_die()` is called when an object dies, and no signal handler runs in it, where what it raises
   would be lost: that of a signal that came before is run first, and its error raised between two bytecodes. */

static void mortal_finalize(PyObject *self)
{
    PyObject *type, *value, *traceback;
    PyObject *error_type = NULL, *error = NULL, *error_traceback = NULL;
    PyErr_Fetch(&type, &value, &traceback);
    hold_signals();
    if (PyErr_CheckSignals() < 0 || raise_deferred() < 0) {
        PyErr_Fetch(&error_type, &error, &error_traceback);
        PyErr_NormalizeException(&error_type, &error, &error_traceback);
        if (error_traceback)
            PyException_SetTraceback(error, error_traceback);
    }
    PyObject *done = PyObject_CallMethod(self, "_die", NULL);
    if (!done)
        PyErr_WriteUnraisable(self);
    Py_XDECREF(done);
    if (error)
        raise_later(error); /* not before: it would be raised in _die() */
    Py_XDECREF(error_type), Py_XDECREF(error), Py_XDECREF(error_traceback);
    let_signals(0);
    PyErr_Restore(type, value, traceback);
}

static PyType_Slot mortal_slots[] = {
    {Py_tp_doc, "A base class: `_die()` is called when an object dies, and no signal handler runs in it."},
    {Py_tp_finalize, mortal_finalize},
    {0, NULL},
};

static PyType_Spec mortal_spec = {
    "chainer_ooc.swap.devices.ram._allocator.Mortal", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    mortal_slots,
};

static int add_type(PyObject *module, const char *name, PyType_Spec *spec)
{
    PyObject *type = PyType_FromSpec(spec);
    if (!type)
        return -1;
    int failed = PyModule_AddObjectRef(module, name, type);
    Py_DECREF(type);
    return failed;
}

int add_engine_lock(PyObject *module)
{
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL;
    PyObject *ident = thread ? PyObject_GetAttrString(thread, "ident") : NULL;
    unsigned long number = ident ? PyLong_AsUnsignedLong(ident) : 0; /* a pthread_t */
    Py_XDECREF(ident);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    if (PyErr_Occurred())
        return -1;
    main_thread = (pthread_t)number;
    pthread_atfork(NULL, NULL, after_fork_in_child);
    static PyMethodDef of_signal = {"signal", set_handler, METH_VARARGS, NULL};
    static PyMethodDef of_thread = {"interrupt_main", interrupt_main, METH_VARARGS, NULL};
    if (!(stock_signal = replace("_signal", &of_signal)) || !(stock_interrupt_main = replace("_thread", &of_thread)))
        return -1;
    return add_type(module, "EngineLock", &lock_spec) || add_type(module, "Mortal", &mortal_spec) ? -1 : 0;
}
