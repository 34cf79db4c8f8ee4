"""What the launch scripts and the console commands run. Importing a command imports no JAX."""
