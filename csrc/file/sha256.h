// SHA-256 (FIPS 180-4), as files and blobs are sealed with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lbs {

class Sha256 {
public:
    void add(const void* bytes, size_t count);
    // The 64 hexadecimal digits; nothing is added after them.
    std::string digest();

private:
    void take(const unsigned char* block);

    uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                          0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    unsigned char rest_[64] = {};
    size_t held_ = 0;     // bytes of rest_
    uint64_t count_ = 0;  // bytes of all
};

}  // namespace lbs
