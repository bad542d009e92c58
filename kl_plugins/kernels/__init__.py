"""Kernels: the code that computes the closed forms on a device. Their meaning is documented in the other modules."""
