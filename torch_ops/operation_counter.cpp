// OperationCounter, by callbacks of torch's RecordFunction. Contract: halfstep/torch/operation_counter.h.
//
// A callback is a plain function, so what it counts for is the one counter of the process that runs. torch keeps the
// callback in the thread that called start(), and hands it, under the same handle, to the threads of autograd while
// they work on that thread's backward pass. A callback whose handle is not the running counter's is left over: it
// counts nothing and removes itself.
#include "halfstep/torch/operation_counter.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <string_view>
#include <unordered_map>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "operation_list.h"
#include "registration.h"

namespace halfstep {
namespace {

constexpr std::array<const char*, 5> kDtypes = {"float16", "bfloat16", "float32", "float64", "mixed"};
constexpr int kMixed = 4;
constexpr int kNotFloating = -1;

int index_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return 0;
    case at::kBFloat16:
      return 1;
    case at::kFloat:
      return 2;
    case at::kDouble:
      return 3;
    default:
      return kNotFloating;
  }
}

// What the callbacks need to know of an operator.
struct Operator {
  enum class Kind { kOther, kListed, kCopy, kToCopy };
  Kind kind = Kind::kOther;
  std::size_t operation = 0;  // its place in the names
  std::size_t arguments = 0;
  std::size_t inputs = 0;  // the arguments before out=
};

// Listed operations have numbers, in the order in which the process first met them.
struct Names {
  std::mutex mutex;
  std::map<std::string, std::size_t> numbers;

  std::size_t number(const std::string& name) {
    const std::lock_guard lock(mutex);
    return numbers.emplace(name, numbers.size()).first->second;
  }
};

Names& names() {
  static Names names;
  return names;
}

Operator describe(const char* name, const char* overload) {
  Operator found;
  const auto schema = c10::Dispatcher::singleton().findSchema({name, overload});
  if (!schema) return found;  // not an operator: a range that somebody named
  const auto& arguments = schema->schema().arguments();
  found.arguments = arguments.size();
  found.inputs = static_cast<std::size_t>(std::count_if(
      arguments.begin(), arguments.end(), [](const c10::Argument& argument) { return !argument.is_out(); }));
  const std::string_view text = name;
  const std::string listed = torch_ops::listed_operation(text);
  if (text == "aten::copy_") {
    found.kind = Operator::Kind::kCopy;
  } else if (text == "aten::_to_copy") {
    found.kind = Operator::Kind::kToCopy;
  } else if (!listed.empty()) {
    found.kind = Operator::Kind::kListed;
    found.operation = names().number(listed);
  }
  return found;
}

// A meta tensor, or one of a Python class that is about to handle the operation (a fake tensor of a compiler, a wrapper
// around others): it computes nothing itself, and what its class then calls is seen by itself.
bool is_hollow(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set();
  return keys.has_backend(c10::BackendComponent::MetaBit) ||
         (keys.has(c10::DispatchKey::Python) && !c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::Python));
}

// The type in which tensors compute, as far as they tell, or kNotFloating.
class ComputeType {
 public:
  void see(const c10::IValue& value) {
    if (value.isTensor()) {
      see(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) see(tensor);
    }
  }
  int index() const {
    const unsigned types = with_dimensions_ != 0 ? with_dimensions_ : without_;
    if (types == 0 || computes_nothing_) return kNotFloating;
    return std::has_single_bit(types) ? std::countr_zero(types) : kMixed;
  }

 private:
  void see(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    computes_nothing_ |= is_hollow(tensor);
    const int type = index_of(tensor.scalar_type());
    if (type == kNotFloating || tensor.unsafeGetTensorImpl()->is_wrapped_number()) return;
    (tensor.dim() > 0 ? with_dimensions_ : without_) |= 1U << static_cast<unsigned>(type);
  }

  unsigned with_dimensions_ = 0;  // one bit for each type
  unsigned without_ = 0;
  bool computes_nothing_ = false;
};

struct Cast {
  int from = kNotFloating;
  int to = kNotFloating;
  std::int64_t bytes = 0;

  bool is_one() const { return from != kNotFloating && to != kNotFloating && from != to; }
};

Cast cast_of(Operator::Kind kind, c10::ArrayRef<const c10::IValue> inputs) {
  const bool copies_into = kind == Operator::Kind::kCopy;  // copy_(self, src), _to_copy(self, dtype)
  const at::Tensor& from = inputs[copies_into ? 1 : 0].toTensor();
  Cast cast;
  // A Python number becomes a tensor of the other operand's type on its way into an operation.
  if (from.unsafeGetTensorImpl()->is_wrapped_number() || (!copies_into && inputs[1].isNone())) return cast;
  const at::ScalarType dtype = copies_into ? inputs[0].toTensor().scalar_type() : inputs[1].toScalarType();
  cast.from = index_of(from.scalar_type());
  cast.to = index_of(dtype);
  if (!cast.is_one() || is_hollow(from)) return {};
  const std::int64_t written = copies_into ? inputs[0].toTensor().numel() : from.numel();
  cast.bytes = from.numel() * static_cast<std::int64_t>(from.element_size()) +
               written * static_cast<std::int64_t>(c10::elementSize(dtype));
  return cast;
}

