// pack and unpack on the CPU: sparse weights in files.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/cpu_common.h"
#include "cpu/sparse/pack.h"

namespace dimap::cpu {
namespace {

Tensor empty_cpu(std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

int64_t weight_size(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  DIMAP_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
              " must be float32, bfloat16 or float16, got ", name_of(type));
  return type == ScalarType::Float ? 4 : 2;
}

std::tuple<Tensor, Tensor> pack_op(Tensor weights) {
  const Packing packing{weights.numel(), weight_size(weights, "weights")};
  const Tensor input = weights.is_contiguous() ? weights : torch::stable::contiguous(weights);
  const TorchPool pool;
  const std::vector<int64_t> offsets = offsets_of_weights(input.const_data_ptr(), packing, pool);
  Tensor bits = empty_cpu({packing.bytes()}, ScalarType::Byte);
  Tensor values = empty_cpu({offsets.back()}, weights.scalar_type());
  pack(input.const_data_ptr(), packing, offsets, static_cast<uint8_t*>(bits.mutable_data_ptr()),
       values.mutable_data_ptr(), pool);
  return {std::move(bits), std::move(values)};
}

Tensor unpack_op(Tensor bits, Tensor values, std::vector<int64_t> sizes) {
  Packing packing{1, weight_size(values, "values")};
  bool empty = false, fits = true;
  for (const int64_t n : sizes) {
    DIMAP_CHECK(n >= 0, "sizes must not be negative, got ", n);
    empty |= n == 0;
    fits = fits && !__builtin_mul_overflow(packing.n, n == 0 ? 1 : n, &packing.n);
  }
  if (empty) packing.n = 0;
  DIMAP_CHECK(empty || fits, "sizes must be those of a tensor, got more than 2^63 weights");
  DIMAP_CHECK(bits.is_cpu() && values.is_cpu(), "bits and values must be on cpu, got ", device_of(bits), " and ",
              device_of(values));
  DIMAP_CHECK(bits.scalar_type() == ScalarType::Byte && bits.dim() == 1 && bits.numel() == packing.bytes(),
              "bits must be uint8 of one dimension, ", packing.bytes(), " for ", packing.n, " weights, got ",
              name_of(bits.scalar_type()), " with ", bits.dim(), " dimensions and ", bits.numel());
  const Tensor mask = torch::stable::contiguous(bits), kept = torch::stable::contiguous(values);
  const auto* bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
  DIMAP_CHECK(packing.n % 8 == 0 || bytes[packing.n / 8] >> packing.n % 8 == 0,
              "bits must have zeros in the unused bits of the last byte, got ones");
  const TorchPool pool;
  const std::vector<int64_t> offsets = offsets_of_bits(bytes, packing, pool);
  DIMAP_CHECK(values.dim() == 1 && values.numel() == offsets.back(), "values must have one dimension and ",
              offsets.back(), " weights as the bits say, got ", values.dim(), " dimensions and ", values.numel());
  Tensor weights = empty_cpu(sizes, values.scalar_type());
  unpack(bytes, kept.const_data_ptr(), packing, offsets, weights.mutable_data_ptr(), pool);
  return weights;
}

}  // namespace
}  // namespace dimap::cpu

STABLE_TORCH_LIBRARY_IMPL(dimap, CPU, m) {
  m.impl("pack", TORCH_BOX(&dimap::cpu::pack_op));
  m.impl("unpack", TORCH_BOX(&dimap::cpu::unpack_op));
}
