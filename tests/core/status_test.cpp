#include "halfstep/status.h"

#include <gtest/gtest.h>

namespace halfstep {
namespace {

template <class Error, class Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(Status, CheckThrowsTheConcatenatedMessage) {
  const auto fail = [](int got) { HS_CHECK(got == 1, "op: argument is ", got, ", expected ", 1); };
  EXPECT_NO_THROW(fail(1));
  EXPECT_EQ(message_of<InvalidArgument>([&] { fail(7); }), "op: argument is 7, expected 1");
  EXPECT_THROW(fail(7), std::invalid_argument);  // what frameworks translate to ValueError
}

TEST(Status, UnreachableNamesFileAndLine) {
  const std::string message = message_of<InternalError>([] { HS_UNREACHABLE("dtype ", 9); });
  EXPECT_NE(message.find("dtype 9"), std::string::npos);
  EXPECT_NE(message.find("status_test.cpp:"), std::string::npos);
}

}  // namespace
}  // namespace halfstep
