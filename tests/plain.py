"""Settings of plain federated averaging, for tests without the default recipe.

SGD, dropout and stochastic depth as published, a constant learning rate, a server without momentum.
"""

from typing import Any

SETTINGS: dict[str, Any] = {
    "optimizer": "sgd", "learning_rate_schedule": "constant", "warmup_rounds": 0, "server_momentum": 0.0,
    "drop_rate_scale": 1.0, "head_init_scale": 1.0,
}  # fmt: skip
FLAGS = [f"--{name}={value}" for name, value in SETTINGS.items()]
