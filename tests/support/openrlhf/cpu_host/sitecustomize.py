"""Runs in every Python process that has this folder on its path: launcher, Ray's workers, vLLM's subprocesses."""

import openrlhf_on_cpu

openrlhf_on_cpu.install()
