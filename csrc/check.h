// Errors are exceptions, never exit: Python sees a RuntimeError with the sentence.
#pragma once

#include <stdexcept>
#include <string>

#define TREEGRPO_CHECK(condition, message)                                        \
  do {                                                                            \
    if (!(condition)) throw std::runtime_error(std::string("treegrpo: ") + (message)); \
  } while (0)
