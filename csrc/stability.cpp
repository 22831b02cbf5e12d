// The state machine of the layers. Contract: halfstep/stability.h.
#include "halfstep/stability.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "halfstep/dtype.h"
#include "halfstep/status.h"
#include "json_reader.h"

namespace halfstep {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::array<std::string_view, 4> kStates{"fixed", "half", "float32", "trial"};
constexpr JsonLimits kCheckpointLimits{std::size_t{1} << 26, 8};

bool is_half(Precision precision) {
  return precision == Precision::kFloat16 || precision == Precision::kBFloat16;
}

bool runs_in_half(LayerState state) {
  return state == LayerState::kHalf || state == LayerState::kTrial;
}

Precision half_of(const PrecisionPlan& plan) {
  std::optional<Precision> half;
  for (const PlannedLayer& layer : plan.layers()) {
    if (!is_half(layer.precision)) continue;
    HS_CHECK(!half || *half == layer.precision, "StabilityMonitor: the plan has float16 and bfloat16 layers ('",
             layer.name, "' is ", name_of(layer.precision), "), expected one of both");
    half = layer.precision;
  }
  HS_CHECK(half, "StabilityMonitor: the plan '", plan.policy(), "' has no float16 or bfloat16 layer to monitor");
  return *half;
}

// The squared norm that rounding to multiples of the smallest float16 may have cost, as a share. See the header.
double lost_share(const double* row, Precision half) {
  if (half != Precision::kFloat16 || row[kSeenSquares] <= 0.0) return 0.0;
  return std::min(1.0, (row[kSeenZeros] + row[kSeenBelowHalf]) * 0x1p-50 / row[kSeenSquares]);
}

// The layer with the largest value of a column, of those that `counts` says; none if all are 0. Of equal ones the
// first.
template <class Counts>
std::optional<std::size_t> first_of(std::span<const double> summary, SummaryColumn column, const Counts& counts) {
  std::optional<std::size_t> best;
  double largest = 0.0;
  for (std::size_t i = 0; i * kSummaryColumns < summary.size(); ++i) {
    const double value = summary[i * kSummaryColumns + column];
    if (value > largest && counts(i)) {
      largest = value;
      best = i;
    }
  }
  return best;
}

std::int64_t integer(const JsonReader& value) {
  const std::string text = value.string();
  std::int64_t result = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), result);
  if (error != std::errc() || end != text.data() + text.size() || result < 0) value.fail("expected a count");
  return result;
}

}  // namespace

struct StabilityMonitor::Fault {
  std::size_t layer;
  double score;
  std::string reason;
  bool demotes = true;  // false: an event that nothing can be done about
};

std::string_view name_of(LayerState state) {
  return kStates.at(static_cast<std::size_t>(state));
}

double half_limit_of(Precision half) {
  HS_CHECK(is_half(half), "half_limit_of: got ", name_of(half), ", expected float16 or bfloat16");
  // Halfway between the largest number and the next power of two: from there on rounding gives infinity.
  return half == Precision::kFloat16 ? 65520.0 : 0x1.ffp+127;
}

std::vector<double> summarize(std::span<const double> statistics, Precision half) {
  constexpr std::size_t kRows = kValuesPerLayer;
  HS_CHECK(statistics.size() % kRows == 0, "summarize: got ", statistics.size(), " values, expected a multiple of ",
           kRows);
  std::vector<double> summary(statistics.size() / kRows * kSummaryColumns);
  for (std::size_t i = 0; i * kRows < statistics.size(); ++i) {
    const double* const output = &statistics[i * kRows];
    const double* const output_gradient = output + kLayerStatistics;
    const double* const input_gradient = output_gradient + kLayerStatistics;
    double* const row = &summary[i * kSummaryColumns];
    row[kLostOutput] = lost_share(output, half);
    // What it gets counts too: that is rounded to the type of its output, whoever sends it.
    row[kLostGradient] = std::max(lost_share(output_gradient, half), lost_share(input_gradient, half));
    row[kFirstOutput] = output[kEarliest];
    row[kFirstOutputGradient] = output_gradient[kEarliest];
    row[kFirstInputGradient] = input_gradient[kEarliest];
    row[kFirstBeyond] = output[kEarliestBeyond];
    row[kMaxOutput] = output[kSeenMaximum];
    row[kMaxGradient] = std::max(output_gradient[kSeenMaximum], input_gradient[kSeenMaximum]);
  }
  return summary;
}

