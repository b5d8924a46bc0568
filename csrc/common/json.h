// A small JSON reader: values as a tree, errors as FormatError with the byte they happened at. It accepts exactly the
// texts that Python's json does with lbs_kernels/program/text.py in front of it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace lbs {

class Json {
public:
    struct Member;
    using Array = std::vector<Json>;
    using Object = std::vector<Member>;  // in the order of the text; keys differ

    // A whole number is written without point and exponent; beyond 64 bits `integer` is the nearest one that fits.
    struct Number {
        double value;
        int64_t integer;
        bool whole;
    };

    // `what` it is, for messages. Raises FormatError.
    static Json parse(const std::string& text, const char* what = "program text");

    bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
    // Each is null where the value is of another kind.
    const bool* boolean() const { return std::get_if<bool>(&value_); }
    const Number* number() const { return std::get_if<Number>(&value_); }
    const std::string* string() const { return std::get_if<std::string>(&value_); }
    const Array* array() const { return std::get_if<Array>(&value_); }
    Array* array() { return std::get_if<Array>(&value_); }
    const Object* object() const { return std::get_if<Object>(&value_); }
    Object* object() { return std::get_if<Object>(&value_); }

    // Of an object: the value of `key`, null where there is none.
    const Json* find(const char* key) const;
    Json* find(const char* key) { return const_cast<Json*>(std::as_const(*this).find(key)); }

private:
    friend class JsonParser;
    std::variant<std::monostate, bool, Number, std::string, Array, Object> value_;
};

struct Json::Member {
    std::string key;
    Json value;
};

}  // namespace lbs
