#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "isa.h"
#include "kernels.h"

namespace nb = nanobind;

NB_MODULE(_kernels, m) {
  m.doc() = "C++ kernels of wemm.ops for the CPU; called through wemm.kernels.cpu only.";
  m.def("rms_norm", &wemm::rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("layer_norm", &wemm::layer_norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"),
        nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("silu_and_mul", &wemm::silu_and_mul, nb::arg("gate"), nb::arg("up"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("rope_and_store_kv", &wemm::rope_and_store_kv, nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"),
        nb::arg("key_cache"), nb::arg("value_cache"), nb::arg("slot_mapping"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("linear", &wemm::linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("add_bias_gelu", &wemm::add_bias_gelu, nb::arg("x"), nb::arg("bias"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("linear_int8", &wemm::linear_int8, nb::arg("x"), nb::arg("weight"), nb::arg("scale"), nb::arg("bias").none(),
        nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("linear_int8_gelu", &wemm::linear_int8_gelu, nb::arg("x"), nb::arg("weight"), nb::arg("scale"),
        nb::arg("bias"), nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("linear_int4", &wemm::linear_int4, nb::arg("x"), nb::arg("weight"), nb::arg("scale"), nb::arg("bias").none(),
        nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("vision_attention", &wemm::vision_attention, nb::arg("query"), nb::arg("key"), nb::arg("value"),
        nb::arg("cu_seqlens"), nb::arg("scale"), nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("prefill_attention", &wemm::prefill_attention, nb::arg("query"), nb::arg("key_cache"), nb::arg("value_cache"),
        nb::arg("block_tables"), nb::arg("cu_seqlens_q"), nb::arg("seq_lens"), nb::arg("scale"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("decode_attention", &wemm::decode_attention, nb::arg("query"), nb::arg("key_cache"), nb::arg("value_cache"),
        nb::arg("block_tables"), nb::arg("seq_lens"), nb::arg("scale"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("limit_isa", &wemm::limit_isa, nb::arg("isa"), "No better than 0 portable, 1 AVX2, 2 AVX-512, 3 AMX.");
  m.def("isa", [] { return static_cast<int>(wemm::isa()); }, "What runs, in the numbers of limit_isa.");
  m.def("has_avx512_bf16", &wemm::has_avx512_bf16);
  m.def("has_avx512_vnni", &wemm::has_avx512_vnni);
}
