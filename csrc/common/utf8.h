// Characters of UTF-8. Text that has passed `read_utf8` may be walked with `next_code_point`.
#pragma once

#include <cstdint>
#include <string>

namespace lbs {

// The code point at `at`, and moves past it. Lone surrogates, as an escape may leave them, are read as they are.
inline uint32_t next_code_point(const std::string& text, size_t& at) {
    const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[i])); };
    const uint32_t first = byte(at);
    const int more = first < 0x80 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
    uint32_t code = more == 0 ? first : first & (0x3fu >> more);
    ++at;
    for (int i = 0; i < more; ++i) code = code << 6 | (byte(at++) & 63);
    return code;
}

inline void append_utf8(std::string& out, uint32_t code) {
    if (code < 0x80) {
        out += static_cast<char>(code);
        return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    out += static_cast<char>((0xff00u >> (more + 1) & 0xff) | code >> (6 * more));
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> (6 * i) & 63));
}

// The number of characters of a text, or -1 where it is not UTF-8: a character cut off or written longer than it need
// be, a surrogate, or one beyond U+10FFFF.
inline int64_t read_utf8(const std::string& text) {
    constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    const auto is_tail = [](char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; };
    int64_t count = 0;
    for (size_t at = 0; at < text.size(); ++count) {
        const unsigned char first = static_cast<unsigned char>(text[at]);
        if (first < 0x80) {
            ++at;
            continue;
        }
        const size_t more = first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
        if (first < 0xc0 || first > 0xf4 || text.size() - at <= more) return -1;
        for (size_t i = 1; i <= more; ++i)
            if (!is_tail(text[at + i])) return -1;
        const uint32_t code = next_code_point(text, at);
        if (code < kLeast[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return -1;
    }
    return count;
}

}  // namespace lbs
