"""Split federated learning in JAX: vmapped clients, optimal cuts, proven bounds."""
