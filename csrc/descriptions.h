// Reads the Python arguments of the native modules into the structs of a call. Every struct visits its fields in order,
//   fields(visit): visit(name, field...),
// where one visit is one argument: a number or an address, or a tuple of integers for a struct or several fields.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

namespace deco::python {

namespace py = pybind11;

struct AnyVisitor {
  template <class... Fields>
  void operator()(const char*, Fields&...) {}
};

template <class T, class = void>
constexpr bool has_fields = false;
template <class T>
constexpr bool has_fields<T, std::void_t<decltype(std::declval<T&>().fields(std::declval<AnyVisitor&>()))>> = true;

// Number of integers that describe the fields.
struct IntegerCount {
  Py_ssize_t count = 0;

  template <class... Fields>
  void operator()(const char*, Fields&... fields) {
    (add(fields), ...);
  }

 private:
  template <class Field>
  void add(Field& field) {
    if constexpr (has_fields<Field>)
      field.fields(*this);
    else
      ++count;
  }
};

// Reads a number or an address; Python's exception for any other type propagates.
template <class Field>
void read_number(PyObject* value, Field& field) {
  if constexpr (std::is_floating_point_v<Field>) {
    field = static_cast<Field>(PyFloat_AsDouble(value));
  } else {
    const long long number = PyLong_AsLongLong(value);
    if constexpr (std::is_pointer_v<Field>)
      field = reinterpret_cast<Field>(number);
    else
      field = static_cast<Field>(number);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

// Reads the integers of a tuple in order.
class IntegerReader {
 public:
  explicit IntegerReader(PyObject* tuple) : tuple_(tuple) {}

  template <class... Fields>
  void operator()(const char*, Fields&... fields) {
    (read(fields), ...);
  }

 private:
  template <class Field>
  void read(Field& field) {
    if constexpr (has_fields<Field>)
      field.fields(*this);
    else
      read_number(PyTuple_GET_ITEM(tuple_, index_++), field);
  }

  PyObject* tuple_;
  Py_ssize_t index_ = 0;
};

// Reads the tuple that describes the fields of argument `name`; ValueError if its length differs.
template <class... Fields>
void read_description(const std::string& op, const char* name, PyObject* value, Fields&... fields) {
  IntegerCount expected;
  expected(name, fields...);
  if (!PyTuple_Check(value)) throw py::type_error(op + ": " + name + ": expected a tuple of integers");
  if (PyTuple_GET_SIZE(value) != expected.count)
    throw py::value_error(op + ": " + name + ": expected " + std::to_string(expected.count) + " integers, got " +
                          std::to_string(PyTuple_GET_SIZE(value)));
  IntegerReader reader(value);
  reader(name, fields...);
}

// Names of the arguments, "rows, D, h", and their number.
struct ArgumentNames {
  std::string text;
  Py_ssize_t count = 0;

  template <class... Fields>
  void operator()(const char* name, Fields&...) {
    text += (count++ == 0 ? "" : ", ") + std::string(name);
  }
};

template <class... Calls>
ArgumentNames argument_names() {
  ArgumentNames names;
  (Calls().fields(names), ...);
  return names;
}

// Reads the arguments of a call in order.
class ArgumentReader {
 public:
  ArgumentReader(const std::string& op, const py::args& arguments) : op_(op), arguments_(arguments.ptr()) {}

  template <class... Fields>
  void operator()(const char* name, Fields&... fields) {
    PyObject* value = PyTuple_GET_ITEM(arguments_, index_++);
    if constexpr (sizeof...(Fields) == 1 && !(has_fields<Fields> || ...))
      (read_number(value, fields), ...);
    else
      read_description(op_, name, value, fields...);
  }

 private:
  const std::string& op_;
  PyObject* arguments_;
  Py_ssize_t index_ = 0;
};

// Reads all arguments of op `op` into the fields of the calls, in order; TypeError if their number differs.
template <class... Calls>
void read_arguments(const std::string& op, const py::args& arguments, Calls&... calls) {
  static const ArgumentNames names = argument_names<Calls...>();
  const Py_ssize_t given = PyTuple_GET_SIZE(arguments.ptr());
  if (given != names.count)
    throw py::type_error(op + ": expected " + std::to_string(names.count) + " arguments (" + names.text + "), got " +
                         std::to_string(given));
  ArgumentReader reader(op, arguments);
  (calls.fields(reader), ...);
}

}  // namespace deco::python
