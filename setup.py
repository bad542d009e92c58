"""Lists the packages to install; the three source folders are installed as one package.

In the repository, ``adapters/`` and ``patches/`` are beside ``kl_plugins/``; they are installed inside it. This program
finds the packages itself, so that no list has to be changed for a new ``adapters/<host>``.
"""

from setuptools import find_packages, setup

FOLDERS = {"kl_plugins": "kl_plugins", "kl_plugins.adapters": "adapters", "kl_plugins.patches": "patches"}

packages = [
    name
    for package, folder in FOLDERS.items()
    for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
]

setup(packages=packages, package_dir=FOLDERS)
