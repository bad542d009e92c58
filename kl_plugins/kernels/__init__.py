"""Kernels: how the closed forms are computed, apart from what they mean."""
