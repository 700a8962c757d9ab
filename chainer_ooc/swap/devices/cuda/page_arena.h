/* PageArena: a GPU's memory in pages that are mapped wherever they are wanted. See page_arena.c. */
#ifndef CHAINER_OOC_PAGE_ARENA_H
#define CHAINER_OOC_PAGE_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct page_arena;

/* What the arena asks of the driver. All but record() and the like are about single pages; addresses are offsets in the
   arena. What returns bool says whether it worked. All are called under the arena's lock, but none of them waits. */
struct arena_driver {
    bool (*create)(void *context, uint64_t *page);
    void (*release)(void *context, uint64_t page);
    bool (*map)(void *context, uint64_t offset, uint64_t page);
    bool (*allow)(void *context, uint64_t offset, uint64_t nbytes); /* access to a row of new mappings */
    bool (*unmap)(void *context, uint64_t offset);
    /* An event after all that the stream has been given; or NULL: while it is captured there is none. */
    void *(*record)(void *context, intptr_t stream);
    bool (*is_done)(void *context, void *event);
    void (*forget)(void *context, void *event);
};

enum arena_result {
    ARENA_DONE,
    ARENA_FULL,  /* there is no memory: so many bytes of pages are missing */
    ARENA_WAIT,  /* wait for the event, then call arena_waited(), and try again */
    ARENA_ORDER, /* note the moment, let the stream wait for all others' work, call arena_adopt(), and try again */
};

struct arena_wait {
    void *event;
    uint64_t tick, missing;
    void *lane;
};

struct arena_counts {
    uint64_t exact, fitted, mapped_anew; /* allocations: from the list of their size, from free memory, after mapping */
    uint64_t maps, unmaps, rows, creates, releases, marks, waits, orders;
};

/* Returns an arena with `pages` of `page_size` bytes of address space; NULL if there is no host memory. A quarter of the
   space is for blocks below `small` bytes. */
struct page_arena *page_arena_new(uint64_t pages, uint64_t page_size, uint64_t small, const struct arena_driver *driver, void *context);
/* Frees what the arena has of the host's memory. The driver is not called. */
void page_arena_delete(struct page_arena *arena);

/* Sets the most bytes that are taken of the GPU. What is taken already stays until page_arena_trim(). */
void page_arena_set_limit(struct page_arena *arena, uint64_t nbytes);
/* `is_captured`: a CUDA graph is being captured of the stream. What it gets only later captures get again, once it is freed,
   until page_arena_settle() has `graphs`. */
enum arena_result page_arena_allocate(struct page_arena *arena, uint64_t nbytes, intptr_t stream, bool is_captured, uint64_t *offset,
                                      struct arena_wait *wait);
void page_arena_waited(struct page_arena *arena, const struct arena_wait *wait);
/* Returns the present moment. */
uint64_t page_arena_now(struct page_arena *arena);
/* Makes memory that was freed until then a stream's: its later work comes after all work of before `tick`. */
void page_arena_adopt(struct page_arena *arena, intptr_t stream, uint64_t tick);
/* The same, where all work of before `tick` has ended. With `graphs` no graph that was captured before will be launched again:
   what was freed of theirs is memory as any. */
void page_arena_settle(struct page_arena *arena, intptr_t stream, uint64_t tick, bool graphs);
/* Writes down the streams that own free memory, `most` of them at most. Returns how many. */
size_t page_arena_streams(struct page_arena *arena, intptr_t *streams, size_t most);
/* Frees a block. Returns whether there was one at the offset. No driver call, no wait: any thread, any time. */
bool page_arena_free(struct page_arena *arena, uint64_t offset);

/* Gives pages that are free, and known to be idle, back until at most `nbytes` are taken. Returns the bytes taken then. */
uint64_t page_arena_trim(struct page_arena *arena, uint64_t nbytes);

/* Bytes of blocks in use, rounded up to 512 each, and of what is kept for graphs; the latter; bytes of all pages taken of the
   GPU. Need no lock. */
uint64_t page_arena_used(const struct page_arena *arena);
uint64_t page_arena_graphs(const struct page_arena *arena);
uint64_t page_arena_taken(const struct page_arena *arena);
struct arena_counts page_arena_counts(struct page_arena *arena);
/* Calls `visit` for each row of mapped pages, under the lock; stops when it returns false. */
bool page_arena_each_row(struct page_arena *arena, bool (*visit)(void *context, uint64_t offset, uint64_t nbytes), void *context);

/* Returns NULL, or which invariant does not hold. For tests. */
const char *page_arena_check(struct page_arena *arena);
/* Each function takes the lock, which a thread may have already; around a fork nothing may be half done in the child. */
void page_arena_lock(struct page_arena *arena);
bool page_arena_try_lock(struct page_arena *arena);
void page_arena_unlock(struct page_arena *arena);

#endif
