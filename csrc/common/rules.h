// Written by `python -m lbs_kernels.program.schema`; change what it reads and run it again.
#pragma once

namespace lbs {
namespace rule {

// a text has at most MAX_TEXT characters
constexpr char kTextSize[] = "text-size";
// a text is JSON in UTF-8, at most MAX_DEPTH deep, with whole numbers of at most MAX_DIGITS digits
constexpr char kJson[] = "json";
// the keys of an object differ
constexpr char kRepeatedKey[] = "repeated-key";
// the version is one this library reads
constexpr char kVersion[] = "version";
// a value is of the type of its field; a whole number is written without point and exponent
constexpr char kType[] = "type";
// an object has no keys but those of its record
constexpr char kUnknownKey[] = "unknown-key";
// an object has the keys that have no default
constexpr char kMissingKey[] = "missing-key";
// a word is one of those its field knows
constexpr char kChoice[] = "choice";
// a pair has two items
constexpr char kItems[] = "items";
// a number is within the range of a float64
constexpr char kFinite[] = "finite";
// a step's op is one this library runs
constexpr char kOp[] = "op";
// there are at most MAX_COUNT tensors, steps and arrays
constexpr char kCount[] = "count";
// streams are float32, float16 or bfloat16
constexpr char kStreamDtype[] = "stream-dtype";
// a digest is 64 hexadecimal digits, or nothing
constexpr char kDigest[] = "digest";
// a name has 1 to MAX_NAME characters, none of them in NOT_PRINTABLE
constexpr char kName[] = "name";
// channels, height and width are 1 to MAX_SIZE
constexpr char kSize[] = "size";
// a tensor has at most MAX_ELEMENTS elements per image
constexpr char kElements[] = "elements";
// codes have 1 to MAX_BITS bits
constexpr char kBits[] = "bits";
// the zero of codes is a code
constexpr char kZero[] = "zero";
// signed codes have no zero
constexpr char kSignedZero[] = "signed-zero";
// only codes have bits, a zero or a sign
constexpr char kCodesOnly[] = "codes-only";
// only images have a dtype
constexpr char kImageDtype[] = "image-dtype";
// only a stream of one pixel is flat
constexpr char kFlat[] = "flat";
// version 1 has neither images of bytes nor a multiplier of quantpack
constexpr char kVersion1[] = "version-1";
// versions 1 and 2 have the odd grid of weights only, and no activations, gates, averages, selections
constexpr char kVersion2[] = "version-2";
// versions 1 to 3 have no interpolation and no selections that move pixels
constexpr char kVersion3[] = "version-3";
// versions 1 to 4 have no steps of codes, so no residuals of codes
constexpr char kVersion4[] = "version-4";
// arrays are float32 or int32
constexpr char kArrayDtype[] = "array-dtype";
// an array has 1 to 4 sizes of 1 to MAX_SIZE
constexpr char kArrayShape[] = "array-shape";
// an array starts at a multiple of BLOB_ALIGNMENT and ends inside the blob
constexpr char kArrayPlace[] = "array-place";
// a tensor that is named exists
constexpr char kTensorNumber[] = "tensor-number";
// a program is given images
constexpr char kInputForm[] = "input-form";
// a tensor is written once
constexpr char kWrittenTwice[] = "written-twice";
// a tensor is written before it is read
constexpr char kReadUnwritten[] = "read-unwritten";
// a step reads and writes tensors of the forms it is defined on
constexpr char kForm[] = "form";
// a tensor has the shape its step computes
constexpr char kShape[] = "shape";
// a quantpack has both multiplier and bias, or none
constexpr char kAffinePair[] = "affine-pair";
// an array that is named exists
constexpr char kArrayMissing[] = "array-missing";
// an array has the dtype and shape its step needs
constexpr char kArrayKind[] = "array-kind";
// kernel, stride and dilation are 1 to MAX_SIZE
constexpr char kWindow[] = "window";
// padding is 0 to the extent of the kernel, of pooling to half of the kernel
constexpr char kPadding[] = "padding";
// signed codes are not padded
constexpr char kSignedPadding[] = "signed-padding";
// an input has at most MAX_ELEMENTS elements per image with its padding
constexpr char kPaddedElements[] = "padded-elements";
// a linear step reads one pixel
constexpr char kOnePixel[] = "one-pixel";
// weights have 1 to MAX_BITS bits
constexpr char kWeightBits[] = "weight-bits";
// groups divide the channels
constexpr char kGroups[] = "groups";
// groups divide the filters
constexpr char kFilterGroups[] = "filter-groups";
// there are at least as many filters before pruning as after it
constexpr char kTotalFilters[] = "total-filters";
// the sum of a layer fits 32 bits
constexpr char kAccumulator[] = "accumulator";
// a window yields at least one pixel
constexpr char kOutputPixels[] = "output-pixels";
// a mean is global and unpadded
constexpr char kMeanWindow[] = "mean-window";
// a selection has an input, and inputs of one form
constexpr char kSelectInputs[] = "select-inputs";
// a selection takes channels that its inputs have, of at most MAX_SIZE
constexpr char kSelectChannels[] = "select-channels";
// the image that is written has a size of 1 to MAX_SIZE, a whole multiple of every input's
constexpr char kRepeat[] = "repeat";
// what moves pixels has a size, block and stride of 1 to MAX_SIZE, blocks within the size, no repeat
constexpr char kSelectSize[] = "select-size";
// what moves pixels has a top and left for each input or for none, as many channels at each place of a block, and reads pixels that its inputs have
constexpr char kSelectWindow[] = "select-window";
// interpolation writes an image of 1 to MAX_SIZE, and goes through its input by positive scales
constexpr char kResize[] = "resize";
// codes that pass unchanged have one consumer, of their kind and without a norm, nothing else
constexpr char kCodesUnchanged[] = "codes-unchanged";
// the value of elu and leaky_relu is exact in float32, other activations have 0
constexpr char kActivationValue[] = "activation-value";
// prelu has a slope, other activations have none
constexpr char kActivationSlope[] = "activation-slope";
// low and high are exact in float32
constexpr char kBound[] = "bound";
// low is at most high
constexpr char kClamp[] = "clamp";
// a step writes a stream or codes
constexpr char kWritesNothing[] = "writes-nothing";
// a consumer has the bits, zero and sign of its tensor
constexpr char kCodeKind[] = "code-kind";
// a scale is positive and exact in float32
constexpr char kScale[] = "scale";
// a step is positive and exact in float32, of unsigned codes of MAX_BITS bits that are there
constexpr char kCodeStep[] = "code-step";
// a consumer has both pre_scale and pre_bias, or none
constexpr char kNormPair[] = "norm-pair";
// a program returns streams
constexpr char kOutputForm[] = "output-form";
// a program returns at least one tensor, each once
constexpr char kOutputs[] = "outputs";
// every tensor is written
constexpr char kNeverWritten[] = "never-written";
// bits beyond the last channel of a plane are 0
constexpr char kUnusedBits[] = "unused-bits";

}  // namespace rule
}  // namespace lbs
