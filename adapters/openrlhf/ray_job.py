"""The hook for Ray's workers, in the job config that ``ray.init`` merges with OpenRLHF's own runtime environment."""

from __future__ import annotations

import json
from collections.abc import Mapping

HOOK = "kl_plugins.adapters.openrlhf.attach"
"""What every worker process of the job calls before anything else."""

VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where ``ray job submit`` leaves the job's runtime environment for its driver."""

FIELD = "worker_process_setup_hook"

PREFIX = "KL_PLUGINS_"
"""Prefix of our environment variables; workers on any node get those of the launching process."""

OWN_HOOK = "KL_PLUGINS_OWN_SETUP_HOOK"
"""Environment variable: set to 1, the job's own hook is left alone, because it calls ours."""


def with_hook(environment: Mapping[str, str]) -> str:
    """The job config of an environment, hook and our own variables included. Safe to apply twice.

    Args:
        environment: of the process that will call ``ray.init``.

    Returns:
        JSON for :data:`VARIABLE`.

    Raises:
        ValueError: the job has another hook already, and Ray takes one.
    """
    config = json.loads(environment.get(VARIABLE) or "{}")
    runtime = config.get("runtime_env") or {}
    found = runtime.get(FIELD)
    if found not in (None, HOOK):
        if environment.get(OWN_HOOK) == "1":
            return json.dumps(config)
        raise ValueError(
            f"kl-plugins: the Ray job's runtime environment has a {FIELD} already ({found}), and Ray takes one. Remove "
            f"it, or call {HOOK}() in it and set {OWN_HOOK}=1; a worker that it does not reach stops the run"
        )
    ours = {name: value for name, value in environment.items() if name.startswith(PREFIX)}
    if ours:
        runtime = {**runtime, "env_vars": {**ours, **(runtime.get("env_vars") or {})}}
    return json.dumps({**config, "runtime_env": {**runtime, FIELD: HOOK}})
