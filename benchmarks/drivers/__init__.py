"""One driver per host: start the real host on this machine, make updates on tensors that a benchmark gives, close down.

``trl``, ``verl`` and ``openrlhf`` run inside the environment of their host; ``launch`` starts programs in these
environments, one host after the other. What a benchmark measures in an update stays with the benchmark.
"""
