#include "common/json.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <limits>

#include "common/check.h"
#include "common/format.h"
#include "common/rules.h"
#include "common/utf8.h"

namespace lbs {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// A float64 of a number that is too small or too large for one: 0 or infinity, with its sign.
double beyond_range(const std::string& digits) {
    // The place of the first digit that is not 0, as a power of ten; the exponent is cut where nothing else matters.
    const size_t e = std::min(digits.find_first_of("eE"), digits.size());
    const size_t first = digits.find_first_of("123456789"), point = std::min(digits.find('.'), e);
    const double sign = digits[0] == '-' ? -1.0 : 1.0;
    if (first >= e) return sign * 0.0;
    int64_t exponent = 0;
    for (size_t i = e; i < digits.size(); ++i)
        if (is_digit(digits[i])) exponent = std::min<int64_t>(exponent * 10 + (digits[i] - '0'), int64_t{1} << 40);
    if (e + 1 < digits.size() && digits[e + 1] == '-') exponent = -exponent;
    const int64_t place = exponent + static_cast<int64_t>(point) - static_cast<int64_t>(first);
    return sign * (place > 0 ? std::numeric_limits<double>::infinity() : 0.0);
}

// Not strtod, which reads a comma where the process has set such a locale.
double to_double(const std::string& digits) {
    double value = 0.0;
    const auto end = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return end.ec == std::errc::result_out_of_range ? beyond_range(digits) : value;
}

Json::Number whole_number(const std::string& digits) {
    int64_t integer = 0;
    const auto end = std::from_chars(digits.data(), digits.data() + digits.size(), integer);
    if (end.ec != std::errc::result_out_of_range) return {static_cast<double>(integer), integer, true};
    using Limits = std::numeric_limits<int64_t>;
    return {to_double(digits), digits[0] == '-' ? Limits::min() : Limits::max(), true};
}

}  // namespace

class JsonParser {
public:
    JsonParser(const std::string& text, const char* what) : text_(text), what_(what) {}

    Json parse() {
        const int64_t characters = read_utf8(text_);
        if (characters > kMaxText)
            refuse(rule::kTextSize, what_ + " has " + std::to_string(characters) + " characters; at most " +
                                        std::to_string(kMaxText) + " are read");
        if (characters < 0) fail("the text is not UTF-8");
        Json value;
        read_value(value, 0);
        skip_space();
        if (at_ != text_.size()) fail("something follows the value");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string& what) const {
        refuse(rule::kJson, what_ + " is not JSON at byte " + std::to_string(at_) + ": " + what);
    }

