/* Preloaded into a process: counts its file-system calls once it is armed, and kills it at the k-th.

Python, Rust (safetensors) and C++ (torch) all reach the disk through these functions of libc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define KILLED 9

static long left = 0; /* calls until the end; 0 = not armed */
static int halved = 0;

void arm(long calls, int half) { left = calls, halved = half; }

static int last(void) { return left && --left == 0; }
static void die_after(int is_last) { if (is_last) _exit(KILLED); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WATCH(type, name, parameters, arguments) \
    type name parameters { \
        int is_last = last(); \
        type result = REAL(name) arguments; \
        die_after(is_last); \
        return result; \
    }
#define WATCH_OPEN(name) \
    int name(const char *path, int flags, ...) { \
        int is_last = last(); \
        va_list rest; \
        va_start(rest, flags); \
        int result = REAL(name)(path, flags, va_arg(rest, mode_t)); \
        va_end(rest); \
        die_after(is_last); \
        return result; \
    }
#define WATCH_OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        int is_last = last(); \
        va_list rest; \
        va_start(rest, flags); \
        int result = REAL(name)(folder, path, flags, va_arg(rest, mode_t)); \
        va_end(rest); \
        die_after(is_last); \
        return result; \
    }

WATCH_OPEN(open)
WATCH_OPEN(open64)
WATCH_OPENAT(openat)
WATCH_OPENAT(openat64)
WATCH(FILE *, fopen, (const char *path, const char *mode), (path, mode))
WATCH(FILE *, fopen64, (const char *path, const char *mode), (path, mode))
WATCH(int, fclose, (FILE *file), (file))
WATCH(int, close, (int file), (file))
WATCH(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count))
WATCH(ssize_t, pwrite, (int file, const void *data, size_t bytes, off_t at), (file, data, bytes, at))
WATCH(ssize_t, pwrite64, (int file, const void *data, size_t bytes, off64_t at), (file, data, bytes, at))
WATCH(ssize_t, copy_file_range, (int from, off64_t *at, int to, off64_t *there, size_t bytes, unsigned flags),
      (from, at, to, there, bytes, flags))
WATCH(int, ftruncate, (int file, off_t bytes), (file, bytes))
WATCH(int, ftruncate64, (int file, off64_t bytes), (file, bytes))
WATCH(int, rename, (const char *from, const char *to), (from, to))
WATCH(int, link, (const char *from, const char *to), (from, to))
WATCH(int, unlink, (const char *path), (path))
WATCH(int, mkdir, (const char *path, mode_t mode), (path, mode))
WATCH(int, rmdir, (const char *path), (path))

/* What a process has written outlives it, synced or not: these are counted, not done, which takes most of the time. */
int fsync(int file) { return (void)file, die_after(last()), 0; }
int fdatasync(int file) { return (void)file, die_after(last()), 0; }

ssize_t write(int file, const void *data, size_t bytes) {
    int is_last = last();
    ssize_t result = REAL(write)(file, data, is_last && halved ? bytes / 2 : bytes);
    die_after(is_last);
    return result;
}
