#include "program/conform.h"

#include <cmath>
#include <string>

#include "common/check.h"
#include "common/rules.h"
#include "program/schema.h"

namespace lbs {
namespace {

using schema::Count;
using schema::Field;
using schema::Kind;
using schema::Record;

// Where a value is, put into words only for an error: `program.steps[3].emit.low`.
struct Place {
    const Place* outer;
    std::string name;

    std::string text() const { return (outer ? outer->text() : "") + name; }
};

[[noreturn]] void refuse_at(const Place& place, const char* rule, const std::string& message) {
    refuse(rule, place.text() + " " + message);
}

// `tag`: a key that is no field and was read before, or null.
void read_record(Json& value, const Record& record, const Place& place, const char* tag = nullptr);

const Field* find_field(const Record& record, const std::string& key) {
    for (size_t i = 0; i < record.count; ++i)
        if (key == record.fields[i].name) return &record.fields[i];
    return nullptr;
}

Json::Object& expect_object(Json& value, const Place& place) {
    if (!value.object()) refuse_at(place, rule::kType, "is not an object");
    return *value.object();
}

void read_choice(const Json& value, const Field& field, const Place& place) {
    std::string known;
    for (const char* const* choice = field.choices; *choice; ++choice) {
        if (value.string() && *value.string() == *choice) return;
        known += (known.empty() ? "" : ", ") + std::string(*choice);
    }
    refuse_at(place, rule::kChoice, "is none of " + known);
}

void read_step(Json& value, const Place& place) {
    expect_object(value, place);
    const Json* op = value.find("op");
    for (const schema::StepRecord& step : schema::kSteps)
        if (op && op->string() && *op->string() == step.op) return read_record(value, *step.record, place, "op");
    refuse_at(place, rule::kOp, "has an op that this library does not run");
}

void read_one(Json& value, const Field& field, const Place& place) {
    switch (field.kind) {
        case Kind::kInt:
            if (!value.number() || !value.number()->whole) refuse_at(place, rule::kType, "is not a whole number");
            return;
        case Kind::kNumber:
            if (!value.number()) refuse_at(place, rule::kType, "is not a number");
            if (!std::isfinite(value.number()->value)) refuse_at(place, rule::kFinite, "is not finite");
            return;
        case Kind::kBool:
            if (!value.boolean()) refuse_at(place, rule::kType, "is neither true nor false");
            return;
        case Kind::kText:
            if (!value.string()) refuse_at(place, rule::kType, "is not a string");
            return;
        case Kind::kChoice: return read_choice(value, field, place);
        case Kind::kRecord: return read_record(value, *field.record, place);
        case Kind::kStep: return read_step(value, place);
    }
}

void read_field(Json& value, const Field& field, const Place& place) {
    if (field.nullable && value.is_null()) return;
    if (field.count == Count::kOne) return read_one(value, field, place);
    if (field.count == Count::kMap) {
        for (Json::Member& member : expect_object(value, place))
            read_one(member.value, field, {&place, "['" + member.key + "']"});
        return;
    }
    Json::Array* items = value.array();
    if (!items) refuse_at(place, rule::kType, "is not a list");
    if (field.count == Count::kPair && items->size() != 2)
        refuse_at(place, rule::kItems, "has " + std::to_string(items->size()) + " items; expected 2");
    for (size_t i = 0; i < items->size(); ++i) read_one((*items)[i], field, {&place, "[" + std::to_string(i) + "]"});
}

void read_record(Json& value, const Record& record, const Place& place, const char* tag) {
    Json::Object& object = expect_object(value, place);
    for (const Json::Member& member : object)
        if (!find_field(record, member.key) && !(tag && member.key == tag))
            refuse_at(place, rule::kUnknownKey, "has an unknown key '" + member.key + "'");
    for (size_t i = 0; i < record.count; ++i) {
        const Field& field = record.fields[i];
        if (Json* found = value.find(field.name)) {
            read_field(*found, field, {&place, std::string(".") + field.name});
        } else {
            if (!field.fallback) refuse_at(place, rule::kMissingKey, "lacks the key '" + std::string(field.name) + "'");
            object.push_back({field.name, Json::parse(field.fallback)});
        }
    }
}

}  // namespace

void conform(Json& body, const Record& record) { read_record(body, record, {nullptr, "program"}); }

}  // namespace lbs
