"""Full-vocabulary KL per token: row statistics and gradients, by interchangeable backends.

``statistics`` holds the mathematics, ``eager``, ``compiled`` and ``triton_backend`` compute it, ``backends`` chooses,
``logits`` and ``linear`` make it differentiable, ``top_k`` samples the tail.
"""
