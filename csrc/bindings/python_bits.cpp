// Bits of masks, and tensors as bits and values, in memory of Python's.
#include "bindings/python.h"
#include "cpu/files/elements.h"
#include "cpu/sparse/pack.h"
#include "cpu/sparse/planes.h"

namespace dimap::python {
namespace {

py::buffer_info bytes_of(const py::buffer& given, const char* name, bool writable = false) {
  py::buffer_info info = given.request(writable);
  if (info.itemsize != 1 || (info.ndim > 0 && !PyBuffer_IsContiguous(info.view(), 'C')))
    throw py::value_error(std::string(name) + " must be contiguous bytes");
  return info;
}

py::bytes pack_bits(const py::buffer& mask) {
  const py::buffer_info info = bytes_of(mask, "mask");
  const auto n = static_cast<int64_t>(info.size);
  std::string bits(static_cast<size_t>((n + 7) / 8), '\0');
  cpu::pack_bits(static_cast<const uint8_t*>(info.ptr), n, reinterpret_cast<uint8_t*>(bits.data()));
  return py::bytes(bits);
}

// How many elements of `size` bytes are in memory of Python's.
int64_t elements_in(const py::buffer_info& info, const char* name, int64_t size) {
  if ((size != 1 && size != 2 && size != 4 && size != 8) || info.size % size)
    throw py::value_error(std::string(name) + " must hold elements of 1, 2, 4 or 8 bytes, got " +
                          std::to_string(info.size) + " bytes and elements of " + std::to_string(size));
  return info.size / size;
}

py::bytes split(const py::buffer& data, int64_t size) {
  const py::buffer_info info = bytes_of(data, "data");
  const int64_t n = elements_in(info, "data", size);
  const auto* elements = static_cast<const char*>(info.ptr);
  int64_t count;
  {
    const py::gil_scoped_release release;
    count = cpu::count_set(elements, n, size, ~uint64_t{0});
  }
  PyObject* made = PyBytes_FromStringAndSize(nullptr, (n + 7) / 8 + count * size);
  if (made == nullptr) throw py::error_already_set();
  auto out = py::reinterpret_steal<py::bytes>(made);
  auto* to = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(made));
  const py::gil_scoped_release release;
  cpu::split(elements, {n, size}, count, to);
  return out;
}

void merge(const py::buffer& content, int64_t size, const py::buffer& out) {
  const py::buffer_info from = bytes_of(content, "content"), to = bytes_of(out, "out", true);
  const int64_t n = elements_in(to, "out", size);
  const py::gil_scoped_release release;
  cpu::merge(static_cast<const uint8_t*>(from.ptr), from.size, {n, size}, static_cast<char*>(to.ptr));
}

}  // namespace

void bind_bits(py::module_& m) {
  m.def("pack_bits", &pack_bits, py::arg("mask"));
  m.def("split", &split, py::arg("data"), py::arg("size"));
  m.def("merge", &merge, py::arg("content"), py::arg("size"), py::arg("out"));
}

}  // namespace dimap::python
