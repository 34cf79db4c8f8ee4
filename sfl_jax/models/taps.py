"""Where the taps of a kernel or a pooling window are along the axes of an image."""

import itertools
from typing import NamedTuple


class Axis(NamedTuple):
    """One axis of an image and of the kernel that moves along it.

    size: number of pixels. kernel_size: number of taps. stride: pixels between two positions of the kernel.
    pads: zeros (before, after) the image; None: SAME padding. dilation: pixels between two taps.
    """

    size: int
    kernel_size: int
    stride: int
    pads: tuple[int, int] | None = None
    dilation: int = 1

    @property
    def reached(self) -> int:
        """The pixels from the first tap to the last."""
        return (self.kernel_size - 1) * self.dilation

    @property
    def outputs(self) -> int:
        """The number of positions of the kernel."""
        if self.pads is None:
            return -(-self.size // self.stride)
        return (self.size + sum(self.pads) - self.reached - 1) // self.stride + 1

    @property
    def places(self) -> int:
        """The largest number of pixels with the same place modulo the stride."""
        return -(-self.size // self.stride)

    @property
    def padding(self) -> tuple[int, int]:
        """Padding as (before, after). With SAME padding an odd zero goes after."""
        if self.pads is not None:
            return self.pads
        total = max((self.outputs - 1) * self.stride + self.reached + 1 - self.size, 0)
        return total // 2, total - total // 2

    @property
    def live(self) -> range:
        """The taps that meet the image somewhere; the others meet only padding."""
        before = self.padding[0]
        ends = (self.outputs - 1) * self.stride
        first, stop = -((ends - before) // self.dilation), -(-(before + self.size) // self.dilation)
        return range(max(0, first), min(self.kernel_size, stop))

    @property
    def is_pointwise(self) -> bool:
        """Whether each output meets only its own pixel."""
        return self.kernel_size == self.stride == 1 and not any(self.padding)

    @property
    def is_met(self) -> bool:
        """Whether the kernel meets the image at every position."""
        met = {output for tap in self.live for output, _ in self.meetings(tap)}
        return len(met) == self.outputs

    @property
    def transpose(self) -> "Axis":
        """The axis of the outputs with the kernel turned around: it says where each tap sends its pixels.

        Only for a stride of 1. For larger strides the transpose is a dilated image, see `dilated`.
        """
        return dilated(self.size, self.kernel_size, 1, self.padding, self.dilation)

    def meetings(self, tap: int) -> list[tuple[int, int]]:
        """[(output, pixel)] that a tap brings together."""
        ends = range(self.outputs)
        pixels = [(output, output * self.stride + tap * self.dilation - self.padding[0]) for output in ends]
        return [(output, pixel) for output, pixel in pixels if 0 <= pixel < self.size]

    def met(self, tap: int) -> slice:
        """The part of the padded axis that a tap meets."""
        start = tap * self.dilation
        return slice(start, start + (self.outputs - 1) * self.stride + 1, self.stride)

    def senders(self, residue: int) -> list[tuple[int, int]]:
        """The [(tap, output - j)] that reach the pixels j * stride + residue."""
        at = residue + self.padding[0]
        ways = [(tap, at - tap * self.dilation) for tap in self.live]
        return [(tap, way // self.stride) for tap, way in ways if way % self.stride == 0]

    @property
    def reach(self) -> tuple[int, int]:
        """The padding (before, after) of the outputs that contains every sender."""
        shifts = [shift for residue in range(self.stride) for _, shift in self.senders(residue)]
        return max(0, -min(shifts)), max(0, max(shifts) + self.places - self.outputs)


Grid = tuple[Axis, Axis]  # rows and columns


def dilated(size: int, kernel_size: int, holes: int, pads: tuple[int, int], dilation: int = 1) -> Axis:
    """The transpose of an axis of `size` pixels with `holes` - 1 zeros between neighbours.

    It is the axis of the outputs with a stride of `holes`; its positions are the pixels. Its padding is
    negative if `pads` exceed the kernel.
    """
    reached = (kernel_size - 1) * dilation
    outputs = (size - 1) * holes + 1 + sum(pads) - reached
    return Axis(outputs, kernel_size, holes, (reached - pads[0], reached - pads[1]), dilation)


def is_usable(axis: Axis) -> bool:
    """Whether shifts can compute the axis: nothing is cropped, and at least one tap meets the image."""
    return axis.size > 0 and min(axis.padding) >= 0 and axis.outputs > 0 and len(axis.live) > 0


def taps(grid: Grid) -> list[tuple[int, int]]:
    """The taps (row, column) that meet the image."""
    return list(itertools.product(grid[0].live, grid[1].live))
