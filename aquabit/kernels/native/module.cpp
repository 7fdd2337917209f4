// aquabit.kernels._native: what Python is given of each kernel.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void define_fake_quant(nb::module_& m);  // fakequant/fakequant.cpp
void define_additive(nb::module_& m);    // additive/additive.cpp
void define_scalar(nb::module_& m);      // scalar/scalar.cpp
void define_lut(nb::module_& m);         // lut/lut.cpp
void define_decode(nb::module_& m);      // decode/decode.cpp
void define_attention(nb::module_& m);   // attention/attention.cpp

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // weights that a program holds until it ends are no leak
    define_fake_quant(m);
    define_additive(m);
    define_scalar(m);
    define_lut(m);
    define_decode(m);
    define_attention(m);
}
