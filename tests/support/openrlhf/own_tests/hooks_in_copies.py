"""Pytest plugin for OpenRLHF's own tests: they load OpenRLHF's files under other names, which get the hooks here.

Without it the tests would pass whatever the hooks do. At the end it prints how many hooks went into how many copies.
"""

import importlib.util
from pathlib import Path

from kl_plugins.adapters.openrlhf import attach
from kl_plugins.patches.engine.patch import Hook
from kl_plugins.patches.openrlhf import ACTOR
from kl_plugins.patches.openrlhf.hooks import ESTIMATORS, PATCHES

_copies = {}
_original = importlib.util.spec_from_file_location


def _patches_of(path):
    for patch in PATCHES.patches:
        # The estimator is hooked by name where it is used; its own file gets the learner's hook.
        home = ESTIMATORS if patch.qualname == "compute_approx_kl" and patch.module == ACTOR else patch.module
        if path.as_posix().endswith(home.replace(".", "/") + ".py"):
            yield patch


def spec_from_file_location(name, location=None, *args, **kwargs):
    spec = _original(name, location, *args, **kwargs)
    patches = list(_patches_of(Path(location))) if location else []
    if not patches:
        return spec
    execute = spec.loader.exec_module

    def exec_module(module):
        execute(module)
        for patch in patches:
            owner = module
            for part in patch.qualname.split(".")[:-1]:
                owner = getattr(owner, part)
            setattr(owner, patch.attribute, Hook(vars(owner)[patch.attribute], patch))
        _copies.setdefault(Path(location).name, set()).update(patch.qualname for patch in patches)

    spec.loader.exec_module = exec_module
    return spec


def pytest_configure():
    attach()
    importlib.util.spec_from_file_location = spec_from_file_location


def pytest_terminal_summary(terminalreporter):
    for name, hooks in sorted(_copies.items()):
        terminalreporter.write_line(f"hooks in {name}: {', '.join(sorted(hooks))}")
