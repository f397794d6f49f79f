// What the CPU operators share: torch's thread pool for the kernels, outputs like the inputs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "bindings/inputs.h"
#include "cpu/parallel.h"

namespace dimap::cpu {

class TorchPool final : public Pool {
 public:
  TorchPool() : workers_(static_cast<int>(torch::stable::get_num_threads())) {}
  int workers() const override { return workers_; }
  void run(const std::function<void(int)>& body) const override {
    torch::stable::parallel_for(0, workers_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker));
    });
  }

 private:
  int workers_;
};

// Contiguous ones of the tensors' shapes. torch::stable::empty looks its operator up by name each time, which takes as
// long as deciding a small layer.
inline std::vector<Tensor> empty_like(const std::vector<Tensor>& tensors, ScalarType type) {
  const int32_t code = type == ScalarType::Bool ? aoti_torch_dtype_bool() : aoti_torch_dtype_float32();
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  std::vector<int64_t> strides;
  for (const Tensor& t : tensors) {
    strides.assign(static_cast<size_t>(t.dim()), 1);
    for (size_t d = strides.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(t.sizes()[d], 1);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(t.dim(), t.sizes().data(), strides.data(), code,
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    out.emplace_back(handle);
  }
  return out;
}

// Refuses tensors that do not serve as outputs of this type: written as one block each, while the inputs are read.
inline void check_outputs(const std::vector<Tensor>& weights, const std::vector<Tensor>& out, ScalarType type) {
  check_length("out", out.size(), weights.size());
  struct Span {
    uintptr_t begin, end;
    const char* name;
    size_t number;
  };
  std::vector<Span> spans;
  const auto add = [&](const Tensor& t, const char* name, size_t i, int64_t size) {
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    int64_t last = 0;  // its last element: a view's may lie further apart than there are of them
    for (size_t d = 0; d < t.sizes().size(); ++d) last += (t.sizes()[d] - 1) * t.strides()[d];
    if (t.numel()) spans.push_back({begin, begin + static_cast<uintptr_t>((last + 1) * size), name, i});
  };
  for (size_t i = 0; i < out.size(); ++i) {
    const Tensor& t = out[i];
    DIMAP_CHECK(t.scalar_type() == type, "out[", i, "] must be ", name_of(type), ", got ", name_of(t.scalar_type()));
    DIMAP_CHECK(t.is_cpu(), "out[", i, "] must be on cpu like weights[", i, "], got ", device_of(t));
    DIMAP_CHECK(std::ranges::equal(t.sizes(), weights[i].sizes()), "out[", i, "] must have the shape of weights[", i,
                "], ", shape_of(weights[i]), ", got ", shape_of(t));
    DIMAP_CHECK(t.is_contiguous(), "out[", i, "] must be contiguous, got a view with other strides");
    t.mutable_data_ptr();  // a lazy clone gets memory of its own
    add(t, "out", i, type == ScalarType::Bool ? 1 : 4);
    add(weights[i], "weights", i, size_of(dtype_of(weights[i], i)));
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span* last[2] = {};  // that ends last, of outputs and of all
  for (const Span& span : spans) {
    const bool output = span.name[0] == 'o';
    const Span* other = last[output];
    DIMAP_CHECK(other == nullptr || other->end <= span.begin, span.name, "[", span.number,
                "] must not share memory with ", other->name, "[", other->number, "]");
    for (const Span** seen : {output ? &last[0] : nullptr, &last[1]})
      if (seen && (*seen == nullptr || (*seen)->end < span.end)) *seen = &span;
  }
}

template <typename T>
std::vector<T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<T*> out;
  for (const Tensor& t : tensors) out.push_back(static_cast<T*>(t.mutable_data_ptr()));
  return out;
}

// Runs the kernels; their exception for a non-finite weight becomes torch's, with the tensor named.
template <typename Body>
auto guarded(Body&& body) {
  try {
    return body();
  } catch (const NonFinite& e) {
    throw_non_finite(e.tensor, e.index, e.name);
  }
}

}  // namespace dimap::cpu
