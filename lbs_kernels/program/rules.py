"""The limits of a program, and the rules it keeps: one name for each, which Python and C++ put on what they refuse.

Both readers follow the rules in the order of this table within their part, so that they name the same rule first.
`program/schema.py` writes the names and the limits for C++.
"""

from __future__ import annotations

MAX_TEXT = 1 << 26  # characters; a ResNet-50 has about 10^5
MAX_DEPTH = 64  # lists and objects inside one another; a program needs 7
MAX_DIGITS = 4300  # of a whole number; what Python reads unless it is told otherwise
MAX_COUNT = 1 << 16  # tensors, steps, arrays
MAX_SIZE = 1 << 24  # one dimension; float32 counts exactly this far
MAX_ELEMENTS = 1 << 28  # one tensor of one image, padding included
MAX_NAME = 256

# Controls, formats, spaces but U+0020, surrogates, private use: what Unicode 14 calls other or separator, with the
# unassigned code points between them. str.isprintable also refuses what its Python's Unicode has not assigned yet, so
# that a file could be read by one Python and not by another, and by C++ not at all the same.
NOT_PRINTABLE = (
    (0x0, 0x1F),
    (0x7F, 0xA0),
    (0xAD, 0xAD),
    (0x600, 0x605),
    (0x61C, 0x61C),
    (0x6DD, 0x6DD),
    (0x70F, 0x70F),
    (0x890, 0x891),
    (0x8E2, 0x8E2),
    (0x1680, 0x1680),
    (0x180E, 0x180E),
    (0x2000, 0x200F),
    (0x2028, 0x202F),
    (0x205F, 0x206F),
    (0x3000, 0x3000),
    (0xD800, 0xF8FF),
    (0xFEFF, 0xFEFF),
    (0xFFF0, 0xFFFB),
    (0xFFFE, 0xFFFF),
    (0x110BD, 0x110BD),
    (0x110CD, 0x110CD),
    (0x13430, 0x1343F),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE00FF),
    (0xF0000, 0x10FFFF),
)

READING = {
    "text-size": "a text has at most MAX_TEXT characters",
    "json": "a text is JSON in UTF-8, at most MAX_DEPTH deep, with whole numbers of at most MAX_DIGITS digits",
    "repeated-key": "the keys of an object differ",
    "version": "the version is one this library reads",
    "type": "a value is of the type of its field; a whole number is written without point and exponent",
    "unknown-key": "an object has no keys but those of its record",
    "missing-key": "an object has the keys that have no default",
    "choice": "a word is one of those its field knows",
    "items": "a pair has two items",
    "finite": "a number is within the range of a float64",
    "op": "a step's op is one this library runs",
}
CHECKING = {
    "count": "there are at most MAX_COUNT tensors, steps and arrays",
    "stream-dtype": "streams are float32, float16 or bfloat16",
    "digest": "a digest is 64 hexadecimal digits, or nothing",
    "name": "a name has 1 to MAX_NAME characters, none of them in NOT_PRINTABLE",
    "size": "channels, height and width are 1 to MAX_SIZE",
    "elements": "a tensor has at most MAX_ELEMENTS elements per image",
    "bits": "codes have 1 to MAX_BITS bits",
    "zero": "the zero of codes is a code",
    "signed-zero": "signed codes have no zero",
    "codes-only": "only codes have bits, a zero or a sign",
    "image-dtype": "only images have a dtype",
    "flat": "only a stream of one pixel is flat",
    "version-1": "version 1 has neither images of bytes nor a multiplier of quantpack",
    "version-2": "versions 1 and 2 have the odd grid of weights only, and no activations, gates, averages, selections",
    "version-3": "versions 1 to 3 have no interpolation and no selections that move pixels",
    "version-4": "versions 1 to 4 have no steps of codes, so no residuals of codes",
    "array-dtype": "arrays are float32 or int32",
    "array-shape": "an array has 1 to 4 sizes of 1 to MAX_SIZE",
    "array-place": "an array starts at a multiple of BLOB_ALIGNMENT and ends inside the blob",
}
WALKING = {
    "tensor-number": "a tensor that is named exists",
    "input-form": "a program is given images",
    "written-twice": "a tensor is written once",
    "read-unwritten": "a tensor is written before it is read",
    "form": "a step reads and writes tensors of the forms it is defined on",
    "shape": "a tensor has the shape its step computes",
    "affine-pair": "a quantpack has both multiplier and bias, or none",
    "array-missing": "an array that is named exists",
    "array-kind": "an array has the dtype and shape its step needs",
    "window": "kernel, stride and dilation are 1 to MAX_SIZE",
    "padding": "padding is 0 to the extent of the kernel, of pooling to half of the kernel",
    "signed-padding": "signed codes are not padded",
    "padded-elements": "an input has at most MAX_ELEMENTS elements per image with its padding",
    "one-pixel": "a linear step reads one pixel",
    "weight-bits": "weights have 1 to MAX_BITS bits",
    "groups": "groups divide the channels",
    "filter-groups": "groups divide the filters",
    "total-filters": "there are at least as many filters before pruning as after it",
    "accumulator": "the sum of a layer fits 32 bits",
    "output-pixels": "a window yields at least one pixel",
    "mean-window": "a mean is global and unpadded",
    "select-inputs": "a selection has an input, and inputs of one form",
    "select-channels": "a selection takes channels that its inputs have, of at most MAX_SIZE",
    "repeat": "the image that is written has a size of 1 to MAX_SIZE, a whole multiple of every input's",
    "select-size": "what moves pixels has a size, block and stride of 1 to MAX_SIZE, blocks within the size, no repeat",
    "select-window": "what moves pixels has a top and left for each input or for none, as many channels at each place "
    "of a block, and reads pixels that its inputs have",
    "resize": "interpolation writes an image of 1 to MAX_SIZE, and goes through its input by positive scales",
    "codes-unchanged": "codes that pass unchanged have one consumer, of their kind and without a norm, nothing else",
    "activation-value": "the value of elu and leaky_relu is exact in float32, other activations have 0",
    "activation-slope": "prelu has a slope, other activations have none",
    "bound": "low and high are exact in float32",
    "clamp": "low is at most high",
    "writes-nothing": "a step writes a stream or codes",
    "code-kind": "a consumer has the bits, zero and sign of its tensor",
    "scale": "a scale is positive and exact in float32",
    "code-step": "a step is positive and exact in float32, of unsigned codes of MAX_BITS bits that are there",
    "norm-pair": "a consumer has both pre_scale and pre_bias, or none",
    "output-form": "a program returns streams",
    "outputs": "a program returns at least one tensor, each once",
    "never-written": "every tensor is written",
    "unused-bits": "bits beyond the last channel of a plane are 0",
}
RULES = READING | CHECKING | WALKING
