"""Package list: three source folders, installed as one package.

``adapters/`` and ``patches/`` stand beside ``kl_plugins/`` in the repository and are installed inside it. The packages
are found, not written down, so that a new ``adapters/<host>`` cannot be forgotten.
"""

from setuptools import find_packages, setup

FOLDERS = {"kl_plugins": "kl_plugins", "kl_plugins.adapters": "adapters", "kl_plugins.patches": "patches"}

packages = [
    name
    for package, folder in FOLDERS.items()
    for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
]

setup(packages=packages, package_dir=FOLDERS)
