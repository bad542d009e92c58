"""Exact KL per token: row statistics and gradients, by interchangeable backends.

``statistics`` holds the mathematics. ``eager``, ``compiled`` and ``triton_backend`` compute it, and ``backends``
chooses between them. ``logits`` and ``linear`` make the result differentiable. ``reference`` keeps the reference's most
probable tokens, and ``bucket`` computes the KL over these tokens and one bucket for all others.
"""
