"""One driver per host: it starts the real host on this machine, makes updates on a benchmark's tensors, and stops it.

``trl``, ``verl`` and ``openrlhf`` run inside the environment of their host. ``launch`` starts programs in these
environments, one host after the other. The measurements themselves are part of each benchmark.
"""
