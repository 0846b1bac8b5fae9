/* Calls that do not return, as on a file system whose server is gone.
 *
 * hostile_peers.py builds this with gcc and preloads it. HANG_CALL names the call: stat, open or
 * read. A call for a path that begins with HANG_PREFIX does not return while the file HANG_WHILE
 * exists. The functions below are those that Python imports (`nm -D`), and their other spellings.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void hang(const char *call, const char *path)
{
    const char *wanted = getenv("HANG_CALL");
    const char *prefix = getenv("HANG_PREFIX");
    const char *lasting = getenv("HANG_WHILE");
    const struct timespec pause = {0, 100 * 1000 * 1000};

    if (!wanted || !prefix || !lasting || !path || strcmp(call, wanted) != 0)
        return;
    if (strncmp(path, prefix, strlen(prefix)) != 0)
        return;
    while (syscall(SYS_access, lasting, F_OK) == 0)
        nanosleep(&pause, NULL);
}

static void hang_on_descriptor(const char *call, int descriptor)
{
    char name[64];
    char path[4096];
    ssize_t length;

    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    length = syscall(SYS_readlink, name, path, sizeof path - 1);
    if (length <= 0)
        return;
    path[length] = '\0';
    hang(call, path);
}

static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

#define STAT_OF_PATH(NAME, BUFFER) \
    int NAME(const char *path, struct BUFFER *found) \
    { \
        hang("stat", path); \
        return ((int (*)(const char *, struct BUFFER *))real(#NAME))(path, found); \
    }
STAT_OF_PATH(stat, stat)
STAT_OF_PATH(stat64, stat64)
STAT_OF_PATH(lstat, stat)
STAT_OF_PATH(lstat64, stat64)

#define STAT_AT(NAME, BUFFER) \
    int NAME(int folder, const char *path, struct BUFFER *found, int flags) \
    { \
        hang("stat", path); \
        return ((int (*)(int, const char *, struct BUFFER *, int))real(#NAME))( \
            folder, path, found, flags); \
    }
STAT_AT(fstatat, stat)
STAT_AT(fstatat64, stat64)

#define STAT_OF_DESCRIPTOR(NAME, BUFFER) \
    int NAME(int descriptor, struct BUFFER *found) \
    { \
        hang_on_descriptor("stat", descriptor); \
        return ((int (*)(int, struct BUFFER *))real(#NAME))(descriptor, found); \
    }
STAT_OF_DESCRIPTOR(fstat, stat)
STAT_OF_DESCRIPTOR(fstat64, stat64)

int statx(int folder, const char *path, int flags, unsigned int mask, struct statx *found)
{
    hang("stat", path);
    return ((int (*)(int, const char *, int, unsigned int, struct statx *))real("statx"))(
        folder, path, flags, mask, found);
}

int access(const char *path, int mode)
{
    hang("stat", path);
    return ((int (*)(const char *, int))real("access"))(path, mode);
}

int faccessat(int folder, const char *path, int mode, int flags)
{
    hang("stat", path);
    return ((int (*)(int, const char *, int, int))real("faccessat"))(folder, path, mode, flags);
}

#define OPEN(NAME) \
    int NAME(const char *path, int flags, ...) \
    { \
        va_list rest; \
        mode_t mode; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
        hang("open", path); \
        return ((int (*)(const char *, int, ...))real(#NAME))(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define CHECKED_OPEN(NAME) \
    int NAME(const char *path, int flags) \
    { \
        hang("open", path); \
        return ((int (*)(const char *, int))real(#NAME))(path, flags); \
    }
CHECKED_OPEN(__open_2)
CHECKED_OPEN(__open64_2)

#define OPEN_AT(NAME) \
    int NAME(int folder, const char *path, int flags, ...) \
    { \
        va_list rest; \
        mode_t mode; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
        hang("open", path); \
        return ((int (*)(int, const char *, int, ...))real(#NAME))(folder, path, flags, mode); \
    }
OPEN_AT(openat)
OPEN_AT(openat64)

#define OPEN_STREAM(NAME) \
    FILE *NAME(const char *path, const char *mode) \
    { \
        hang("open", path); \
        return ((FILE * (*)(const char *, const char *)) real(#NAME))(path, mode); \
    }
OPEN_STREAM(fopen)
OPEN_STREAM(fopen64)

ssize_t read(int descriptor, void *buffer, size_t size)
{
    hang_on_descriptor("read", descriptor);
    return ((ssize_t(*)(int, void *, size_t))real("read"))(descriptor, buffer, size);
}

ssize_t pread64(int descriptor, void *buffer, size_t size, off64_t offset)
{
    hang_on_descriptor("read", descriptor);
    return ((ssize_t(*)(int, void *, size_t, off64_t))real("pread64"))(
        descriptor, buffer, size, offset);
}
