"""What a codec is, and how a name becomes a codec."""

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
    """Turns an array of samples into a payload for the wire, and back.

    A codec is frozen and hashable, so it can be static under jit. Its methods are pure functions. They run
    under jit and vmap, on any float type, and first convert numbers to float32. They need no gradient,
    because the caller has its own rule for gradients.

    A sample with a number that is not finite still has one after decoding, so that divergence is noticed.

    name: the name in the registry. The dataclass fields are the codec's numbers.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def encode(self, x: Float[Array, "B *sample"], key: Key[Array, ""]) -> Any:
        """The payload of B samples: a pytree of arrays (B, ...), in the types that go over the wire."""

    @abc.abstractmethod
    def decode(self, payload: Any, like: jax.ShapeDtypeStruct) -> Float[Array, "B *sample"]:
        """The samples of a payload. `like` is the shape and type of the encoded array."""

    @abc.abstractmethod
    def bits(self, shape: tuple[int, ...]) -> int:
        """The bits that one sample of this shape takes on the wire, with scales and indices."""

    def transmit(self, x: Float[Array, "B *sample"], key: Key[Array, ""]) -> Float[Array, "B *sample"]:
        """What arrives on the other side: `x`, encoded and decoded."""
        return self.decode(self.encode(x, key), jax.ShapeDtypeStruct(x.shape, x.dtype))

    def __str__(self) -> str:
        """The text from which `create` makes this codec."""
        numbers = ",".join(_shortest(value) for value in dataclasses.astuple(self))
        return f"{self.name}:{numbers}" if numbers else self.name

    def _require(self, is_met: bool, rule: str) -> None:
        if not is_met:
            raise BadInput(f"codec={self}: {rule}")


def create(spec: str | Codec) -> Codec:
    """Returns the codec for a text "name" or "name:number,number". A `Codec` is returned unchanged.

    Raises BadInput for an unknown name, for a wrong count of numbers, or for numbers that the codec refuses.
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
        example = f"{name}:{','.join(['0.5'] * len(wanted))}"
        form = f"{name}:{','.join(wanted)} with numbers, such as {example}" if wanted else name
        raise BadInput(f"codec={spec}: must be {form}")
    return member(*numbers)


def flat(x: Float[Array, "B *sample"]) -> Float[Array, "B n"]:
    """Samples as float32 vectors."""
    return x.astype(jnp.float32).reshape(x.shape[0], math.prod(x.shape[1:]))


def shaped(samples: Float[Array, "B n"], like: jax.ShapeDtypeStruct) -> Float[Array, "B *sample"]:
    """Vectors in the shape and type of `like`."""
    return samples.reshape(like.shape).astype(like.dtype)


def _shortest(value: float) -> str:
    return repr(float(value)).removesuffix(".0")
