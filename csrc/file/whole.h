// The texts beside the program in a packed file: whether the network is one program, and what it says of its images.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace lbs {

// Which of the program's outputs a network returns whose graph is its images, one program and one output of it. Raises
// FormatError for a text that is no graph, Unsupported for every other graph.
int64_t returned_output(const std::map<std::string, std::string>& metadata);

struct ModelText {
    std::vector<int64_t> input_shape;
    int64_t normalized_channels = 0;  // 0: the network takes floats, normalised
};

// Raises FormatError.
ModelText read_model(const std::map<std::string, std::string>& metadata);

}  // namespace lbs
