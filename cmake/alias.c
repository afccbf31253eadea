// SPDX-License-Identifier: MIT
// A library without code, under a name that llama-cpp-python looks for; what it needs has the symbols.
typedef int tbq_alias_is_empty;
