"""The clients: their devices and links, and which of them take part in a round."""

from sfl_jax.fleet.clients import Fleet, random_fleet
from sfl_jax.fleet.faults import Delays, Faults
from sfl_jax.fleet.files import read_fleet, write_fleet
from sfl_jax.fleet.rounds import Links, availability, cohort, fading_rates, order, slowdowns

__all__ = [
    "Delays",
    "Faults",
    "Fleet",
    "Links",
    "availability",
    "cohort",
    "fading_rates",
    "order",
    "random_fleet",
    "read_fleet",
    "slowdowns",
    "write_fleet",
]
