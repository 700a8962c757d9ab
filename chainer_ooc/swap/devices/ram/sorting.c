/* Whether the calling thread sorts by NumPy, which crashes if it gets no memory for a buffer.

   NumPy 2 clears that buffer of a sort or a partition of objects, or strings, whether it has got it or not. An allocation
   does not tell what it is for; the stack does: its functions are compared with those in NumPy's table. It is walked
   where an allocation is refused, and nowhere else. */

#include "allocator.h"

#include <dlfcn.h>

/* Of <unwind.h>, by which exceptions of C++ walk the stack. The library is looked for: not each compiler brings one. */
static int (*walk)(int (*visit)(void *frame, void *wanted), void *wanted);
static void *(*address_in)(void *frame);
static void *(*function_at)(void *address);

enum { SORT = 129, ARG_SORT = 130, LEX_SORT = 189, PARTITION = 296, ARG_PARTITION = 297, NEW_FROM_DESCR = 94 };
static void *sorts[5], *makes_array;
enum { GO_ON = 0, STOP = 4, MOST = 24 };

typedef struct {
    int left; /* frames */
    bool is_found;
} Search;

static int visit(void *frame, void *search)
{
    Search *own = search;
    char *address = (char *)address_in(frame);
    if (!address) /* a thread's first frame */
        return STOP;
    void *function = function_at(address - 1); /* a call may be the last instruction of a function */
    for (int i = 0; i < 5; i++)
        own->is_found |= function && function == sorts[i];
    return own->is_found || function == makes_array || !--own->left ? STOP : GO_ON;
}

bool is_sorting(void)
{
    Search search = {MOST, false};
    if (function_at)
        walk(visit, &search);
    return search.is_found;
}

void find_sorts(void **numpys_table)
{
    const int indexes[5] = {SORT, ARG_SORT, LEX_SORT, PARTITION, ARG_PARTITION};
    for (int i = 0; i < 5; i++)
        sorts[i] = numpys_table[indexes[i]];
    makes_array = numpys_table[NEW_FROM_DESCR];
    void *library = dlopen("libgcc_s.so.1", RTLD_LAZY); /* for ever */
    if (library) {
        *(void **)&walk = dlsym(library, "_Unwind_Backtrace");
        *(void **)&address_in = dlsym(library, "_Unwind_GetIP");
        *(void **)&function_at = walk && address_in ? dlsym(library, "_Unwind_FindEnclosingFunction") : NULL;
    }
}
