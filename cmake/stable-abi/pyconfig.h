// See Python.h beside this file.
