"""The commands: what the launch scripts and the console scripts run. Importing a command imports no JAX."""
