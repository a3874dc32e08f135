"""What every test shares: one thread per process, hypothesis without a clock."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("automerge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("automerge")