StabilityMonitor::StabilityMonitor(PrecisionPlan base, const StabilityOptions& options)
    : base_(std::move(base)), options_(options), half_(half_of(base_)) {
  HS_CHECK(options.threshold > 0.0, "StabilityMonitor: threshold is ", options.threshold, ", expected a number > 0");
  HS_CHECK(options.hold >= 1 && options.max_hold >= options.hold, "StabilityMonitor: hold is ", options.hold,
           " and max_hold ", options.max_hold, ", expected 1 <= hold <= max_hold");
  HS_CHECK(options.lowest_scale > 0.0, "StabilityMonitor: lowest_scale is ", options.lowest_scale,
           ", expected a number > 0");
  for (const PlannedLayer& layer : base_.layers()) {
    LayerEntry& entry = layers_.emplace_back();
    entry.state = is_half(layer.precision) ? LayerState::kHalf : LayerState::kFixed;
    entry.hold = options.hold;
  }
}

// The innermost layer that holds this one and runs in half.
std::optional<std::size_t> StabilityMonitor::around(std::size_t layer) const {
  for (std::string_view name = base_.layers()[layer].name; !name.empty();) {
    const std::size_t dot = name.rfind('.');
    name = dot == std::string_view::npos ? std::string_view() : name.substr(0, dot);
    const PlannedLayer* const outer = base_.find(name);
    if (outer == nullptr) continue;
    const auto place = static_cast<std::size_t>(outer - base_.layers().data());
    if (runs_in_half(layers_[place].state)) return place;
  }
  return std::nullopt;
}

// Where the forward pass went wrong first. Values that a layer in float32 returns were given to it, by what the layer
// around it computes.
std::optional<StabilityMonitor::Fault> StabilityMonitor::forward_fault(std::span<const double> summary) const {
  const auto layer = first_of(summary, kFirstOutput, [&](std::size_t i) { return !layers_[i].masks; });
  if (!layer) return std::nullopt;
  if (runs_in_half(layers_[*layer].state)) return Fault{*layer, kInfinity, "the first infinite or NaN output"};
  if (const auto outer = around(*layer))
    return Fault{*outer, kInfinity,
                 detail::concatenate("the first infinite or NaN output is that of '", base_.layers()[*layer].name,
                                     "', which computes in float32 and is inside of this layer")};
  return Fault{*layer, kInfinity, "its output is infinite or NaN in float32 too: half is not the cause", false};
}

// What a pass in float32 says about the unstable step that it repeats.
std::vector<StabilityDecision> StabilityMonitor::compare_with_float32(std::int64_t batch,
                                                                      std::span<const double> summary,
                                                                      bool came_to_nothing) {
  const auto at = [&](std::size_t layer, SummaryColumn column) { return summary[layer * kSummaryColumns + column]; };
  if (!came_to_nothing)
    for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].masks = at(i, kFirstOutput) > 0.0;
  const bool compares = unstable_batch_ == batch && !unstable_.empty();
  std::optional<std::size_t> culprit;
  std::string reason;
  if (compares) {
    culprit = first_of(unstable_, kFirstOutput, [&](std::size_t i) { return at(i, kFirstOutput) == 0.0; });
    reason = "its output is infinite or NaN in half and not in float32";
  } else {
    culprit = first_of(summary, kFirstBeyond, [&](std::size_t i) { return runs_in_half(layers_[i].state); });
    if (culprit)
      reason =
          detail::concatenate("in float32 its output reaches ", at(*culprit, kMaxOutput), ", beyond ", name_of(half_));
  }
  const auto demoted = compares ? demoted_then_ : std::nullopt;
  std::vector<StabilityDecision> decisions;
  if (culprit && (culprit == demoted || !runs_in_half(layers_[*culprit].state))) return decisions;
  if (demoted)
    decisions.push_back(
        take_back(batch, *demoted,
                  culprit ? detail::concatenate("taken back: it began in '", base_.layers()[*culprit].name, "'")
                          : "taken back: float32 is no better, half is not the cause"));
  if (culprit) {
    decisions.push_back(demote(batch, {*culprit, kInfinity, reason}));
    layers_[*culprit].left += 1;
  } else if (!demoted && came_to_nothing) {
    if (const auto first = first_of(summary, kFirstOutput, [](std::size_t) { return true; }))
      decisions.push_back(event(
          batch, {*first, kInfinity, "its output is infinite or NaN in float32 too: half is not the cause", false}));
  }
  return decisions;
}

