// Contract: json_reader.h.
#include "json_reader.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <unordered_set>
#include <utility>

#define JSON_DIAGNOSTIC_POSITIONS 1  // where each value starts in the text
#define JSON_NO_IO
#include <nlohmann/json.hpp>

#include "halfstep/status.h"

namespace halfstep {
namespace {

using Json = nlohmann::ordered_json;

const Json& json(const void* value) {
  return *static_cast<const Json*>(value);
}

// The characters of a text, which note how far they have been read: the parser tells its callback no position.
struct Reading {
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  const char* place;
  const char** furthest;

  reference operator*() const { return *place; }
  Reading& operator++() {
    *furthest = ++place;
    return *this;
  }
  bool operator==(const Reading& other) const { return place == other.place; }
};

// nlohmann's messages begin with [json.exception...] and, of what does not parse, with a place.
std::string without_prefix(std::string what, std::string_view end_of_prefix) {
  const auto place = what.find(end_of_prefix);
  return what.substr(place == std::string::npos ? 0 : place + end_of_prefix.size());
}

std::string in_quotes(std::string_view text) {
  return detail::concatenate("'", text.size() > 60 ? std::string(text.substr(0, 60)) + "..." : std::string(text), "'");
}

}  // namespace

struct JsonDocument::Value {
  Json json;
};

JsonDocument::JsonDocument(std::string_view text, std::string_view source, const JsonLimits& limits)
    : text_(text), source_(source), value_(std::make_unique<Value>()) {
  HS_CHECK(text.size() <= limits.bytes, source_, ": has ", text.size(), " bytes, expected at most ", limits.bytes);
  if (const auto nul = text_.find('\0'); nul != std::string::npos) fail(nul, "", "has a NUL character");
  const char* read = text_.data();
  const auto fail_here = [&](std::string_view what) {
    fail(static_cast<std::size_t>(std::max<std::ptrdiff_t>(read - text_.data() - 1, 0)), "", what);
  };
  // A value takes some bytes of text and many more of memory; those of a policy or plan are never this short.
  const std::size_t most_values = 64 + text_.size() / 8;
  std::size_t values = 0;
  std::vector<std::unordered_set<std::string>> keys;  // of the open objects
  const auto visit = [&](int depth, Json::parse_event_t event, Json& parsed) {
    using Event = Json::parse_event_t;
    const bool opens = event == Event::object_start || event == Event::array_start;
    if (opens && static_cast<std::size_t>(depth) >= limits.depth)
      fail_here(detail::concatenate("is nested deeper than ", limits.depth, " levels"));
    if ((opens || event == Event::value) && ++values > most_values)
      fail_here("has too many values for a policy or a plan");
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key) {
      const auto key = parsed.get<std::string>();
      if (!keys.back().insert(key).second)
        fail_here(detail::concatenate("an object has the key ", in_quotes(key), " twice"));
    }
    return true;
  };
  try {
    const char* const end = text_.data() + text_.size();
    value_->json = Json::parse(Reading{read, &read}, Reading{end, &read}, visit);
  } catch (const Json::parse_error& error) {
    fail(error.byte > 0 ? error.byte - 1 : 0, "", "is not JSON: " + without_prefix(error.what(), ": "));
  } catch (const Json::exception& error) {
    fail_here(without_prefix(error.what(), "] "));
  }
}
JsonDocument::~JsonDocument() = default;

JsonReader JsonDocument::root() const {
  return {this, &value_->json, ""};
}

void JsonDocument::fail(std::size_t byte, std::string_view path, std::string_view what) const {
  const auto end = text_.begin() + static_cast<std::ptrdiff_t>(std::min(byte, text_.size()));
  HS_CHECK(false, source_, ", line ", 1 + std::count(text_.begin(), end, '\n'), path.empty() ? "" : ", ", path, ": ",
           what);
  std::terminate();
}

void JsonReader::fail(std::string_view what) const {
  const Json& value = json(value_);
  const bool shown = value.is_primitive();
  document_->fail(
      value.start_pos() == std::string::npos ? 0 : value.start_pos(), path_,
      shown ? detail::concatenate(
                  "got ", value.is_string() ? in_quotes(value.get_ref<const std::string&>()) : value.dump(), ", ", what)
            : std::string(what));
}

std::string JsonReader::string() const {
  if (!json(value_).is_string()) fail("expected a string");
  return json(value_).get<std::string>();
}

std::vector<JsonReader> JsonReader::array(std::size_t max_size) const {
  const Json& value = json(value_);
  if (!value.is_array()) fail("expected an array");
  if (value.size() > max_size) fail(detail::concatenate("has ", value.size(), " entries, expected at most ", max_size));
  std::vector<JsonReader> entries;
  for (std::size_t i = 0; i < value.size(); ++i)
    entries.push_back({document_, &value[i], detail::concatenate(path_, "[", i, "]")});
  return entries;
}

std::optional<JsonReader> JsonReader::find(std::string_view key) const {
  const Json& value = json(value_);
  if (!value.is_object()) fail("expected an object");
  const auto found = value.find(std::string(key));
  if (found == value.end()) return std::nullopt;
  return JsonReader(document_, &*found, path_.empty() ? std::string(key) : detail::concatenate(path_, ".", key));
}

JsonReader JsonReader::at(std::string_view key) const {
  auto found = find(key);
  if (!found) fail(detail::concatenate("the key ", in_quotes(key), " is missing"));
  return *std::move(found);
}

void JsonReader::only(std::initializer_list<std::string_view> keys) const {
  const Json& value = json(value_);
  if (!value.is_object()) fail("expected an object");
  for (const auto& [key, entry] : value.items()) {
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) continue;
    std::string known;
    for (const std::string_view name : keys)
      if (name != "$schema") known += detail::concatenate(known.empty() ? "" : ", ", name);
    document_->fail(entry.start_pos(), path_,
                    detail::concatenate("unknown key ", in_quotes(key), ", expected ", known));
  }
}

// ------------------------------------------------------------------------------------------------------------ writing

struct JsonWriter::State {
  Json document;
  std::vector<Json*> open;
};

JsonWriter::JsonWriter() : state_(std::make_unique<State>()) {}
JsonWriter::~JsonWriter() = default;

JsonWriter& JsonWriter::begin_object() {
  Json* value = &state_->document;
  if (!state_->open.empty()) value = &state_->open.back()->emplace_back();
  *value = Json::object();
  state_->open.push_back(value);
  return *this;
}

JsonWriter& JsonWriter::begin_array(std::string_view key) {
  Json& value = (*state_->open.back())[std::string(key)] = Json::array();
  state_->open.push_back(&value);
  return *this;
}

JsonWriter& JsonWriter::field(std::string_view key, std::string_view value) {
  (*state_->open.back())[std::string(key)] = std::string(value);
  return *this;
}

JsonWriter& JsonWriter::end() {
  state_->open.pop_back();
  return *this;
}

std::string JsonWriter::text() const {
  return state_->document.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace halfstep
