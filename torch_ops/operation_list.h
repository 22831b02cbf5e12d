// Which operations OperationCounter counts.
#pragma once

#include <string>
#include <string_view>

namespace halfstep::torch_ops {

// The name under which an operator, "aten::add_" without its overload, is counted: "aten::add". Empty if it is not.
std::string listed_operation(std::string_view name);

}  // namespace halfstep::torch_ops