StabilityDecision StabilityMonitor::take_back(std::int64_t batch, std::size_t layer, const std::string& reason) {
  LayerEntry& entry = layers_[layer];
  entry.state = LayerState::kHalf;
  entry.left = 0;
  entry.hold = options_.hold;
  entry.demotions -= 1;
  entry.reason = reason;
  return {batch, base_.layers()[layer].name, LayerState::kFloat32, entry.state, entry.score, entry.hold, reason};
}

std::vector<StabilityDecision> StabilityMonitor::observe(std::int64_t batch, std::span<const double> summary,
                                                         StepKind kind) {
  HS_CHECK(summary.size() == layers_.size() * kSummaryColumns, "StabilityMonitor: the summary has ", summary.size(),
           " values, expected ", int{kSummaryColumns}, " for each of ", layers_.size(), " layers");
  const PlannedLayer* const model = base_.find("");
  const auto of_model = [&](SummaryColumn column) {
    return summary[static_cast<std::size_t>(model - base_.layers().data()) * kSummaryColumns + column];
  };
  const bool watched = model != nullptr && (of_model(kMaxOutput) > 0.0 || of_model(kFirstOutput) > 0.0);
  const bool came_to_nothing = watched ? of_model(kFirstOutput) > 0.0 : kind == StepKind::kUnstable;
  if (kind == StepKind::kFloat32) return compare_with_float32(batch, summary, came_to_nothing);
  if (came_to_nothing) {
    unstable_.assign(summary.begin(), summary.end());
    unstable_batch_ = batch;
    demoted_then_.reset();
    const auto fault = forward_fault(summary);
    if (!fault) return {};
    if (!fault->demotes) return {event(batch, *fault)};
    StabilityDecision decision = demote(batch, *fault);
    layers_[fault->layer].left += 1;  // the interval that has begun does not count
    demoted_then_ = fault->layer;
    return {std::move(decision)};
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].masks = summary[i * kSummaryColumns + kFirstOutput] > 0.0;
  pending_.resize(summary.size(), 0.0);
  for (std::size_t i = 0; i < summary.size(); ++i) pending_[i] = std::max(pending_[i], summary[i]);
  return {};
}

double StabilityMonitor::pending(std::size_t layer, SummaryColumn column) const {
  return pending_.empty() ? 0.0 : pending_[layer * kSummaryColumns + column];
}

// Whose gradients stay infinite or NaN where the loss scale can fall no further.
std::optional<StabilityMonitor::Fault> StabilityMonitor::gradient_fault(double loss_scale) const {
  const auto any = [](std::size_t) { return true; };
  const auto sender = first_of(pending_, kFirstInputGradient, any);
  const auto receiver = first_of(pending_, kFirstOutputGradient, any);
  if ((!sender && !receiver) || loss_scale > options_.lowest_scale) return std::nullopt;
  const auto in_half = [&](std::size_t layer) { return runs_in_half(layers_[layer].state); };
  const std::string where = detail::concatenate(", and gradients are infinite or NaN at a loss scale of ", loss_scale);
  if (const auto first = first_of(pending_, kFirstOutput, in_half))
    return Fault{*first, kInfinity, "its output is infinite or NaN" + where};
  const bool sent =
      sender && (!receiver || pending(*sender, kFirstInputGradient) > pending(*receiver, kFirstOutputGradient));
  const std::size_t layer = sent ? *sender : *receiver;
  if (sent && in_half(layer)) return Fault{layer, kInfinity, "it is the first to send such a gradient on" + where};
  if (const auto outer = around(layer))
    return Fault{*outer, kInfinity,
                 detail::concatenate("what it computes beside '", base_.layers()[layer].name, "'") + where};
  return Fault{layer, kInfinity, "float32 is no better" + where, false};
}

