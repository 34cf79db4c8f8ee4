"""The clients: their devices and links, and which of them take part in a round."""

from sfl_jax.fleet.clients import Fleet, random_fleet
from sfl_jax.fleet.faults import Delays, Faults
from sfl_jax.fleet.files import read_fleet, write_fleet
from sfl_jax.fleet.rounds import Links, availability, cohort, fading_rates, order, slowdowns
from sfl_jax.fleet.sampling import Availability, Sampling, read_availability
from sfl_jax.fleet.servers import ServerList, read_servers
from sfl_jax.fleet.traces import Traces, read_traces

__all__ = [
    "Availability",
    "Delays",
    "Faults",
    "Fleet",
    "Links",
    "Sampling",
    "ServerList",
    "Traces",
    "availability",
    "cohort",
    "fading_rates",
    "order",
    "random_fleet",
    "read_availability",
    "read_fleet",
    "read_servers",
    "read_traces",
    "slowdowns",
    "write_fleet",
]
