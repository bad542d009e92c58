"""Objects of kl-plugins that a step leaves to Python's garbage collector, because they refer to each other.

Tensors that such objects refer to stay in memory until the collector runs, which can be many steps later. Ray workers
get both functions by value, so each imports what it needs.
"""


def watch(process=None):
    """Collect all garbage, and stop automatic collections until :func:`watched` is called."""
    import gc

    gc.collect()
    gc.disable()


def watched(process=None):
    """Collect the garbage since :func:`watch`, and return the names of our classes and functions in it."""
    import gc

    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        kinds = {one if hasattr(one, "__qualname__") else type(one) for one in gc.garbage}
        return sorted(
            f"{kind.__module__}.{kind.__qualname__}"
            for kind in kinds
            if str(getattr(kind, "__module__", None)).startswith("kl_plugins")
        )
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
