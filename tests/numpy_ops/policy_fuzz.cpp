// Policies and plans through the C interface: valid, mutated and random JSON, any bytes as names, descriptions that are
// wrong. A call gives an answer that holds when it is asked again, or says what is wrong with code 1, and writes
// nothing else. Each text lies in an allocation of exactly its size, so that the address sanitizer sees a byte too far.
// Usage: halfstep_policy_fuzz <runs> [seed].
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "halfstep/numpy.h"

namespace {

std::mt19937_64 g_random;
std::int64_t g_run = 0;

std::size_t below(std::size_t n) {
  return static_cast<std::size_t>(g_random() % n);
}

[[noreturn]] void fail(const char* what, std::string_view text = "") {
  std::fprintf(stderr, "run %lld: %s: %.*s\n", static_cast<long long>(g_run), what, static_cast<int>(text.size()),
               text.data());
  std::abort();
}

// A text as it is handed in.
struct Input {
  explicit Input(std::string_view text) : memory(std::make_unique<char[]>(text.size())) {
    if (!text.empty()) std::memcpy(memory.get(), text.data(), text.size());
    c = {text.empty() && below(2) == 0 ? nullptr : memory.get(), static_cast<std::int64_t>(text.size())};
  }
  std::unique_ptr<char[]> memory;
  halfstep_text c{};
};

struct Result {
  std::int32_t code;
  std::string text;
};

// Calls function(arguments..., out), and checks and frees what it has written.
template <class Function, class... Arguments>
Result call(const Function& function, const Arguments&... arguments) {
  halfstep_text out{"nothing that is read or freed", -7};
  const std::int32_t code = function(arguments..., &out);
  if (code != 0 && code != 1) fail("neither an answer nor a mistake of the caller", out.data ? out.data : "");
  if (out.data == nullptr || out.size < 0) fail("no text");
  if (out.data[out.size] != '\0') fail("a text without an end");
  if (code == 1 && out.size == 0) fail("an error without a message");
  Result result{code, std::string(out.data, static_cast<std::size_t>(out.size))};
  halfstep_text_free(&out);
  if (out.data != nullptr || out.size != 0) fail("a freed text is still there");
  halfstep_text_free(&out);  // once more is harmless
  return result;
}

const std::string kPolicies[] = {
    R"({"name": "n", "default": "float16", "rules": [{"name": "a.*", "type": "*Norm?", "precision": "float32"}]})",
    R"({"$schema": "s", "name": "", "default": "bfloat16"})",
    "{\"name\": \"\xc3\xa9\", \"default\": \"int8\", \"rules\": [{\"type\": \"[!a-z]*\", \"precision\": \"tfloat32\",\n"
    "\"reason\": \"\\u00e9\\ud83d\\ude00\"}, {\"name\": \"\", \"precision\": \"float16\"}]}",
};
const std::string kPlans[] = {
    R"({"policy": "p", "layers": [{"name": "", "type": "Net", "precision": "float32", "reason": "r"}]})",
    R"({"policy": "p", "layers": [{"name": "a", "type": "Dense", "precision": "float16", "reason": "r"},
        {"name": "b", "type": "Dense", "precision": "bfloat16", "reason": ""}]})",
};
const std::string_view kPieces[] = {"{",         "}",           "[",    "]",    ",",     ":",
                                    "\"name\"",  "1e99",        "true", "null", "\"*\"", "\"default\"",
                                    "\"rules\"", "\"float16\"", "\\u",  "\"",   "\xff",  "\xed\xa0\x80",
                                    "\n",        "-0",          "\\",   "[[",   "[a-",   "[[:alpha:]]"};

std::string bytes(std::size_t most) {
  std::string text(below(most + 1), '\0');
  for (char& c : text) c = static_cast<char>(g_random());
  return text;
}

std::string encoded(std::uint32_t point) {
  std::string text;
  const auto add = [&](std::uint32_t byte) { text += static_cast<char>(byte); };
  if (point < 0x80) {
    add(point);
  } else if (point < 0x800) {
    add(0xC0 | point >> 6);
  } else if (point < 0x10000) {
    add(0xE0 | point >> 12);
  } else {
    add(0xF0 | point >> 18);
  }
  if (point >= 0x10000) add(0x80 | (point >> 12 & 0x3F));
  if (point >= 0x800) add(0x80 | (point >> 6 & 0x3F));
  if (point >= 0x80) add(0x80 | (point & 0x3F));
  return text;
}

