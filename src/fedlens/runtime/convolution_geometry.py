"""The sizes of a convolution, which decide in what form it is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution, each at least 1.

    Attributes:
      images: number of images.
      inputs: number of input channels, of one group.
      outputs: number of output channels, of one group.
      groups: number of groups of channels.
      image: extent of an image along each spatial axis.
      kernel: extent of the kernel.
      output: extent of the output.
      strides: step of the kernel between neighbouring outputs.
      padding: zeros before and after an axis; negative numbers crop.
      image_dilation: distance of neighbouring image elements, the space between filled with zeros.
      kernel_dilation: distance of neighbouring kernel elements.
      images_inside: whether neighbours in memory are rather images than channels, as where JAX writes the gradient of
        a kernel: its images are the channels of the forward pass, and its channels the images.
    """

    images: int
    inputs: int
    outputs: int
    groups: int
    image: tuple[int, ...]
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    image_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    images_inside: bool = False

    @property
    def kernel_is_larger(self) -> bool:
        """Whether the kernel has more positions than the output, as in most gradients of kernels."""
        return math.prod(self.kernel) > math.prod(self.output)

    @property
    def exchanges(self) -> bool:
        """Whether `exchanged` is there and saves work: images have zeros in between, and kernels do not."""
        return any(step > 1 for step in self.image_dilation) and all(step == 1 for step in self.kernel_dilation)

    def exchanged(self) -> Geometry:
        """The same convolution with images and kernels in each other's place, whose output is reversed in space.

        Output `o` sums image element `j` times kernel element `j * image_dilation + low - o * stride`. Seen from the
        end, that is a kernel of as many elements as the image has, dilated, over an image without zeros in between:
        the gradient of a transposed convolution's kernel does a stride-th of the work along each axis.
        """
        last = [(count - 1) * stride for count, stride in zip(self.output, self.strides, strict=True)]
        before = [end - low for end, (low, _) in zip(last, self.padding, strict=True)]
        spans = [(size - 1) * step + 1 for size, step in zip(self.image, self.image_dilation, strict=True)]
        after = [end + span - size - low for end, span, size, low in zip(last, spans, self.kernel, before, strict=True)]
        return replace(
            self,
            images=self.outputs,
            outputs=self.images,
            image=self.kernel,
            kernel=self.image,
            padding=tuple(zip(before, after, strict=True)),
            image_dilation=self.kernel_dilation,
            kernel_dilation=self.image_dilation,
        )


def geometry_of(lhs: Sequence[int], rhs: Sequence[int], parameters: dict[str, Any]) -> Geometry:
    """The sizes of a convolution from the shapes of its operands and the parameters of JAX's primitive."""
    numbers = parameters["dimension_numbers"]
    feature_groups, batch_groups = parameters["feature_group_count"], parameters["batch_group_count"]
    groups = feature_groups * batch_groups  # one of the two is 1
    image, kernel = (tuple(shape[axis] for axis in spec[2:]) for shape, spec in ((lhs, numbers[0]), (rhs, numbers[1])))
    padding = tuple((int(low), int(high)) for low, high in parameters["padding"])
    image_dilation, kernel_dilation = tuple(parameters["lhs_dilation"]), tuple(parameters["rhs_dilation"])
    strides = tuple(parameters["window_strides"])
    output = tuple(
        ((size - 1) * spread + 1 + low + high - ((width - 1) * gap + 1)) // stride + 1
        for size, spread, (low, high), width, gap, stride in zip(
            image, image_dilation, padding, kernel, kernel_dilation, strides, strict=True
        )
    )
    return Geometry(
        images=lhs[numbers[0][0]] // batch_groups,
        inputs=rhs[numbers[1][1]],
        outputs=rhs[numbers[1][0]] // groups,
        groups=groups,
        image=image,
        kernel=kernel,
        output=output,
        strides=strides,
        padding=padding,
        image_dilation=image_dilation,
        kernel_dilation=kernel_dilation,
        images_inside=numbers[0][0] > numbers[0][1],
    )
