#include "file/whole.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "common/json.h"
#include "file/network.h"

namespace lbs {
namespace {

const std::string& metadata_text(const std::map<std::string, std::string>& metadata, const char* key) {
    const auto found = metadata.find(key);
    require(found != metadata.end(), std::string("it lacks the text '") + key + "'; it is damaged, write it again");
    return found->second;
}

const std::string& text_of(const Json& value, const char* key, const char* owner) {
    const Json* const found = value.find(key);
    require(found && found->string(), std::string(owner) + " has no text '" + key + "'; it is damaged, write it again");
    return *found->string();
}

const Json::Array& list_of(const Json& value, const char* key, const char* owner) {
    const Json* const found = value.find(key);
    require(found && found->array(), std::string(owner) + " has no list '" + key + "'; it is damaged, write it again");
    return *found->array();
}

// Names that readers that write Python code would not take as they are stay with them.
bool is_plain_name(const std::string& name) {
    static const char* const reserved[] = {
        "False", "None",   "True",  "and",  "as",     "assert", "async", "await",    "break",  "class", "continue", "def",
        "del",   "elif",   "else",  "except", "finally", "for",  "from",  "global",   "if",     "import", "in",     "is",
        "lambda", "nonlocal", "not", "or",   "pass",   "raise",  "return", "self",     "try",    "while", "with",    "yield"};
    const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
    const auto is_part = [&](char c) { return is_letter(c) || (c >= '0' && c <= '9'); };
    return !name.empty() && is_letter(name[0]) && std::all_of(name.begin(), name.end(), is_part) &&
           std::find(std::begin(reserved), std::end(reserved), name) == std::end(reserved);
}

// The items of {"tuple": [...]}, or null.
const Json::Array* tuple(const Json* value) {
    const Json* const items = value && value->object() && value->object()->size() == 1 ? value->find("tuple") : nullptr;
    return items ? items->array() : nullptr;
}

bool is_node(const Json& value, const std::string& name) {
    const Json* const found = value.object() && value.object()->size() == 1 ? value.find("node") : nullptr;
    return found && found->string() && *found->string() == name;
}

// A node that calls `target` (null: any name) as `op` and has `count` positional arguments; they, or null.
const Json::Array* arguments(const Json& node, const char* op, const char* target, size_t count) {
    const Json *const kwargs = node.find("kwargs"), *const found_op = node.find("op"), *const found = node.find("target");
    const Json* const named = kwargs && kwargs->object() && kwargs->object()->size() == 1 ? kwargs->find("dict") : nullptr;
    if (kwargs && !(named && named->object() && named->object()->empty())) return nullptr;
    if (!found_op || !found_op->string() || *found_op->string() != op || !found || !found->string()) return nullptr;
    if (target ? *found->string() != target : !is_plain_name(*found->string())) return nullptr;
    const Json::Array* const items = tuple(node.find("args"));
    return items && items->size() == count ? items : nullptr;
}

// The output that is returned, or null where the graph is another.
const Json::Number* returned(const Json::Array& nodes) {
    if (nodes.size() != 4) return nullptr;
    std::vector<std::string> names;
    for (const Json& node : nodes) {
        const Json* const name = node.find("name");
        if (!name || !name->string() || !is_plain_name(*name->string())) return nullptr;
        if (std::find(names.begin(), names.end(), *name->string()) != names.end()) return nullptr;
        names.push_back(*name->string());
    }
    const Json::Array *const image = arguments(nodes[0], "placeholder", nullptr, 0),
                             *const call = arguments(nodes[1], "call_module", "region0", 1),
                             *const item = arguments(nodes[2], "call_function", "operator.getitem", 2),
                             *const output = arguments(nodes[3], "output", nullptr, 1);
    if (!image || !call || !item || !output) return nullptr;
    if (!is_node((*call)[0], names[0]) || !is_node((*item)[0], names[1]) || !is_node((*output)[0], names[2])) return nullptr;
    const Json::Number* const place = (*item)[1].number();
    return place && place->whole && place->integer >= 0 ? place : nullptr;
}

// Why a network is not run, in the words of who packed it.
std::string left_in_float(const Json& model) {
    std::string words;
    for (const Json& pair : list_of(model, "kept_float", "its model"))
        words += (words.empty() ? "" : "; ") + *(*pair.array())[0].string() + " (" + *(*pair.array())[1].string() + ")";
    return words;
}

Json parsed_model(const std::map<std::string, std::string>& metadata) {
    Json model = Json::parse(metadata_text(metadata, "model"), "its model");
    text_of(model, "name", "its model");
    for (const Json& pair : list_of(model, "kept_float", "its model")) {
        const bool texts = pair.array() && pair.array()->size() == 2 && (*pair.array())[0].string() && (*pair.array())[1].string();
        require(texts, "its model has a kept_float that is no list of pairs of texts; it is damaged, write it again");
    }
    return model;
}

// How many channels have a mean and a deviation.
int64_t normalized(const Json& value) {
    const char* const rule = "its model has a normalize that is not [mean, std], finite numbers, std above 0, one per channel";
    require(value.array() && value.array()->size() == 2, rule);
    for (const Json& part : *value.array()) {
        const bool is_std = &part != value.array()->data();
        require(part.array() && !part.array()->empty() && part.array()->size() == value.array()->front().array()->size(), rule);
        for (const Json& item : *part.array()) {
            const Json::Number* const number = item.number();
            require(number && std::isfinite(number->value) && (!is_std || number->value > 0), rule);
        }
    }
    return static_cast<int64_t>(value.array()->front().array()->size());
}

}  // namespace

int64_t returned_output(const std::map<std::string, std::string>& metadata) {
    const Json graph = Json::parse(metadata_text(metadata, "graph"), "its graph");
    const Json::Array& nodes = list_of(graph, "nodes", "its graph");
    const Json* const modules = graph.find("modules");
    require(modules && modules->object(), "its graph has no modules; it is damaged, write it again");
    const auto is_program = [](const auto& entry) { return entry.first.rfind("program", 0) == 0; };
    const auto programs = std::count_if(metadata.begin(), metadata.end(), is_program);
    require(programs > 0, "it holds no program");
    for (int64_t i = 0; i < programs; ++i) metadata_text(metadata, ("program" + std::to_string(i)).c_str());
    const Json::Number* const place = modules->object()->empty() && programs == 1 ? returned(nodes) : nullptr;
    if (place) return place->integer;
    const std::string kept = left_in_float(parsed_model(metadata));
    throw Unsupported("the network is not one program from its images to its result: it has " + std::to_string(programs) +
                      (programs == 1 ? " program" : " programs") + (kept.empty() ? "" : ", and in float " + kept) +
                      "; run it in Python (lbs.load), or pack it so that nothing stays in float");
}

ModelText read_model(const std::map<std::string, std::string>& metadata) {
    const Json model = parsed_model(metadata);
    ModelText result;
    for (const Json& size : list_of(model, "input_shape", "its model")) {
        const Json::Number* const number = size.number();
        require(number && number->whole && number->integer >= 1, "its model has an input size that is no positive integer");
        result.input_shape.push_back(number->integer);
    }
    const Json* const normalize = model.find("normalize");
    if (normalize && !normalize->is_null()) result.normalized_channels = normalized(*normalize);
    return result;
}

}  // namespace lbs
