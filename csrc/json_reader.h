// JSON that comes from people: every error names the file, the line and the key. Around nlohmann-json, of which nothing
// shows here, since it takes five seconds to compile.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace halfstep {

struct JsonLimits {
  std::size_t bytes, depth;
};

class JsonDocument;

// One value of a document, which must outlive it. What is not as asked for throws InvalidArgument.
class JsonReader {
 public:
  std::string string() const;
  std::vector<JsonReader> array(std::size_t max_size) const;
  JsonReader at(std::string_view key) const;                   // of an object that has it
  std::optional<JsonReader> find(std::string_view key) const;  // of an object
  void only(std::initializer_list<std::string_view> keys) const;
  [[noreturn]] void fail(std::string_view what) const;

 private:
  friend class JsonDocument;
  JsonReader(const JsonDocument* document, const void* value, std::string path)
      : document_(document), value_(value), path_(std::move(path)) {}

  const JsonDocument* document_;
  const void* value_;
  std::string path_;  // such as rules[2].precision
};

class JsonDocument {
 public:
  // Throws InvalidArgument, also for keys that an object has twice.
  JsonDocument(std::string_view text, std::string_view source, const JsonLimits& limits);
  ~JsonDocument();
  JsonDocument(const JsonDocument&) = delete;
  JsonDocument& operator=(const JsonDocument&) = delete;

  JsonReader root() const;
  [[noreturn]] void fail(std::size_t byte, std::string_view path, std::string_view what) const;

 private:
  struct Value;
  std::string text_, source_;
  std::unique_ptr<Value> value_;
};

// Objects and arrays in the order they are written in, two spaces a level.
class JsonWriter {
 public:
  JsonWriter();
  ~JsonWriter();
  JsonWriter(const JsonWriter&) = delete;
  JsonWriter& operator=(const JsonWriter&) = delete;

  JsonWriter& begin_object();                     // as the document, or in an array
  JsonWriter& begin_array(std::string_view key);  // in an object
  JsonWriter& field(std::string_view key, std::string_view value);
  JsonWriter& end();
  std::string text() const;  // after the last end()

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace halfstep
