"""Split federated learning in JAX: vmapped clients, optimal cuts, proven bounds."""

__version__ = "0.1.0"
