/* Kills the process at the n-th of its calls that change something outside of it, before or after.

   Loaded before the C library (LD_PRELOAD), so that Python's calls and SQLite's come through here.
   It counts from `killat_aim` on, over all threads. writev is left out on purpose: whoever watches
   the process notes by it, and is not to be counted. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static volatile long aim = 0; /* 0: nothing is counted */
static volatile long counted = 0;
static volatile int is_after = 0;
static volatile int record = -1;

/* From here on: die at call `number` (from 1), and write to the descriptor `fd` which one it was. */
void killat_aim(long number, int after, int fd)
{
    counted = 0;
    is_after = after;
    record = fd;
    aim = number;
}

static long next(void) { return aim ? __sync_add_and_fetch(&counted, 1) : -1; }

/* What `fd` is open on. */
static const char *name_of(int fd, char *into, size_t size)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, into, size - 1);
    into[length > 0 ? length : 0] = 0;
    return into;
}

static void die(const char *call, const char *path)
{
    char line[300];
    const char *last = path;
    int size = 0; /* "pipe", without the ":[number]" after it */
    for (const char *at = path; *at; at++)
        if (*at == '/')
            last = at + 1;
    while (last[size] && last[size] != ':' && size < 200)
        size++;
    int is_main = syscall(SYS_gettid) == getpid();
    int length = snprintf(line, sizeof line, "%s %.*s %s", call, size, last,
                          is_main ? "main" : "thread");
    syscall(SYS_write, record, line, (size_t)length);
    syscall(SYS_kill, getpid(), SIGKILL);
}

#define FD(fd) name_of(fd, where, sizeof where)

/* Defines `name`, which dies at its turn before or after the real one. `path`: what it changes.
   Calls for which `counts` is false are nobody's business. */
#define KILL_AT(type, name, parameters, arguments, counts, path)       \
    type name parameters                                               \
    {                                                                  \
        static type(*real) parameters;                                 \
        char where[300];                                               \
        if (!real)                                                     \
            real = (type(*) parameters)dlsym(RTLD_NEXT, #name);        \
        long number = (counts) ? next() : -1;                          \
        if (number == aim && number > 0 && !is_after)                  \
            die(#name, path);                                          \
        type result = real arguments;                                  \
        if (number == aim && number > 0 && is_after)                   \
            die(#name, path);                                          \
        (void)where;                                                   \
        return result;                                                 \
    }

#define ALWAYS 1

KILL_AT(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), ALWAYS, FD(fd))
KILL_AT(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at),
        (fd, data, size, at), ALWAYS, FD(fd))
KILL_AT(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at),
        ALWAYS, FD(fd))
KILL_AT(ssize_t, send, (int fd, const void *data, size_t size, int flags), (fd, data, size, flags),
        ALWAYS, "socket")
KILL_AT(int, fsync, (int fd), (fd), ALWAYS, FD(fd))
KILL_AT(int, fdatasync, (int fd), (fd), ALWAYS, FD(fd))
KILL_AT(int, ftruncate, (int fd, off_t size), (fd, size), ALWAYS, FD(fd))
KILL_AT(int, ftruncate64, (int fd, off64_t size), (fd, size), ALWAYS, FD(fd))
KILL_AT(int, posix_fallocate, (int fd, off_t at, off_t size), (fd, at, size), ALWAYS, FD(fd))
KILL_AT(int, flock, (int fd, int how), (fd, how), ALWAYS, FD(fd))
KILL_AT(int, fchmod, (int fd, mode_t mode), (fd, mode), ALWAYS, FD(fd))
KILL_AT(int, chmod, (const char *path, mode_t mode), (path, mode), ALWAYS, path)
KILL_AT(int, unlink, (const char *path), (path), ALWAYS, path)
KILL_AT(int, rename, (const char *from, const char *to), (from, to), ALWAYS, to)
KILL_AT(int, mkdir, (const char *path, mode_t mode), (path, mode), ALWAYS, path)

/* These two take more arguments, or fewer. To lock and to unlock changes something; to ask does
   not. To open changes something where it makes the file. */

typedef int control(int, int, ...);
typedef int opening(const char *, int, ...);

int fcntl64(int fd, int command, ...)
{
    static control *real;
    char where[300];
    if (!real)
        real = (control *)dlsym(RTLD_NEXT, "fcntl64");
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    long number = command == F_SETLK || command == F_SETLKW ? next() : -1;
    if (number == aim && number > 0 && !is_after)
        die("fcntl", FD(fd));
    int result = real(fd, command, argument);
    if (number == aim && number > 0 && is_after)
        die("fcntl", FD(fd));
    return result;
}

int open64(const char *path, int flags, ...)
{
    static opening *real;
    if (!real)
        real = (opening *)dlsym(RTLD_NEXT, "open64");
    mode_t mode = 0;
    if (flags & O_CREAT) {
        va_list more;
        va_start(more, flags);
        mode = va_arg(more, mode_t);
        va_end(more);
    }
    long number = flags & O_CREAT && access(path, F_OK) ? next() : -1;
    if (number == aim && number > 0 && !is_after)
        die("open", path);
    int result = real(path, flags, mode);
    if (number == aim && number > 0 && is_after)
        die("open", path);
    return result;
}
