"""The clients: their devices and links, and which of them take part in a round."""

from sfl_jax.fleet.clients import Fleet, random_fleet
from sfl_jax.fleet.devices import Device, check_devices, read_device, write_device
from sfl_jax.fleet.faults import Delays, Faults
from sfl_jax.fleet.files import EXAMPLE, read_fleet, write_fleet
from sfl_jax.fleet.measured import MeasuredRounds, read_measured
from sfl_jax.fleet.rounds import Links, availability, cohort, fading_rates, order, slowdowns
from sfl_jax.fleet.sampling import Availability, Sampling, read_availability
from sfl_jax.fleet.servers import ServerList, read_servers
from sfl_jax.fleet.traces import Traces, read_traces

__all__ = [
    "EXAMPLE",
    "Availability",
    "Delays",
    "Device",
    "Faults",
    "Fleet",
    "Links",
    "MeasuredRounds",
    "Sampling",
    "ServerList",
    "Traces",
    "availability",
    "check_devices",
    "cohort",
    "fading_rates",
    "order",
    "random_fleet",
    "read_availability",
    "read_device",
    "read_fleet",
    "read_measured",
    "read_servers",
    "read_traces",
    "slowdowns",
    "write_device",
    "write_fleet",
]
