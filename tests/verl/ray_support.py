"""Ray for tests: the environment of every process, and clusters with ports and folders of their own."""

from pathlib import Path

CPU_HOST = Path(__file__).parent / "cpu_host"

ENVIRONMENT = {
    "PYTHONPATH": str(CPU_HOST),
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # key of the engine classes, which run on any device
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HYDRA_FULL_ERROR": "1",
    "WANDB_MODE": "disabled",
}