// Whether a compiler looks at the thread's operations instead of running them. While a fake tensor finds its shapes no
// mode is set, but the thread's operations go to the meta device.
bool is_tracing() {
  using Modes = c10::impl::TorchDispatchModeTLS;
  using Key = c10::impl::TorchDispatchModeKey;
  if (c10::impl::tls_local_dispatch_key_set().included_.has_backend(c10::BackendComponent::MetaBit)) return true;
  return Modes::any_modes_set() && (Modes::get_mode(Key::FAKE).has_value() || Modes::get_mode(Key::PROXY).has_value() ||
                                    Modes::get_mode(Key::FUNCTIONAL).has_value());
}

}  // namespace

struct OperationCounter::Tally {
  struct Moved {
    std::int64_t count = 0;
    std::int64_t bytes = 0;
  };

  std::mutex mutex;
  std::vector<std::array<std::int64_t, kDtypes.size()>> operations;  // by number
  std::array<std::array<Moved, kMixed>, kMixed> casts{};

  void add(std::size_t operation, int dtype) {
    const std::lock_guard lock(mutex);
    if (operations.size() <= operation) operations.resize(operation + 1);
    ++operations[operation][static_cast<std::size_t>(dtype)];
  }
  void add(const Cast& cast) {
    const std::lock_guard lock(mutex);
    Moved& moved = casts[static_cast<std::size_t>(cast.from)][static_cast<std::size_t>(cast.to)];
    ++moved.count;
    moved.bytes += cast.bytes;
  }
};

struct OperationCallbacks {
  using Tally = OperationCounter::Tally;

  // ------------------------------------------------------------------------------------ the counter that is running
  struct Running {
    std::mutex mutex;
    std::shared_ptr<Tally> tally;
    std::atomic<at::CallbackHandle> handle{at::INVALID_CALLBACK_HANDLE};
  };
  static Running& running() {
    static Running running;
    return running;
  }

  static bool holds(at::CallbackHandle handle) {
    const auto& callbacks = at::get_record_function_tls_().sorted_tls_callbacks_;
    return handle != at::INVALID_CALLBACK_HANDLE &&
           std::any_of(callbacks.begin(), callbacks.end(), [&](const auto& entry) { return entry.handle_ == handle; });
  }

  // From this thread, all callbacks of ours but the running counter's.
  static void remove_left_over() {
    const at::CallbackHandle handle = running().handle.load();
    std::vector<at::CallbackHandle> left_over;
    for (const auto& entry : at::get_record_function_tls_().sorted_tls_callbacks_)
      if (entry.callback_.start() == &on_start && entry.handle_ != handle) left_over.push_back(entry.handle_);
    for (const at::CallbackHandle each : left_over) at::removeCallback(each);
  }

  static bool start(const std::shared_ptr<Tally>& tally) {
    Running& now = running();
    const std::lock_guard lock(now.mutex);
    if (now.tally) return false;
    remove_left_over();
    now.tally = tally;
    now.handle = at::addThreadLocalCallback(at::RecordFunctionCallback(&on_start, &on_end)
                                                .needsInputs(true)
                                                .scopes({at::RecordScope::FUNCTION, at::RecordScope::USER_SCOPE}));
    return true;
  }

  static void stop(const std::shared_ptr<Tally>& tally) {
    Running& now = running();
    const std::lock_guard lock(now.mutex);
    if (now.tally != tally) return;
    now.tally = nullptr;
    now.handle = at::INVALID_CALLBACK_HANDLE;
    remove_left_over();
  }

  // ----------------------------------------------------------------------------------------------- what a thread has
  struct Event;

  struct Thread {
    at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
    std::shared_ptr<Tally> tally;  // of that handle
    Event* open_operation = nullptr;
    Event* open_cast = nullptr;
    int optimizer_steps = 0;
    std::string key;
    std::unordered_map<std::string, Operator> operators;

    const Operator& find(const char* name, const char* overload) {
      key.assign(name).append(1, '.').append(overload);
      const auto found = operators.find(key);
      return found != operators.end() ? found->second : operators.emplace(key, describe(name, overload)).first->second;
    }
  };
  static Thread& thread() {
    thread_local Thread thread;
    return thread;
  }

  // An operation or a cast that has begun, or a step of an optimizer. torch destroys its record, and so ends it, when
  // the call returns or throws: events of a thread end in reverse order.
  struct Event : at::ObserverContext {
    Thread* thread = nullptr;
    at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
    Event** open = nullptr;  // none for an optimizer's step
    Event* around = nullptr;
    bool counted_inside = false;
    int exceptions = std::uncaught_exceptions();
    std::size_t operation = 0;
    int dtype = kNotFloating;
    Cast cast;

