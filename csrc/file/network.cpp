#include "file/network.h"

#include <cstring>

#include "common/check.h"
#include "common/format.h"
#include "common/memory.h"
#include "file/container.h"
#include "file/sha256.h"
#include "file/whole.h"
#include "file/work.h"

namespace lbs {
namespace {

constexpr char kFormat[] = "lbs-packed";
constexpr int kFileVersion = 4;
constexpr char kPrefix[] = "region0.";

int64_t aligned(int64_t bytes) { return (bytes + kBlobAlignment - 1) / kBlobAlignment * kBlobAlignment; }

std::map<std::string, const FileTensor*> arrays_of(const Container& file) {
    std::map<std::string, const FileTensor*> arrays;
    for (const auto& [name, tensor] : file.tensors)
        if (name.rfind(kPrefix, 0) == 0) arrays.emplace(name.substr(sizeof kPrefix - 1), &tensor);
    return arrays;
}

void check_arrays(const ProgramSpec& program, const std::map<std::string, const FileTensor*>& arrays) {
    require(arrays.size() == program.array_keys().size(), "the program has " + std::to_string(program.array_keys().size()) +
                                                              " arrays, the file " + std::to_string(arrays.size()));
    for (const std::string& key : program.array_keys()) {
        const ArraySpec& spec = program.array(key);
        const auto found = arrays.find(key);
        require(found != arrays.end() && found->second->dtype == (spec.dtype == "float32" ? "F32" : "I32") &&
                    found->second->shape == spec.shape,
                "array '" + key + "' is not in the file as the program needs it");
    }
}

Network::Shape shape_of(const TensorSpec& tensor, int rank) { return {rank, tensor.channels, tensor.height, tensor.width}; }

Network::Shape check_input(const ProgramSpec& program, const ModelText& model) {
    require(program.inputs.size() == 1, "its graph gives the program one image, and it takes " +
                                            std::to_string(program.inputs.size()));
    const TensorSpec& image = program.tensors[static_cast<size_t>(program.inputs[0])];
    const std::vector<int64_t> full{image.channels, image.height, image.width};
    const bool is_row = model.input_shape.size() == 1 && image.pixels() == 1 && model.input_shape[0] == image.channels;
    require(is_row || model.input_shape == full, "its model takes images of another shape than its program");
    require(image.is_bytes == (model.normalized_channels > 0),
            "its model and its program differ in whether they take bytes or floats");
    require(!image.is_bytes || model.normalized_channels == model.input_shape[0],
            "its normalize has " + std::to_string(model.normalized_channels) + " channels, its images " +
                std::to_string(model.input_shape[0]));
    return shape_of(image, static_cast<int>(model.input_shape.size()));
}

// Of images, or of what becomes of them, four bytes each: no address lies beyond an int64.
void check_bytes(int64_t elements, int64_t count) {
    int64_t bytes = 0;
    require(!__builtin_mul_overflow(elements * 4, count, &bytes),
            "count is " + std::to_string(count) + "; so many images of " + std::to_string(elements) +
                " elements have no place in any memory, run fewer at once");
}

}  // namespace

Network::Network(const std::string& path, double budget) {
    try {
        read(path, budget);
    } catch (const FormatError& error) {
        throw FileError(path + ": " + error.what());
    } catch (const Unsupported& error) {
        throw Unsupported(path + ": " + error.what());
    }
}

void Network::read(const std::string& path, double budget) {
    require(budget > 0, "budget is " + std::to_string(budget) + "; give a positive number of times what a file may cost");
    const Container file(path, kFormat, kFileVersion);
    const int64_t place = returned_output(file.metadata);
    const ModelText model = read_model(file.metadata);
    const std::string& text = file.metadata.at("program0");
    const auto arrays = arrays_of(file);
    int64_t blob_bytes = 0;
    for (const auto& [key, tensor] : arrays) blob_bytes += aligned(4 * tensor->elements);
    const ProgramSpec program(text, nullptr, blob_bytes);
    check_arrays(program, arrays);
    input_ = check_input(program, model);
    require(place < static_cast<int64_t>(program.outputs.size()), "its graph returns output " + std::to_string(place) +
                                                                       " of " + std::to_string(program.outputs.size()));
    check_work(program, budget);

    const Buffer blob(blob_bytes, 0);
    for (const std::string& key : program.array_keys()) {
        const FileTensor& tensor = *arrays.at(key);
        std::memcpy(blob.get() + program.array(key).offset, file.data.data() + tensor.begin,
                    static_cast<size_t>(tensor.end - tensor.begin));
    }
    Sha256 digest;
    digest.add(blob.get(), static_cast<size_t>(blob_bytes));
    require(digest.digest() == program.digest, "its program was packed with other arrays than it holds; write it again");

    takes_bytes_ = model.normalized_channels > 0;
    place_ = static_cast<size_t>(place);
    for (size_t i = 0; i < program.outputs.size(); ++i) {
        const TensorSpec& tensor = program.tensors[static_cast<size_t>(program.outputs[i])];
        if (i == place_) output_ = shape_of(tensor, tensor.is_flat ? 1 : 3);
        other_elements_.push_back(i == place_ ? 0 : tensor.pixels() * tensor.channels);
    }
    runner_ = std::make_unique<Runner>(text, blob.get(), blob_bytes, "auto", std::vector<std::string>());
}

void Network::run(const void* images, bool channels_last, int64_t count, int threads, float* output) const {
    require(count >= 0, "count is " + std::to_string(count) + "; it cannot be negative");
    check_bytes(input_.elements(), count);
    check_bytes(output_.elements(), count);
    for (const int64_t elements : other_elements_) check_bytes(elements, count);
    std::vector<std::vector<float>> others;
    std::vector<float*> outputs;
    for (const int64_t elements : other_elements_) outputs.push_back(others.emplace_back(elements * count).data());
    outputs[place_] = output;
    runner_->run({images}, {channels_last}, outputs, count, threads, {}, nullptr);
}

}  // namespace lbs
