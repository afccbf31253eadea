// SPDX-License-Identifier: MIT
// The part of Python's stable ABI that cffi's generated code calls, for machines without Python's own headers
// (cmake/python.cmake says when).  The stable ABI is a promise that these declarations hold for every later 3.x:
// https://docs.python.org/3/c-api/stable.html
#pragma once

#include <assert.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#define PY_MAJOR_VERSION 3
#define PY_VERSION_HEX   0x030A0000

typedef ssize_t        Py_ssize_t;
typedef struct _object PyObject;
typedef struct _ts     PyThreadState;

#define PyMODINIT_FUNC __attribute__((visibility("default"))) PyObject *

int        PyArg_UnpackTuple(PyObject * args, const char * name, Py_ssize_t min, Py_ssize_t max, ...);
PyObject * PyBool_FromLong(long value);
PyObject * PyErr_Occurred(void);
double     PyFloat_AsDouble(PyObject * object);
PyObject * PyFloat_FromDouble(double value);
PyObject * PyImport_ImportModule(const char * name);
PyObject * PyLong_FromLong(long value);
PyObject * PyLong_FromLongLong(long long value);
PyObject * PyLong_FromUnsignedLong(unsigned long value);
PyObject * PyLong_FromUnsignedLongLong(unsigned long long value);
PyObject * PyLong_FromVoidPtr(void * pointer);
PyObject * PyObject_CallMethod(PyObject * object, const char * name, const char * format, ...);
void *     PyObject_Malloc(size_t size);
void       PyObject_Free(void * pointer);
void       Py_FatalError(const char * message) __attribute__((noreturn));
void       Py_IncRef(PyObject * object);
void       Py_DecRef(PyObject * object);

PyThreadState * PyEval_SaveThread(void);
void            PyEval_RestoreThread(PyThreadState * state);

extern PyObject _Py_NoneStruct;
#define Py_None (&_Py_NoneStruct)

#define Py_INCREF(object)  Py_IncRef((PyObject *) (object))
#define Py_DECREF(object)  Py_DecRef((PyObject *) (object))
#define Py_XDECREF(object) Py_DecRef((PyObject *) (object)) // accepts NULL

#define Py_BEGIN_ALLOW_THREADS \
    {                          \
        PyThreadState * _save = PyEval_SaveThread();
#define Py_END_ALLOW_THREADS     \
    PyEval_RestoreThread(_save); \
    }
