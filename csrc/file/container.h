// A safetensors file with a digest over every byte: mirrors lbs/packing/container.py, whose docstring has the layout.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace lbs {

struct FileTensor {
    std::string dtype;
    std::vector<int64_t> shape;
    int64_t elements = 0;
    int64_t begin = 0, end = 0;  // bytes of Container::data
};

// Reads a file whose metadata say `format` = kind and a `version` of 1 to the one given. Nothing is allocated from a
// number of the file before the file's own size has been compared with it.
struct Container {
    // Raises FormatError: missing, truncated, damaged, foreign, of a newer version, or claiming what it does not hold.
    Container(const std::string& path, const std::string& kind, int version);

    std::map<std::string, FileTensor> tensors;
    std::map<std::string, std::string> metadata;
    std::vector<unsigned char> data;
};

}  // namespace lbs
