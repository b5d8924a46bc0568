#include "file/container.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "common/json.h"
#include "file/sha256.h"

namespace lbs {
namespace {

constexpr int64_t kMaxHeader = 1 << 24;  // as in container.py, like what follows
constexpr size_t kMaxTensors = 1 << 16;
constexpr size_t kMaxRank = 8;
constexpr int64_t kMaxSide = int64_t{1} << 40;
constexpr int64_t kLengthBytes = 8;
constexpr char kMeta[] = "__metadata__";

int64_t element_bytes(const std::string& dtype) {
    static const std::map<std::string, int64_t> sizes{{"F64", 8}, {"I64", 8}, {"F32", 4},  {"I32", 4}, {"F16", 2},
                                                      {"BF16", 2}, {"I16", 2}, {"U8", 1},  {"I8", 1},  {"BOOL", 1},
                                                      {"C64", 8}, {"U16", 2}, {"U32", 4}, {"U64", 8}};
    const auto found = sizes.find(dtype);
    return found == sizes.end() ? 0 : found->second;
}

// A regular file, opened for reading: a pipe would be waited for, a device may never end.
class File {
public:
    explicit File(const std::string& path) : handle_(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {
        require(handle_ >= 0, std::string("it cannot be read: ") + std::strerror(errno));
        struct stat found {};
        const bool known = fstat(handle_, &found) == 0;
        if (!known || !S_ISREG(found.st_mode)) {
            close(handle_);
            require(false, "it is no regular file; only such are read");
        }
        size_ = found.st_size;
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() { close(handle_); }

    int64_t size() const { return size_; }

    // Exactly `count` bytes, which are no more than the file's size says are left.
    void read_into(void* to, int64_t count) {
        char* at = static_cast<char*>(to);
        while (count > 0) {
            const ssize_t got = read(handle_, at, static_cast<size_t>(std::min(count, int64_t{1} << 30)));
            if (got < 0 && errno == EINTR) continue;
            require(got > 0, got < 0 ? std::string("it cannot be read: ") + std::strerror(errno)
                                     : "it became shorter while it was read");
            at += got;
            count -= got;
        }
    }

private:
    int handle_;
    int64_t size_ = 0;
};

[[noreturn]] void refuse_tensor(const std::string& name, const std::string& what) {
    throw FormatError("tensor '" + name + "' " + what + "; it is truncated or damaged, copy it again");
}

// The product of the sizes; zeros count as 1 where they are `skipped`. Refuses 2^63 and more.
int64_t product(const std::string& name, const std::vector<int64_t>& shape, bool skipped) {
    int64_t total = 1;
    for (const int64_t size : shape) {
        if (skipped && size == 0) continue;
        if (__builtin_mul_overflow(total, size, &total)) refuse_tensor(name, "has no legal shape");
    }
    return total;
}

FileTensor read_tensor(const std::string& name, const Json& entry, int64_t expected, int64_t data_bytes) {
    const Json *const dtype = entry.find("dtype"), *const shape = entry.find("shape"),
                      *const offsets = entry.find("data_offsets");
    if (!dtype || !shape || !offsets || entry.object()->size() != 3) refuse_tensor(name, "lacks dtype, shape or offsets");
    FileTensor tensor;
    if (dtype->string()) tensor.dtype = *dtype->string();
    const int64_t element = element_bytes(tensor.dtype);
    if (element == 0) refuse_tensor(name, "has a dtype that is not known");
    if (!shape->array() || shape->array()->size() > kMaxRank) refuse_tensor(name, "has no legal shape");
    for (const Json& size : *shape->array()) {
        const Json::Number* number = size.number();
        if (!number || !number->whole || number->integer < 0 || number->integer >= kMaxSide)
            refuse_tensor(name, "has no legal shape");
        tensor.shape.push_back(number->integer);
    }
    product(name, tensor.shape, true);
    tensor.elements = product(name, tensor.shape, false);
    tensor.begin = expected;
    if (tensor.elements > (data_bytes - expected) / element) refuse_tensor(name, "claims more bytes than the file has");
    tensor.end = expected + tensor.elements * element;
    const Json::Array* ends = offsets->array();
    const auto is = [](const Json& value, int64_t wanted) {
        return value.number() && value.number()->whole && value.number()->integer == wanted;
    };
    if (!ends || ends->size() != 2 || !is((*ends)[0], tensor.begin) || !is((*ends)[1], tensor.end))
        refuse_tensor(name, "does not lie behind the one before it");
    return tensor;
}

void check_kind(const std::map<std::string, std::string>& metadata, const std::string& kind, int version) {
    const auto text = [&](const char* key) {
        const auto found = metadata.find(key);
        return found == metadata.end() ? std::string() : found->second;
    };
    require(text("format") == kind, "it has format '" + text("format") + "', expected '" + kind + "'");
    const std::string found = text("version");
    const bool digits = !found.empty() && found.size() <= 9 &&
                        std::all_of(found.begin(), found.end(), [](char c) { return c >= '0' && c <= '9'; });
    require(digits && std::stoi(found) >= 1, "it has version '" + found.substr(0, 20) + "', which is none; copy it again");
    require(std::stoi(found) <= version, "it has version " + found + "; this library reads 1 to " +
                                             std::to_string(version) + ": update it");
}

void check_digest(const std::string& head, const std::vector<unsigned char>& data, const std::string& digest) {
    const std::string entry = "\"digest\":\"" + digest + '"';
    const size_t at = head.find(entry);
    require(at != std::string::npos && head.find(entry, at + 1) == std::string::npos,
            "it has no legible digest; it is damaged, copy it again");
    std::string blank = head;
    blank.replace(at, entry.size(), "\"digest\":\"" + std::string(64, '0') + '"');
    Sha256 total;
    total.add(blank.data(), blank.size());
    total.add(data.data(), data.size());
    require(total.digest() == digest, "its bytes do not match its digest; it is damaged, copy it again");
}

}  // namespace

Container::Container(const std::string& path, const std::string& kind, int version) {
    File file(path);
    std::string head(static_cast<size_t>(std::min(file.size(), kLengthBytes)), '\0');
    file.read_into(head.data(), static_cast<int64_t>(head.size()));
    uint64_t claimed = 0;
    for (size_t i = head.size(); i-- > 0;) claimed = claimed << 8 | static_cast<unsigned char>(head[i]);
    const int64_t behind = file.size() - kLengthBytes;
    require(behind >= 0 && claimed <= static_cast<uint64_t>(behind),
            "it has " + std::to_string(file.size()) + " bytes and claims a header of " + std::to_string(claimed) +
                "; it is truncated or no packed network: copy it again");
    const auto length = static_cast<int64_t>(claimed);
    require(length <= kMaxHeader, "it claims a header of " + std::to_string(length) + " bytes; at most " +
                                      std::to_string(kMaxHeader) + " are read");
    std::string text(static_cast<size_t>(length), '\0');
    file.read_into(text.data(), length);
    const Json header = Json::parse(text, "its header");
    const Json* const meta = header.find(kMeta);
    require(meta && meta->object(), "it is no packed network, its header has no metadata");
    for (const Json::Member& member : *meta->object()) {
        require(member.value.string() != nullptr, "its metadata are not texts");
        metadata.emplace(member.key, *member.value.string());
    }
    require(header.object()->size() <= kMaxTensors + 1, "it claims more than " + std::to_string(kMaxTensors) + " tensors");
    check_kind(metadata, kind, version);
    const int64_t data_bytes = behind - length;
    int64_t expected = 0;
    for (const Json::Member& member : *header.object()) {
        if (member.key == kMeta) continue;
        const FileTensor tensor = read_tensor(member.key, member.value, expected, data_bytes);
        expected = tensor.end;
        tensors.emplace(member.key, tensor);
    }
    require(expected == data_bytes, "it holds " + std::to_string(data_bytes) + " bytes of data, its header " +
                                        std::to_string(expected) + "; copy it again");
    data.resize(static_cast<size_t>(data_bytes));
    file.read_into(data.data(), data_bytes);
    check_digest(head + text, data, metadata["digest"]);
}

}  // namespace lbs
