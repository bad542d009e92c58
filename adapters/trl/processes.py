"""The end of a process that trained in a group of several: the group has to be released before Python ends."""

from __future__ import annotations

import gc


def end_process_group() -> None:
    """Release torch's default process group, if there is one, and stop its threads.

    TRL's scripts leave this to the end of the process, which then sometimes aborts with exit status -6 (gloo, torch
    2.13): a thread of the group drops the tensors of the last collective while Python shuts down, and a thread that
    asks for Python's lock at that time is killed. ``destroy_process_group`` alone does not stop the threads, because
    the trainer's model still refers to the group. The garbage collector removes the model, and with it the group,
    which waits for its threads.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
