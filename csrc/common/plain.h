// Plain calls: public functions called on ordinary CPU tensors with arguments that are all good, where nothing but
// autograd takes part in operators. They go from Python to the kernels in one step. Any other call is told from them
// here, by looking at arguments and at the thread's state, and goes the long way through lt_kernels/functional, which
// names what is wrong or lets modes, transforms and subclasses see operators.
#pragma once

#include <torch/csrc/autograd/python_variable.h>  // first: it includes Python.h

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <string_view>

#include "tensors.h"

namespace ltk {

// Returns whether a tensor is an ordinary one of the CPU: not fake, batched, wrapped, sparse or a lazy conjugate. Types
// of Python that change nothing below Python (__torch_function__ alone) are not seen here.
inline bool is_plain(const Tensor& t) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet ordinary(
      {Key::Dense, Key::ADInplaceOrView, Key::AutogradFunctionality, Key::AutocastCPU});
  return t.key_set() - ordinary == c10::DispatchKeySet(c10::BackendComponent::CPUBit);
}

// Returns whether nothing but autograd takes part in this thread's operators: no mode, tracer or torch.func transform,
// no forward-mode differentiation, no hooks of saved tensors.
inline bool is_undisturbed() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return keys.included_ == c10::default_included_set && (keys.excluded_ - c10::default_excluded_set).empty() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 && !at::SavedTensorDefaultHooks::get_hooks().has_value() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

inline bool is_index_dtype(at::ScalarType dtype) {  // uint64 may not fit int64
  return dtype == at::kLong || dtype == at::kInt || dtype == at::kShort || dtype == at::kChar || dtype == at::kByte ||
         dtype == at::kUInt16 || dtype == at::kUInt32;
}

inline bool is_floating_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

// Reads the arguments of a call one after the other. What is no plain argument clears `plain`, and anything may be
// returned for it.
class PlainReader {
 public:
  bool plain = is_undisturbed();

  PlainReader(PyObject* const* arguments, Py_ssize_t count) : next_(arguments), end_(arguments + count) {
    TORCH_INTERNAL_ASSERT(std::none_of(next_, end_, [](PyObject* each) { return each == nullptr; }));
  }

  PyObject* next() {
    TORCH_CHECK(next_ != end_, "a plain call with too few arguments");
    return *next_++;
  }

  void expect(bool holds) { plain = plain && holds; }

  // A tensor, undefined where the argument is none.
  Tensor tensor(PyObject* given) {
    const bool is_tensor = THPVariable_CheckExact(given);
    Tensor value = is_tensor ? THPVariable_Unpack(given) : Tensor();
    expect(is_tensor && is_plain(value));
    return value;
  }
  Tensor tensor() { return tensor(next()); }

  Tensor floating(PyObject* given) {
    Tensor value = tensor(given);
    expect(plain && is_floating_dtype(value.scalar_type()));
    return value;
  }
  Tensor floating() { return floating(next()); }

  // Class indices of that shape, or nothing.
  OptionalTensor indices(PyObject* given, at::IntArrayRef shape) {
    if (given == Py_None) return std::nullopt;
    const Tensor value = tensor(given);
    expect(plain && is_index_dtype(value.scalar_type()) && value.sizes() == shape);
    return plain ? OptionalTensor(as(value, at::kLong)) : std::nullopt;
  }

  // A floating vector of that length in another dtype, or nothing.
  OptionalTensor vector(int64_t length, at::ScalarType dtype) {
    PyObject* given = next();
    if (given == Py_None) return std::nullopt;
    const Tensor value = floating(given);
    expect(plain && value.dim() == 1 && value.size(0) == length);
    return plain ? OptionalTensor(as(value, dtype)) : std::nullopt;
  }

  // A finite int or float.
  double number(PyObject* given) {
    double value = std::numeric_limits<double>::quiet_NaN();
    if (PyFloat_CheckExact(given)) {
      value = PyFloat_AS_DOUBLE(given);
    } else if (PyLong_CheckExact(given)) {
      value = static_cast<double>(integer(given));
    }
    expect(std::isfinite(value));
    return value;
  }
  double number() { return number(next()); }

  int64_t integer(PyObject* given) {
    int overflow = 0;
    const int64_t value = PyLong_CheckExact(given) ? PyLong_AsLongLongAndOverflow(given, &overflow) : 0;
    expect(PyLong_CheckExact(given) && overflow == 0);
    return value;
  }
  int64_t integer() { return integer(next()); }

  bool flag() {
    PyObject* given = next();
    expect(PyBool_Check(given));
    return given == Py_True;
  }

  // The position of a text among those allowed.
  int choice(std::initializer_list<std::string_view> allowed) {
    PyObject* given = next();
    Py_ssize_t length = 0;
    const char* text = PyUnicode_CheckExact(given) ? PyUnicode_AsUTF8AndSize(given, &length) : nullptr;
    if (text == nullptr) PyErr_Clear();
    const std::string_view value(text ? text : "", length);
    const auto found = std::find(allowed.begin(), allowed.end(), value);
    expect(text != nullptr && found != allowed.end());
    return static_cast<int>(found - allowed.begin());
  }

  // A tensor in that dtype and contiguous: itself, if it is so.
  static Tensor as(const Tensor& value, at::ScalarType dtype) {
    const Tensor converted = value.scalar_type() == dtype ? value : value.to(dtype);
    return converted.is_contiguous() ? converted : converted.contiguous();
  }

 private:
  PyObject* const* next_;
  PyObject* const* end_;
};

inline void refuse_batched(const Tensor& grad_loss, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !at::isBatchedTensor(grad_loss), "lt_kernels::", name,
      "_fwd takes one upstream gradient at a time: got is_grads_batched=True, expected one call of torch.autograd.grad "
      "for each gradient, or the reference backend, asked for by name: with lt_kernels.use_backend('reference')");
}

}  // namespace ltk
