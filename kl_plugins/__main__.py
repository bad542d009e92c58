"""Runs the command line for ``python -m kl_plugins``, so that ``torchrun -m kl_plugins run ...`` works."""

from kl_plugins.cli.app import main

if __name__ == "__main__":
    main()