    Event(Thread& of_thread, Event** stack) : thread(&of_thread), handle(of_thread.handle), open(stack) {
      if (open == nullptr) {
        ++thread->optimizer_steps;
      } else {
        around = *open;
        *open = this;
      }
    }
  };

  static std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& function) {
    const at::CallbackHandle handle = running().handle.load(std::memory_order_acquire);
    if (!holds(handle)) {
      remove_left_over();
      return nullptr;
    }
    Thread& here = thread();
    if (here.handle != handle) {
      Running& now = running();
      const std::lock_guard lock(now.mutex);
      if (now.handle != handle) return nullptr;
      here.tally = now.tally;
      here.handle = handle;
    }
    if (function.scope() == at::RecordScope::USER_SCOPE) {
      const bool is_step = std::string_view(function.name()).starts_with("Optimizer.step#");
      return is_step ? std::make_unique<Event>(here, nullptr) : nullptr;
    }
    if (here.optimizer_steps > 0) return nullptr;
    const Operator& called = here.find(function.name(), function.overload_name());
    if (called.kind == Operator::Kind::kOther || is_tracing()) return nullptr;

    // A boxed call gives all of its stack, with the arguments on top.
    const auto stack = function.inputs();
    if (stack.size() < called.arguments) return nullptr;
    const auto inputs = stack.slice(stack.size() - called.arguments, called.inputs);
    if (called.kind != Operator::Kind::kListed) {
      const Cast cast = cast_of(called.kind, inputs);
      if (!cast.is_one()) return nullptr;
      auto event = std::make_unique<Event>(here, &here.open_cast);
      event->cast = cast;
      return event;
    }
    ComputeType type;
    for (const c10::IValue& value : inputs) type.see(value);
    if (type.index() == kNotFloating) return nullptr;
    auto event = std::make_unique<Event>(here, &here.open_operation);
    event->operation = called.operation;
    event->dtype = type.index();
    return event;
  }

  static void on_end(const at::RecordFunction&, at::ObserverContext* context) {
    auto* const event = static_cast<Event*>(context);
    if (event == nullptr || event->thread != &thread()) return;
    if (event->open == nullptr) {
      --event->thread->optimizer_steps;
      return;
    }
    *event->open = event->around;
    const bool failed = std::uncaught_exceptions() > event->exceptions;
    if (!failed && event->around != nullptr) event->around->counted_inside = true;
    if (failed || event->counted_inside || event->handle != running().handle.load(std::memory_order_acquire)) return;
    if (event->cast.is_one()) {
      event->thread->tally->add(event->cast);
    } else {
      event->thread->tally->add(event->operation, event->dtype);
    }
  }
};

OperationCounter::OperationCounter() : tally_(std::make_shared<Tally>()) {}

OperationCounter::~OperationCounter() {
  stop();
}

bool OperationCounter::start() {
  return OperationCallbacks::start(tally_);
}

void OperationCounter::stop() {
  OperationCallbacks::stop(tally_);
}

void OperationCounter::reset() {
  const std::lock_guard lock(tally_->mutex);
  tally_->operations.clear();
  tally_->casts = {};
}

std::vector<OperationCount> OperationCounter::counts() const {
  std::vector<OperationCount> counts;
  const std::scoped_lock lock(names().mutex, tally_->mutex);
  for (const auto& [name, number] : names().numbers) {
    if (number >= tally_->operations.size()) continue;
    for (std::size_t dtype = 0; dtype < kDtypes.size(); ++dtype)
      if (const std::int64_t count = tally_->operations[number][dtype]; count > 0)
        counts.push_back({name, kDtypes[dtype], count});
  }
  return counts;
}

std::vector<CastCount> OperationCounter::casts() const {
  std::vector<CastCount> casts;
  const std::lock_guard lock(tally_->mutex);
  for (std::size_t from = 0; from < tally_->casts.size(); ++from)
    for (std::size_t to = 0; to < tally_->casts.size(); ++to)
      if (const Tally::Moved& moved = tally_->casts[from][to]; moved.count > 0)
        casts.push_back({kDtypes[from], kDtypes[to], moved.count, moved.bytes});
  return casts;
}

void torch_ops::define_operation_counter(torch::Library& library) {
  using Self = c10::intrusive_ptr<OperationCounter>;
  library.class_<OperationCounter>("OperationCounter")
      .def(torch::init<>())
      .def("start", [](const Self& self) { return self->start(); })
      .def("stop", [](const Self& self) { self->stop(); })
      .def("reset", [](const Self& self) { self->reset(); })
      .def("counts",
           [](const Self& self) {
             std::vector<std::tuple<std::string, std::string, std::int64_t>> rows;
             for (const OperationCount& each : self->counts())
               rows.emplace_back(each.operation, each.dtype, each.count);
             return rows;
           })
      .def("casts", [](const Self& self) {
        std::vector<std::tuple<std::string, std::string, std::int64_t, std::int64_t>> rows;
        for (const CastCount& each : self->casts()) rows.emplace_back(each.from, each.to, each.count, each.bytes);
        return rows;
      });
}

}  // namespace halfstep
