"""Loggers for services of others, as plug-ins: `--logger experiments/loggers/offline_wandb.py:Wandb`."""