// What the interval's summaries say, each layer once. What is not in half comes with `demotes` false.
std::vector<StabilityMonitor::Fault> StabilityMonitor::interval_faults(double loss_scale) const {
  std::vector<Fault> found;
  if (auto fault = gradient_fault(loss_scale)) found.push_back(std::move(*fault));

  double largest = 0.0;
  for (std::size_t i = 0; i < layers_.size(); ++i) largest = std::max(largest, pending(i, kMaxGradient));
  const double room = largest > 0.0 ? std::max(1.0, half_limit_of(half_) / largest) : 1.0;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const double output = pending(i, kLostOutput), gradient = pending(i, kLostGradient) / (room * room);
    const double score = std::max(output, gradient);
    if (layers_[i].state == LayerState::kFixed || !(score > options_.threshold)) continue;
    if (base_.layers()[i].name.empty() && layers_.size() > 1) continue;  // the model returns what its layers did
    if (!found.empty() && found.front().layer == i) continue;
    found.push_back({i, score,
                     output >= gradient ? "its output is too small for half" : "its gradients are too small for half",
                     runs_in_half(layers_[i].state)});
  }
  return found;
}

StabilityDecision StabilityMonitor::demote(std::int64_t batch, const Fault& fault) {
  LayerEntry& entry = layers_[fault.layer];
  const LayerState from = entry.state;
  if (from == LayerState::kTrial) entry.hold = std::min(2 * entry.hold, options_.max_hold);
  entry.state = LayerState::kFloat32;
  entry.left = entry.hold;
  entry.demotions += 1;
  entry.score = fault.score;
  entry.reason = fault.reason;
  return {batch, base_.layers()[fault.layer].name, from, entry.state, fault.score, entry.hold, fault.reason};
}

// Something that nothing is done about.
StabilityDecision StabilityMonitor::event(std::int64_t batch, const Fault& fault) const {
  const LayerEntry& entry = layers_[fault.layer];
  return {batch, base_.layers()[fault.layer].name, entry.state, entry.state, fault.score, entry.hold, fault.reason};
}

std::vector<StabilityDecision> StabilityMonitor::decide(std::int64_t batch, double loss_scale) {
  const std::vector<Fault> found = interval_faults(loss_scale);
  std::vector<StabilityDecision> decisions;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    LayerEntry& entry = layers_[i];
    const auto fault = std::find_if(found.begin(), found.end(), [&](const Fault& other) { return other.layer == i; });
    entry.score = fault == found.end() ? pending(i, kLostOutput) : fault->score;
    const auto note = [&](LayerState from, std::string reason) {
      entry.reason = reason;
      decisions.push_back(
          {batch, base_.layers()[i].name, from, entry.state, entry.score, entry.hold, std::move(reason)});
    };
    switch (entry.state) {
      case LayerState::kFixed:
        break;
      case LayerState::kHalf:
        if (fault != found.end()) {
          decisions.push_back(demote(batch, *fault));
        } else if (entry.left > 0 && --entry.left == 0) {
          entry.hold = options_.hold;  // as long without a fault as it was held: the past is forgotten
        }
        break;
      case LayerState::kTrial:
        if (fault != found.end()) {
          decisions.push_back(demote(batch, *fault));
        } else if (pending(i, kMaxOutput) > 0.0 || pending(i, kMaxGradient) > 0.0) {  // it was seen
          entry.state = LayerState::kHalf;
          entry.left = entry.hold;
          entry.promotions += 1;
          note(LayerState::kTrial, "an interval in half without a fault");
        }
        break;
      case LayerState::kFloat32:
        if (fault != found.end() && std::isinf(fault->score)) decisions.push_back(event(batch, *fault));
        if (--entry.left > 0) break;
        if (pending(i, kFirstBeyond) > 0.0 || fault != found.end()) {
          entry.hold = entry.left = std::min(2 * entry.hold, options_.max_hold);
          note(LayerState::kFloat32, pending(i, kFirstBeyond) > 0.0
                                         ? detail::concatenate("not tried: its float32 output reaches ",
                                                               pending(i, kMaxOutput), ", beyond ", name_of(half_))
                                         : "not tried: " + fault->reason);
        } else {
          entry.state = LayerState::kTrial;
          note(LayerState::kFloat32, "held long enough, tried in half");
        }
        break;
    }
  }
  pending_.clear();
  return decisions;
}

