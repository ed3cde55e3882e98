"""Fields: the source, shape, dtype and interpolation of each array of a batch."""

from typing import Literal, NamedTuple, get_args

from PIL import Image

Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}


class Field(NamedTuple):
    """An array of a batch."""

    name: str
    source: str  # key of the example that it is computed from, "" for none
    shape: tuple[int, ...]  # per example: (height, width, channels) of an image, () of a number,
    # (height, width) of a mask
    dtype: str
    interpolation: Interpolation | Literal[""] = ""  # how an image is resized, "" for no image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image field."""
        return self.shape[0], self.shape[1]


def fields_of(
    *,
    size: int | tuple,
    tokenizer_size: int | tuple,
    channels: int,
    dtype: str,
    interpolation: Interpolation,
    labeled: bool,
    segmentation: str = "",
) -> tuple[Field, ...]:
    """Returns the fields of a data set.

    `image`; with a `tokenizer_size`, `tokenizer_image`, the same crop at that size (BEiT,
    appendix); with a type of masks, `segmentation`, the class of each pixel; with labels, `label`;
    `index`, the example's place in the global batch or in the split; `valid`, 1 for an example and
    0 for padding.
    """

    def image(name: str, size: int | tuple, interpolation: Interpolation) -> Field:
        height, width = (size, size) if isinstance(size, int) else size
        return Field(name, "image", (height, width, channels), dtype, interpolation)

    fields = [image("image", size, interpolation)]
    if tokenizer_size:
        fields.append(image("tokenizer_image", tokenizer_size, "lanczos"))
    if segmentation:
        fields.append(Field("segmentation", "mask", fields[0].size, segmentation, "nearest"))
    if labeled:
        fields.append(Field("label", "label", (), "int32"))
    return *fields, Field("index", "", (), "int32"), Field("valid", "", (), "float32")
