"""The question that the trainer asks every worker. It travels by value: a worker without kl-plugins can answer as well.

Nothing may be imported here but the standard library, and everything inside the function.
"""


def probe(process, spec, behaviour):  # type: ignore[no-untyped-def]
    """What one worker process says about itself.

    Args:
        process: the Ray actor's own object.
        spec: the spec that it should run.
        behaviour: where the behaviour policy's log-probs come from.

    Returns:
        A dict: ``rank``, ``pid``, ``node``, and ``receipt`` (a dict) or ``error`` (a text).
    """
    import os
    import socket

    rank = int(getattr(process, "rank", os.environ.get("RANK", -1)))
    answer = {"rank": rank, "pid": os.getpid(), "node": socket.gethostname()}
    try:
        from kl_plugins.patches.verl.worker import receipt
    except (ImportError, AttributeError) as error:
        return {**answer, "error": f"kl-plugins is not installed there ({type(error).__name__}: {error})"}
    try:
        return {**answer, "receipt": receipt(process, spec, behaviour).to_dict()}
    except Exception as error:
        return {**answer, "error": f"{type(error).__name__}: {error}"}
