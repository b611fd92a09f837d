// The functions of lt_kernels._C that take plain calls (plain.h), one for each public function that has them.
#pragma once

#include <Python.h>

namespace ltk {

PyObject* plain_margin_cross_entropy(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* plain_expert_cross_entropy(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* plain_supervised_contrastive(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace ltk
