"""A lock around torch's extension builds that ends with its process; torch's own file outlives one that is killed."""

import fcntl
import os


class ProcessLock:
    """Takes the place of ``FileBaton``: the kernel frees it, so nobody waits for a process that is gone."""

    def __init__(self, lock_file_path, *_, **__):
        self._path, self._descriptor = lock_file_path + ".process", None

    def _open(self):
        return os.open(self._path, os.O_CREAT | os.O_RDWR)

    def try_acquire(self):
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def wait(self):
        descriptor = self._open()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.close(descriptor)

    def release(self):
        os.close(self._descriptor)
        self._descriptor = None


def lock_by_process(cpp_extension):
    """After the import of ``torch.utils.cpp_extension``."""
    cpp_extension.FileBaton = ProcessLock
