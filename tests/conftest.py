"""What every test shares: one thread per process, hypothesis without a clock."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "automerge",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),  # CI runs the same examples every time
)
settings.load_profile("automerge")