// Reads characters generously and asks whether they would be written so.
bool is_utf8(const std::string& text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i]);
    const std::size_t length = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    std::uint32_t point = length == 1 ? first : first & (0xFFU >> (length + 1));
    for (std::size_t k = 1; k < length && i + k < text.size(); ++k)
      point = point << 6 | (static_cast<unsigned char>(text[i + k]) & 0x3FU);
    if (point > 0x10FFFF || (point >= 0xD800 && point < 0xE000) || text.substr(i, length) != encoded(point))
      return false;
    i += length;
  }
  return true;
}

// Bytes that are UTF-8 or nearly so.
std::string word() {
  std::string text;
  for (std::size_t n = below(4); n > 0; --n) {
    const std::uint32_t limits[] = {0x80, 0x800, 0x10000, 0x110000, 0x1FFFFF};
    text += encoded(static_cast<std::uint32_t>(below(limits[below(std::size(limits))])));
  }
  if (!text.empty() && below(4) == 0) text[below(text.size())] = static_cast<char>(g_random());
  if (!text.empty() && below(8) == 0) text.resize(below(text.size()));
  return text;
}

std::string mutated(std::string text) {
  for (std::size_t n = 1 + below(4); n > 0; --n) {
    const std::size_t at = below(text.size() + 1);
    switch (below(6)) {
      case 0:
        text.insert(at, kPieces[below(std::size(kPieces))]);
        break;
      case 1:
        text.erase(at, below(8));
        break;
      case 2:
        if (at < text.size()) text[at] = static_cast<char>(g_random());
        break;
      case 3:
        text.insert(at, text.substr(below(text.size() + 1), below(60)));  // keys and rules twice
        break;
      case 4:
        text.insert(at, std::string(below(40), below(2) == 0 ? '[' : '*'));
        break;
      default:
        text.resize(at);
    }
  }
  return text;
}

std::string pick(const std::string* texts, std::size_t count) {
  const std::string& text = texts[below(count)];
  switch (below(8)) {
    case 0:
      return text;
    case 1:
      return bytes(200);
    case 2: {
      std::string pieces;
      for (std::size_t n = below(40); n > 0; --n) pieces += kPieces[below(std::size(kPieces))];
      return pieces;
    }
    default:
      return mutated(text);
  }
}

struct Layers {
  Layers() {
    for (std::size_t n = below(5); n > 0; --n) {
      const std::string names[] = {"a.b", "", "LayerNorm", "blocks.0.mlp", word()};
      for (std::size_t i = 0; i < 3; ++i) {
        const std::string& name = names[i == 2 && below(3) != 0 ? 1 : below(std::size(names))];
        valid = valid && is_utf8(name);
        texts.emplace_back(name);
      }
    }
    for (std::size_t i = 0; i < texts.size(); i += 3) c.push_back({texts[i].c, texts[i + 1].c, texts[i + 2].c});
  }
  const halfstep_layer* data() const { return c.empty() && below(2) == 0 ? nullptr : c.data(); }
  std::int64_t count() const { return static_cast<std::int64_t>(c.size()); }

  bool valid = true;
  std::vector<Input> texts;
  std::vector<halfstep_layer> c;
};

void check_plan(const Result& made) {
  if (made.code != 0) return;
  const Input text(made.text), source("plan");
  const Result again = call(halfstep_plan_read, &text.c, &source.c);
  if (again.code != 0 || again.text != made.text) fail("a plan does not go through JSON", again.text);
  if (call(halfstep_plan_explain, &text.c).code != 0) fail("a plan is not explained", made.text);
  if (call(halfstep_plan_diff, &text.c, &text.c).text != "") fail("a plan differs from itself", made.text);
}

void policies() {
  const Input json(pick(kPolicies, std::size(kPolicies)));
  std::string name = bytes(9);
  const Input any(name);
  if (name.find('\0') != std::string::npos && call(halfstep_policy_read, &json.c, &any.c).code != 1)
    fail("a source with a NUL was taken");
  std::erase(name, '\0');
  const Input source(name);
  const Result read = call(halfstep_policy_read, &json.c, &source.c);
  const Layers layers;
  std::vector<std::int64_t> rules(layers.c.size(), -9);
  const Result matched = call(halfstep_policy_match, &json.c, layers.data(), layers.count(), rules.data());
  const Result plan = call(halfstep_policy_plan, &json.c, layers.data(), layers.count());
  check_plan(plan);
  if ((matched.code == 0) != (read.code == 0 && layers.valid))
    fail("the same text is a policy here and none there", read.text);
  if (plan.code == 0 && matched.code != 0) fail("a plan without a policy or of names that are no text", plan.text);
  for (const std::int64_t rule : rules) {
    if (matched.code != 0 && rule != -9) fail("an error has written to the rules");
    if (matched.code == 0 && (rule < -1 || rule > 4096)) fail("a rule that cannot be there");
  }
  if (read.code != 0) return;
  const Input normal(read.text);
  const Result again = call(halfstep_policy_read, &normal.c, &source.c);
  if (again.code != 0 || again.text != read.text) fail("a policy does not go through JSON", again.text);
  const Result same = call(halfstep_policy_plan, &normal.c, layers.data(), layers.count());
  if (same.code != plan.code || same.text != plan.text) fail("a policy decides otherwise after JSON", same.text);
}

