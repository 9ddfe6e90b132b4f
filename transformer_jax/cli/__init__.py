"""The programs behind the console command ``transformer-jax`` and ``python -m experiments.X``."""
