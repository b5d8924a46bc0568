#include "common/json.h"

#include <cmath>
#include <cstdlib>
#include <limits>

#include "common/check.h"

namespace lbs {
namespace {

constexpr int kMaxDepth = 64;

void append_utf8(std::string& out, uint32_t code) {
    if (code < 0x80) {
        out += static_cast<char>(code);
    } else if (code < 0x800) {
        out += static_cast<char>(0xc0 | code >> 6);
        out += static_cast<char>(0x80 | (code & 63));
    } else {
        out += static_cast<char>(0xe0 | code >> 12);
        out += static_cast<char>(0x80 | (code >> 6 & 63));
        out += static_cast<char>(0x80 | (code & 63));
    }
}

}  // namespace

class JsonParser {
public:
    explicit JsonParser(const std::string& text) : text_(text) {}

    Json parse() {
        Json value = read_value(0);
        skip_space();
        if (at_ != text_.size()) fail("something follows the value");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string& what) const {
        throw FormatError("program text is not JSON at byte " + std::to_string(at_) + ": " + what);
    }

    void skip_space() {
        while (at_ < text_.size() &&
               (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
            ++at_;
    }

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
        const std::string expected(word);
        if (text_.compare(at_, expected.size(), expected) != 0) return false;
        at_ += expected.size();
        return true;
    }

    Json read_value(int depth) {
        if (depth > kMaxDepth) fail("nested too deeply");
        Json value;
        const char c = peek();
        if (c == '{') {
            read_object(value, depth);
        } else if (c == '[') {
            read_array(value, depth);
        } else if (c == '"') {
            value.kind_ = Json::Kind::kString;
            value.string_ = read_string();
        } else if (take_word("true") || take_word("false")) {
            value.kind_ = Json::Kind::kBool;
            value.boolean_ = c == 't';
        } else if (!take_word("null")) {
            value.kind_ = Json::Kind::kNumber;
            value.number_ = read_number();
        }
        return value;
    }

    void read_object(Json& value, int depth) {
        value.kind_ = Json::Kind::kObject;
        expect('{');
        if (peek() == '}') {
            ++at_;
            return;
        }
        while (true) {
            if (peek() != '"') fail("expected a key");
            std::string key = read_string();
            expect(':');
            if (!value.object_.emplace(std::move(key), read_value(depth + 1)).second) fail("a key is repeated");
            if (peek() == '}') break;
            expect(',');
        }
        ++at_;
    }

    void read_array(Json& value, int depth) {
        value.kind_ = Json::Kind::kArray;
        expect('[');
        if (peek() == ']') {
            ++at_;
            return;
        }
        while (true) {
            value.array_.push_back(read_value(depth + 1));
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
        if (at_ + 4 > text_.size()) fail("a string is not closed");
        uint32_t code = 0;
        for (int i = 0; i < 4; ++i) {
            const char digit = text_[at_++];
            if (digit >= '0' && digit <= '9') code = code * 16 + static_cast<uint32_t>(digit - '0');
            else if (digit >= 'a' && digit <= 'f') code = code * 16 + static_cast<uint32_t>(digit - 'a' + 10);
            else if (digit >= 'A' && digit <= 'F') code = code * 16 + static_cast<uint32_t>(digit - 'A' + 10);
            else fail("a bad \\u escape");
        }
        append_utf8(out, code);  // surrogate halves stay apart: names are only compared and printed
    }

    double read_number() {
        const char* begin = text_.c_str() + at_;
        if (*begin != '-' && (*begin < '0' || *begin > '9')) fail("expected a value");
        char* end = nullptr;
        const double number = std::strtod(begin, &end);
        if (end == begin || !std::isfinite(number)) fail("expected a finite number");
        at_ += static_cast<size_t>(end - begin);
        return number;
    }

    const std::string& text_;
    size_t at_ = 0;
};

Json Json::parse(const std::string& text) { return JsonParser(text).parse(); }

bool Json::boolean() const {
    require(kind_ == Kind::kBool, "program text: expected true or false");
    return boolean_;
}

double Json::number() const {
    require(kind_ == Kind::kNumber, "program text: expected a number");
    return number_;
}

int64_t Json::integer() const {
    const double value = number();
    require(value == std::floor(value) && std::fabs(value) < 9007199254740992.0,
            "program text: expected a whole number");
    return static_cast<int64_t>(value);
}

int Json::small() const {
    const int64_t value = integer();
    require(std::llabs(value) <= std::numeric_limits<int>::max(), "program text: a number is out of range");
    return static_cast<int>(value);
}

const std::string& Json::string() const {
    require(kind_ == Kind::kString, "program text: expected a string");
    return string_;
}

const std::vector<Json>& Json::array() const {
    require(kind_ == Kind::kArray, "program text: expected a list");
    return array_;
}

const std::map<std::string, Json>& Json::object() const {
    require(kind_ == Kind::kObject, "program text: expected an object");
    return object_;
}

const Json* Json::find(const std::string& key) const {
    const auto& entries = object();
    const auto found = entries.find(key);
    return found == entries.end() ? nullptr : &found->second;
}

const Json& Json::at(const std::string& key) const {
    const Json* found = find(key);
    if (!found) throw FormatError("program text lacks the key '" + key + "'");
    return *found;
}

}  // namespace lbs
