// A disk that fails now and then: preloaded, it stands between a test's process and the system.
//
// A `part` is part of a path, or its end where a `$` follows.
//
// FAULT_WRITE   "part:after:errno:times"  of writes: after that many bytes in all, the next ones
//               fail, so often; what fits before is written
// FAULT_FSYNC   "part:errno:times"        fsync of paths that contain `part`
// FAULT_FLOCK   "errno"                   every flock
// FAULT_OPEN    "part:errno"              opening such paths in order to write, and making such folders
// FAULT_CUT     "part:errno"              truncating them
// FAULT_RENAME  "part:errno"              renaming to such paths: it is done, and said to have failed
// FAULT_KILL    "part:n"                  the process is killed at the n-th change of such paths: before
//               a write, a sync, a cut, a rename, a removal, or a folder or file is made
// FAULT_NOEXEC  "1"                       statvfs tells that nothing may be executed there
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)

// Splits "part:a:b:c"; returns how many numbers there are, or -1 without the variable.
static int setting(const char *name, char *part, long *numbers) {
    const char *value = getenv(name);
    if (!value) return -1;
    const char *colon = strchr(value, ':');
    if (!colon) return -1;
    memcpy(part, value, (size_t)(colon - value));
    part[colon - value] = 0;
    return sscanf(colon + 1, "%ld:%ld:%ld", numbers, numbers + 1, numbers + 2);
}

static int within(const char *path, const char *part) {
    size_t length = strlen(path), end = strlen(part);
    if (end == 0 || part[end - 1] != '$') return strstr(path, part) != NULL;
    end--;
    return length >= end && memcmp(path + length - end, part, end) == 0;
}

static int named(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static int concerns(int fd, const char *part) {
    char path[PATH_MAX];
    return named(fd, path) && within(path, part);
}

// Counts a change, and may be the end.
static void change(const char *path) {
    static atomic_long changes;
    char part[PATH_MAX];
    long numbers[3];
    if (setting("FAULT_KILL", part, numbers) != 1 || !within(path, part)) return;
    if (++changes == numbers[0]) {
        kill(getpid(), SIGKILL);
        pause();
    }
}

static void change_of(int fd) {
    char path[PATH_MAX];
    if (getenv("FAULT_KILL") && named(fd, path)) change(path);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    change_of(fd);
    static long written, failed;
    char part[PATH_MAX];
    long numbers[3];
    if (setting("FAULT_WRITE", part, numbers) != 3 || !concerns(fd, part)) return real(fd, bytes, count);
    if (written == numbers[0] && failed < numbers[2]) {
        failed++;
        errno = (int)numbers[1];
        return -1;
    }
    long left = numbers[0] - written;
    if (left > 0 && (long)count > left) count = (size_t)left;
    ssize_t done = real(fd, bytes, count);
    if (done > 0) written += done;
    return done;
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    change_of(fd);
    static long failed;
    char part[PATH_MAX];
    long numbers[3];
    if (setting("FAULT_FSYNC", part, numbers) == 2 && failed < numbers[1] && concerns(fd, part)) {
        failed++;
        errno = (int)numbers[0];
        return -1;
    }
    return real(fd);
}

int flock(int fd, int operation) {
    REAL(int, "flock", int, int);
    const char *value = getenv("FAULT_FLOCK");
    if (value) {
        errno = atoi(value);
        return -1;
    }
    return real(fd, operation);
}

static int cut(int fd, off64_t length) {
    REAL(int, "ftruncate64", int, off64_t);
    change_of(fd);
    char part[PATH_MAX];
    long numbers[3];
    if (setting("FAULT_CUT", part, numbers) == 1 && concerns(fd, part)) {
        errno = (int)numbers[0];
        return -1;
    }
    return real(fd, length);
}

int ftruncate64(int fd, off64_t length) { return cut(fd, length); }
int ftruncate(int fd, off_t length) { return cut(fd, length); }

static int refused(const char *path, int flags) {
    char part[PATH_MAX];
    long numbers[3];
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && setting("FAULT_OPEN", part, numbers) == 1
        && within(path, part)) {
        errno = (int)numbers[0];
        return 1;
    }
    return 0;
}

int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    if (flags & O_CREAT) change(path);
    return refused(path, flags) ? -1 : real(path, flags, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    char part[PATH_MAX];
    long numbers[3];
    change(to);
    int done = real(from, to);
    if (done == 0 && setting("FAULT_RENAME", part, numbers) == 1 && within(to, part)) {
        errno = (int)numbers[0];
        return -1;
    }
    return done;
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    change(path);
    return real(path);
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    change(path);
    return real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    change(path);
    return refused(path, O_CREAT) ? -1 : real(path, mode);
}

static int no_programs(int done, unsigned long *flags) {
    if (done == 0 && getenv("FAULT_NOEXEC")) *flags |= ST_NOEXEC;
    return done;
}

int statvfs(const char *path, struct statvfs *told) {
    REAL(int, "statvfs", const char *, struct statvfs *);
    return no_programs(real(path, told), &told->f_flag);
}

int statvfs64(const char *path, struct statvfs64 *told) {
    REAL(int, "statvfs64", const char *, struct statvfs64 *);
    return no_programs(real(path, told), &told->f_flag);
}