PrecisionPlan StabilityMonitor::plan() const {
  std::vector<PlannedLayer> layers(base_.layers().begin(), base_.layers().end());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (layers_[i].state == LayerState::kFloat32) layers[i].precision = Precision::kFloat32;
    if (layers_[i].state != LayerState::kFixed && !layers_[i].reason.empty()) layers[i].reason = layers_[i].reason;
  }
  return {base_.policy(), std::move(layers)};
}

double StabilityMonitor::half_share() const {
  std::size_t monitored = 0, half = 0;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const auto prefix = base_.layers()[i].name.empty() ? std::string() : base_.layers()[i].name + ".";
    const bool holds = std::any_of(base_.layers().begin(), base_.layers().end(), [&](const PlannedLayer& other) {
      return other.name.size() > prefix.size() && other.name.starts_with(prefix);
    });
    if (holds || layers_[i].state == LayerState::kFixed) continue;
    monitored += 1;
    half += runs_in_half(layers_[i].state) ? 1 : 0;
  }
  return monitored == 0 ? 0.0 : static_cast<double>(half) / static_cast<double>(monitored);
}

std::string StabilityMonitor::to_json() const {
  JsonWriter json;
  json.begin_object().begin_array("layers");
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const LayerEntry& entry = layers_[i];
    json.begin_object()
        .field("name", base_.layers()[i].name)
        .field("state", name_of(entry.state))
        .field("hold", std::to_string(entry.hold))
        .field("left", std::to_string(entry.left))
        .field("demotions", std::to_string(entry.demotions))
        .field("promotions", std::to_string(entry.promotions))
        .field("masks", entry.masks ? "yes" : "no")
        .field("reason", entry.reason)
        .end();
  }
  return json.end().end().text();
}

void StabilityMonitor::restore(std::string_view text) {
  const JsonDocument document(text, "StabilityMonitor", kCheckpointLimits);
  const JsonReader root = document.root();
  root.only({"layers"});
  const std::vector<JsonReader> entries = root.at("layers").array(std::size_t{1} << 20);
  if (entries.size() != layers_.size())
    root.fail(detail::concatenate("it has ", entries.size(), " layers, the plan ", layers_.size()));
  std::vector<LayerEntry> layers;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const JsonReader& entry = entries[i];
    entry.only({"name", "state", "hold", "left", "demotions", "promotions", "masks", "reason"});
    const PlannedLayer& planned = base_.layers()[i];
    if (entry.at("name").string() != planned.name)
      entry.at("name").fail(detail::concatenate("expected the layer '", planned.name, "'"));
    const auto state = std::find(kStates.begin(), kStates.end(), entry.at("state").string());
    if (state == kStates.end()) entry.at("state").fail("expected one of fixed, half, float32, trial");
    LayerEntry restored;
    restored.state = static_cast<LayerState>(state - kStates.begin());
    restored.hold = integer(entry.at("hold"));
    restored.left = integer(entry.at("left"));
    restored.demotions = integer(entry.at("demotions"));
    restored.promotions = integer(entry.at("promotions"));
    restored.masks = entry.at("masks").string() == "yes";
    restored.reason = entry.at("reason").string();
    if ((restored.state == LayerState::kFixed) == is_half(planned.precision))
      entry.at("state").fail(detail::concatenate("the plan has this layer in ", name_of(planned.precision)));
    if (restored.hold < 1) entry.at("hold").fail("expected at least 1");
    layers.push_back(std::move(restored));
  }
  layers_ = std::move(layers);
}

}  // namespace halfstep
