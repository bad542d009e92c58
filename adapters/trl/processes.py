"""The end of a process that trained in a group of several: the group has to be idle before Python ends."""

from __future__ import annotations

import time

SECONDS = 1.0
"""How long the threads of the group may take to drop the tensors of the last collective."""


def end_process_group() -> None:
    """Wait until the threads of torch's default process group are idle, and release the group, if there is one.

    TRL's scripts leave this to the end of the process, which then sometimes aborts with exit status -6 (gloo, torch
    2.13): a thread of the group drops the tensors of the last collective while Python shuts down, and a thread that
    asks for Python's lock at that time is killed. ``destroy_process_group`` alone does not stop the threads, because
    the trainer's model still refers to the group. A garbage collection would remove both, but it can hang: the group
    waits for its threads while it holds Python's lock, and a thread may wait for this lock. The threads get the lock
    while this function sleeps, and are idle afterwards.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        time.sleep(SECONDS)
        dist.destroy_process_group()
