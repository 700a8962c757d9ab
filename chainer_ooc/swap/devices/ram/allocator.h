/* What the C files of this module share. */
#ifndef CHAINER_OOC_ALLOCATOR_H
#define CHAINER_OOC_ALLOCATOR_H

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>
#include <stdbool.h>

/* engine_lock.c: signal handlers of Python do not run in the calling thread between these two, if it is the main one.
   They nest. The second delivers those that came; with `now`, handlers run at once, and it returns -1 if one has raised. */
void hold_signals(void);
int let_signals(int now);
/* allocator.c: has an error, whose reference is borrowed, raised in this thread between two of its bytecodes; raises one
   that waits for that at once, and returns -1. */
void raise_later(PyObject *error);
int raise_deferred(void);
/* sorting.c: whether NumPy allocates for a sort, which it does not survive without; given its table of C functions. */
bool is_sorting(void);
void find_sorts(void **numpys_table);
/* allocator.c: changes when the levels that threads were given are void. */
unsigned allocation_epoch(void);
/* allocator.c: this thread has its allocations asked about. */
bool thread_asks(void);
/* ../cuda/cupy_memory.c: adds PageArena and what goes with it to a module; -1 with an exception set if it fails. And: the
   interpreter ends, nobody is asked any more. */
int add_page_arena(PyObject *module);
void end_arenas(void);
/* Adds the types EngineLock and Mortal to a module. Returns -1 with an exception set if it fails. */
int add_engine_lock(PyObject *module);
/* graph/: the same of FastProperty, and of the functions of margins. */
int add_fast_property(PyObject *module);
int add_margin(PyObject *module);

#endif