void plans() {
  const Input json(pick(kPlans, std::size(kPlans))), other(pick(kPlans, std::size(kPlans))), source("plan");
  const Result read = call(halfstep_plan_read, &json.c, &source.c);
  check_plan(read);
  if (call(halfstep_plan_explain, &json.c).code != read.code) fail("a text is a plan here and none there", read.text);
  const bool both = read.code == 0 && call(halfstep_plan_read, &other.c, &source.c).code == 0;
  if ((call(halfstep_plan_diff, &json.c, &other.c).code == 0) != both) fail("a difference to what is no plan");

  const Layers layers;
  std::vector<std::int32_t> answers(layers.c.size());
  for (std::int32_t& answer : answers) answer = static_cast<std::int32_t>(below(3)) - 1;
  const std::string halves[] = {"float16", "bfloat16", "float32", bytes(9)};
  const Input name(word()), half(halves[below(std::size(halves))]), named("float32");
  check_plan(call(halfstep_plan_answers, &name.c, &half.c, layers.data(), answers.data(), layers.count()));
  if (call(halfstep_policy_named, &name.c).code != 1) fail("a random name is known");
  if (call(halfstep_policy_named, &named.c).code != 0) fail("float32 is not known");
}

// What is wrong in a description must be said, not followed.
void wrong() {
  const Input json(kPolicies[0]), source("s"), plan(kPlans[1]), half("float16");
  const Layers some;
  const std::int64_t counts[] = {-1, INT64_MIN, (std::int64_t{1} << 20) + 1, INT64_MAX};
  const std::int64_t count = counts[below(std::size(counts))];
  halfstep_text bad = json.c;
  if (below(2) == 0)
    bad.size = -1 - static_cast<std::int64_t>(below(99));
  else
    bad.data = nullptr;
  std::int64_t rule = -9;
  const std::int32_t yes = 1;
  const halfstep_layer layer{bad, source.c, source.c};
  const halfstep_text* nothing = nullptr;
  const halfstep_layer* no_layers = nullptr;
  std::int64_t* no_rules = nullptr;
  const std::int32_t* no_answers = nullptr;
  for (const halfstep_text* text : {nothing, static_cast<const halfstep_text*>(&bad)}) {
    if (call(halfstep_policy_read, text, &source.c).code != 1 || call(halfstep_policy_read, &json.c, text).code != 1 ||
        call(halfstep_plan_read, text, &source.c).code != 1 || call(halfstep_plan_explain, text).code != 1 ||
        call(halfstep_plan_diff, &plan.c, text).code != 1 || call(halfstep_policy_named, text).code != 1 ||
        call(halfstep_plan_answers, text, &half.c, some.data(), no_answers, std::int64_t{0}).code != 1)
      fail("a text that is none was taken");
  }
  if (call(halfstep_policy_plan, &json.c, &layer, std::int64_t{1}).code != 1 ||
      call(halfstep_policy_plan, &json.c, no_layers, std::int64_t{1}).code != 1 ||
      call(halfstep_policy_plan, &json.c, &layer, count).code != 1 ||
      call(halfstep_policy_match, &json.c, &layer, std::int64_t{1}, &rule).code != 1 ||
      call(halfstep_policy_match, &json.c, some.data(), std::int64_t{1}, no_rules).code != 1 ||
      call(halfstep_plan_answers, &source.c, &half.c, &layer, &yes, std::int64_t{1}).code != 1 ||
      call(halfstep_plan_answers, &source.c, &half.c, &layer, &yes, count).code != 1)
    fail("layers that are none were taken");
  if (rule != -9) fail("an error has written to the rules");
  if (halfstep_policy_read(&json.c, &source.c, nullptr) != 1) fail("no place for the result was taken");
  halfstep_text_free(nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t runs = argc > 1 ? std::atoll(argv[1]) : 1000;
  g_random.seed(argc > 2 ? static_cast<std::uint64_t>(std::atoll(argv[2])) : 1);
  for (g_run = 0; g_run < runs; ++g_run) {
    policies();
    plans();
    if (g_run % 8 == 0) wrong();
  }
  std::printf("%lld runs\n", static_cast<long long>(runs));
}
