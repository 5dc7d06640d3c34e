#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "kernels.h"

namespace nb = nanobind;

NB_MODULE(_kernels, m) {
  m.doc() = "C++ kernels of wemm.ops for the CPU; called through wemm.kernels.cpu only.";
  m.def("rms_norm", &wemm::rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
}
