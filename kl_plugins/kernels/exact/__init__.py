"""Exact KL per token: row statistics and gradients, by interchangeable backends.

``statistics`` holds the mathematics, ``eager``, ``compiled`` and ``triton_backend`` compute it, ``backends`` chooses,
``logits`` and ``linear`` make it differentiable. ``reference`` keeps the reference's most probable tokens, and
``bucket`` is the KL over these and one bucket for all others.
"""
