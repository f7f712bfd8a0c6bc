"""The garbage collector and the heap, as a server wants them: they do little while it serves."""

import ctypes
import gc
import os

# Containers made beyond those let go of after which the youngest are looked at. Python's own 700 are as many as a batch
# of requests is made of: they would be looked at while they are in use, once or twice a batch.
YOUNG = 20_000

# Free bytes that a heap keeps, and bytes of what is asked of the kernel alone, and goes back to it at once. glibc's own
# are 128 KiB, and grow with what is let go of, to that very size: each large body or batch would get new pages from the
# kernel, which clears them, and that takes longer than filling them.
KEPT, ALONE = 64 << 20, 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h


def freeze() -> None:
    """Take all that is there out of the collector's sight, look at what comes later less often, and keep what is freed.

    What a process has when it begins to serve lives as long as it does. With torch that is some hundred thousand
    objects: a full collection that looked at them would stop the world for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    young, middle, old = gc.get_threshold()
    if young:  # else somebody turned the collector off
        gc.set_threshold(max(young, YOUNG), middle, old)
    keep_heap()
    import sys

    sys.setswitchinterval(float(os.environ.get("SWI", "0.005")))


def keep_heap() -> None:
    """Let memory that is freed wait for who wants it next. Other C libraries than glibc do as they like."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(("MALLOC_TRIM", "MALLOC_MMAP", "GLIBC_TUNABLES")) for name in os.environ):
        return  # or as whoever started the process has said
    mallopt(_M_TRIM_THRESHOLD, KEPT)
    mallopt(_M_MMAP_THRESHOLD, ALONE)
