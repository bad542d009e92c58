"""The question that a trainer asks every worker. It travels by value: a worker without kl-plugins can answer as well.

Nothing may be imported here but the standard library, and everything inside the function.
"""


def probe(process, module, spec, behaviour):  # type: ignore[no-untyped-def]
    """What one worker process says about itself.

    Args:
        process: the worker's own object; its launcher has put the rank into ``RANK``.
        module: dotted module of kl-plugins whose ``receipt(process, spec, behaviour)`` makes the receipt.
        spec: the spec that the worker should run.
        behaviour: where the behaviour policy's log-probs come from.

    Returns:
        A dict: ``rank``, ``pid``, ``node``, and ``receipt`` (a dict) or ``error`` (a text).
    """
    import importlib
    import os
    import socket

    answer = {"rank": int(os.environ.get("RANK", -1)), "pid": os.getpid(), "node": socket.gethostname()}
    try:
        receipt = importlib.import_module(module).receipt
    except (ImportError, AttributeError) as error:
        return {**answer, "error": f"kl-plugins is not installed there ({type(error).__name__}: {error})"}
    try:
        return {**answer, "receipt": receipt(process, spec, behaviour).to_dict()}
    except Exception as error:
        return {**answer, "error": f"{type(error).__name__}: {error}"}
