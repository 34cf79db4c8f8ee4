"""What a codec is, and how its name becomes one."""

import abc
import dataclasses
import inspect
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sfl_jax.errors import BadInput
from sfl_jax.registry import CODECS


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """How an array of samples becomes what goes over the wire, and how it comes back.

    A codec is frozen and hashable, so it can be static under jit. Its methods are pure functions. They run
    under jit and vmap, on any float type. Numbers are float32 before anything else is done to them.
    Neither method needs a gradient: the caller passes gradients on by a rule of its own.

    A sample with a number that is not finite has one after decoding too, so that divergence is seen.

    name: the name in the registry. Its numbers, if it has any, are the fields of the dataclass.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def encode(self, x: Float[Array, "B *sample"], key: Key[Array, ""]) -> Any:
        """The payload of B samples: a pytree of arrays (B, ...) of the types that go over the wire."""

    @abc.abstractmethod
    def decode(self, payload: Any, like: jax.ShapeDtypeStruct) -> Float[Array, "B *sample"]:
        """The samples of a payload, in the shape and type of `like`, those of the encoded array."""

    @abc.abstractmethod
    def bits(self, shape: tuple[int, ...]) -> int:
        """What one sample of this shape takes on the wire, scales and indices included."""

    def transmit(self, x: Float[Array, "B *sample"], key: Key[Array, ""]) -> Float[Array, "B *sample"]:
        """What arrives on the other side: `x`, encoded and decoded."""
        return self.decode(self.encode(x, key), jax.ShapeDtypeStruct(x.shape, x.dtype))

    def __str__(self) -> str:
        """The text that `create` makes this codec from."""
        numbers = ",".join(_shortest(value) for value in dataclasses.astuple(self))
        return f"{self.name}:{numbers}" if numbers else self.name

    def _require(self, is_met: bool, rule: str) -> None:
        if not is_met:
            raise BadInput(f"codec={self}: {rule}")


def create(spec: str | Codec) -> Codec:
    """The codec of a text, "name" or "name:number,number"; a codec is given back as it is.

    Raises BadInput for a name that is not registered, for other numbers than it takes, and for numbers that
    the codec refuses.
    """
    if isinstance(spec, Codec):
        return spec
    if not isinstance(spec, str):
        raise BadInput(f"codec={spec!r}: must be a name, such as int8, or a Codec")
    name, colon, text = spec.partition(":")
    member = CODECS[name]
    wanted = tuple(inspect.signature(member).parameters)
    try:
        numbers = [float(number) for number in text.split(",")] if colon else []
    except ValueError:
        numbers = None
    if numbers is None or len(numbers) != len(wanted):
        form = f"{name}:{','.join(wanted)}, in numbers" if wanted else name
        raise BadInput(f"codec={spec}: must be {form}")
    return member(*numbers)


def flat(x: Float[Array, "B *sample"]) -> Float[Array, "B n"]:
    """Samples as vectors of float32."""
    return x.astype(jnp.float32).reshape(x.shape[0], math.prod(x.shape[1:]))


def shaped(samples: Float[Array, "B n"], like: jax.ShapeDtypeStruct) -> Float[Array, "B *sample"]:
    """Vectors in the shape and type of `like`."""
    return samples.reshape(like.shape).astype(like.dtype)


def _shortest(value: float) -> str:
    return repr(float(value)).removesuffix(".0")
