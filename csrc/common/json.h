// A small JSON reader: values as a tree, errors as FormatError with the byte they happened at.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace lbs {

class Json {
public:
    enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

    static Json parse(const std::string& text);

    Kind kind() const { return kind_; }
    bool is_null() const { return kind_ == Kind::kNull; }

    // Each raises FormatError where the value is of another kind.
    bool boolean() const;
    double number() const;
    int64_t integer() const;  // a whole number that fits
    int small() const;        // an integer that fits an int
    const std::string& string() const;
    const std::vector<Json>& array() const;
    const std::map<std::string, Json>& object() const;
    const Json& at(const std::string& key) const;    // FormatError where the key is missing
    const Json* find(const std::string& key) const;  // null where it is missing

private:
    friend class JsonParser;
    Kind kind_ = Kind::kNull;
    bool boolean_ = false;
    double number_ = 0.0;
    std::string string_;
    std::vector<Json> array_;
    std::map<std::string, Json> object_;
};

}  // namespace lbs
