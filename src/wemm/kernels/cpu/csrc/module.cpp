#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "isa.h"
#include "kernels.h"

namespace nb = nanobind;

namespace {

// kernels/cpu/recording.py: calls written down while it is open, by the thread that opened it.
class Recording {
 public:
  void open() { current = this; }
  void close() { current = nullptr; }
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  std::size_t size() const { return calls_.size(); }

  void replay() const {
    for (const auto& call : calls_) call();
  }

  static thread_local Recording* current;

 private:
  std::vector<std::function<void()>> calls_;
};

thread_local Recording* Recording::current = nullptr;

template <typename... Arguments>
auto recorded(void (*function)(Arguments...)) {
  return [function](std::decay_t<Arguments>... arguments) {
    function(arguments...);
    if (Recording::current != nullptr) Recording::current->add([=] { function(arguments...); });
  };
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "C++ kernels of wemm.ops for the CPU; called through wemm.kernels.cpu only.";
  m.def("rms_norm", recorded(&wemm::rms_norm), nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("layer_norm", recorded(&wemm::layer_norm), nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"),
        nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("silu_and_mul", recorded(&wemm::silu_and_mul), nb::arg("gate"), nb::arg("up"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("rope_and_store_kv", recorded(&wemm::rope_and_store_kv), nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"),
        nb::arg("key_cache"), nb::arg("value_cache"), nb::arg("slot_mapping"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("linear", recorded(&wemm::linear), nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("add_bias_gelu", recorded(&wemm::add_bias_gelu), nb::arg("x"), nb::arg("bias"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("linear_int8", recorded(&wemm::linear_int8), nb::arg("x"), nb::arg("weight"), nb::arg("scale"), nb::arg("bias").none(),
        nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("linear_int8_gelu", recorded(&wemm::linear_int8_gelu), nb::arg("x"), nb::arg("weight"), nb::arg("scale"),
        nb::arg("bias"), nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("linear_int4", recorded(&wemm::linear_int4), nb::arg("x"), nb::arg("weight"), nb::arg("scale"), nb::arg("bias").none(),
        nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("vision_attention", recorded(&wemm::vision_attention), nb::arg("query"), nb::arg("key"), nb::arg("value"),
        nb::arg("cu_seqlens"), nb::arg("scale"), nb::arg("out"), nb::call_guard<nb::gil_scoped_release>());
  m.def("prefill_attention", recorded(&wemm::prefill_attention), nb::arg("query"), nb::arg("key_cache"), nb::arg("value_cache"),
        nb::arg("block_tables"), nb::arg("cu_seqlens_q"), nb::arg("seq_lens"), nb::arg("scale"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("decode_attention", recorded(&wemm::decode_attention), nb::arg("query"), nb::arg("key_cache"), nb::arg("value_cache"),
        nb::arg("block_tables"), nb::arg("seq_lens"), nb::arg("scale"), nb::arg("out"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("add_residual", recorded(&wemm::add_residual), nb::arg("y"), nb::arg("x"),
        nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Recording>(m, "Recording")
      .def(nb::init<>())
      .def("open", &Recording::open)
      .def("close", &Recording::close)
      .def("replay", &Recording::replay, nb::call_guard<nb::gil_scoped_release>())
      .def("__len__", &Recording::size);
  m.def("limit_isa", &wemm::limit_isa, nb::arg("isa"), "No better than 0 portable, 1 AVX2, 2 AVX-512, 3 AMX.");
  m.def("isa", [] { return static_cast<int>(wemm::isa()); }, "What runs, in the numbers of limit_isa.");
  m.def("has_avx512_bf16", &wemm::has_avx512_bf16);
  m.def("has_avx512_vnni", &wemm::has_avx512_vnni);
}
