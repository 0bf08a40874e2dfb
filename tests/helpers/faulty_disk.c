// Preloaded: system calls that write fail or write less, as disks do.
//   FAULT=eio    the FAULT_AT-th pwrite on a file fails with EIO, and all after it
//   FAULT=short  every pwrite of more than one byte writes half
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

typedef ssize_t (*Write)(int, const void*, size_t, off_t);

ssize_t pwrite64(int descriptor, const void* data, size_t size, off_t offset) {
  static Write real;
  static int calls;
  if (!real) real = (Write)dlsym(RTLD_NEXT, "pwrite64");
  const char* fault = getenv("FAULT");
  if (fault && !strcmp(fault, "short") && size > 1) size = size / 2;
  if (fault && !strcmp(fault, "eio") && ++calls >= atoi(getenv("FAULT_AT"))) {
    errno = EIO;
    return -1;
  }
  return real(descriptor, data, size, offset);
}

ssize_t pwrite(int descriptor, const void* data, size_t size, off_t offset) {
  return pwrite64(descriptor, data, size, offset);
}