    void skip_space() {
        while (at_ < text_.size() &&
               (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
            ++at_;
    }

    char here() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    char peek() {
        skip_space();
        if (at_ >= text_.size()) fail("the text ends too early");
        return text_[at_];
    }

    void expect(char c) {
        if (peek() != c) fail(std::string("expected '") + c + "'");
        ++at_;
    }

    bool take_word(const char* word) {
        const size_t size = std::strlen(word);
        if (text_.compare(at_, size, word) != 0) return false;
        at_ += size;
        return true;
    }

    void read_value(Json& value, int depth) {
        const char c = peek();
        if (depth >= kMaxDepth && (c == '{' || c == '[')) fail("nested too deeply");
        if (c == '{') {
            read_object(value.value_.emplace<Json::Object>(), depth);
        } else if (c == '[') {
            read_array(value.value_.emplace<Json::Array>(), depth);
        } else if (c == '"') {
            value.value_ = read_string();
        } else if (take_word("true") || take_word("false")) {
            value.value_ = c == 't';
        } else if (!take_word("null")) {
            value.value_ = read_number();
        }
    }

    void read_object(Json::Object& object, int depth) {
        expect('{');
        if (peek() == '}') {
            ++at_;
            return;
        }
        while (true) {
            if (peek() != '"') fail("expected a key");
            object.emplace_back();
            object.back().key = read_string();
            expect(':');
            read_value(object.back().value, depth + 1);
            if (peek() == '}') break;
            expect(',');
        }
        ++at_;
        check_keys(object);
    }

    // At the end of the object, where Python looks too: what is wrong before it is told first.
    void check_keys(const Json::Object& object) const {
        std::vector<const std::string*> keys;
        keys.reserve(object.size());
        for (const Json::Member& member : object) keys.push_back(&member.key);
        std::sort(keys.begin(), keys.end(), [](const auto* a, const auto* b) { return *a < *b; });
        for (size_t i = 1; i < keys.size(); ++i)
            if (*keys[i] == *keys[i - 1])
                refuse(rule::kRepeatedKey, what_ + " repeats the key '" + *keys[i] + "' in one object");
    }

    void read_array(Json::Array& array, int depth) {
        expect('[');
        if (peek() == ']') {
            ++at_;
            return;
        }
        while (true) {
            array.emplace_back();
            read_value(array.back(), depth + 1);
            if (peek() == ']') break;
            expect(',');
        }
        ++at_;
    }

    std::string read_string() {
        std::string out;
        ++at_;
        while (true) {
            if (at_ >= text_.size()) fail("a string is not closed");
            const char c = text_[at_++];
            if (c == '"') return out;
            if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
            if (c != '\\') {
                out += c;
                continue;
            }
            if (at_ >= text_.size()) fail("a string is not closed");
            read_escape(out);
        }
    }

    void read_escape(std::string& out) {
        const char c = text_[at_++];
        switch (c) {
            case 'n': out += '\n'; return;
            case 't': out += '\t'; return;
            case 'r': out += '\r'; return;
            case 'b': out += '\b'; return;
            case 'f': out += '\f'; return;
            case '"':
            case '\\':
            case '/': out += c; return;
            case 'u': break;
            default: fail("an unknown escape");
        }
        uint32_t code = read_hex();
        // The two halves of a pair are one character; a half alone stays, and no name may hold it.
        if (code >= 0xd800 && code < 0xdc00 && text_.compare(at_, 2, "\\u") == 0) {
            const size_t second = at_;
            at_ += 2;
            const uint32_t low = read_hex();
            if (low >= 0xdc00 && low < 0xe000) code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
            else at_ = second;
        }
        append_utf8(out, code);
    }

    uint32_t read_hex() {
        uint32_t code = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char digit = here();
            if (is_digit(digit)) code = code * 16 + static_cast<uint32_t>(digit - '0');
            else if (digit >= 'a' && digit <= 'f') code = code * 16 + static_cast<uint32_t>(digit - 'a' + 10);
            else if (digit >= 'A' && digit <= 'F') code = code * 16 + static_cast<uint32_t>(digit - 'A' + 10);
            else fail("a bad \\u escape");
        }
        return code;
    }

    size_t skip_digits() {
        const size_t first = at_;
        while (is_digit(here())) ++at_;
        return at_ - first;
    }

    Json::Number read_number() {
        const size_t first = at_;
        if (here() == '-') ++at_;
        if (!is_digit(here())) fail("expected a value");
        size_t count = 1;
        if (here() == '0') ++at_;
        else count = skip_digits();
        bool whole = true;
        // As in Python, a point or an exponent without digits is not part of the number, and nothing may follow it.
        for (const char* mark : {".", "eE"}) {
            const size_t before = at_;
            if (here() == '\0' || !std::strchr(mark, here())) continue;
            ++at_;
            if (*mark == 'e' && (here() == '+' || here() == '-')) ++at_;
            if (skip_digits() == 0) at_ = before;
            else whole = false;
        }
        const std::string digits = text_.substr(first, at_ - first);
        if (!whole) return {to_double(digits), 0, false};
        if (count > kMaxDigits) fail("a whole number of more than " + std::to_string(kMaxDigits) + " digits");
        return whole_number(digits);
    }

    const std::string& text_;
    const std::string what_;
    size_t at_ = 0;
};

Json Json::parse(const std::string& text, const char* what) { return JsonParser(text, what).parse(); }

const Json* Json::find(const char* key) const {
    if (const Object* members = object())
        for (const Member& member : *members)
            if (member.key == key) return &member.value;
    return nullptr;
}

}  // namespace lbs
