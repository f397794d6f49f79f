// What the CPU operators share: torch's thread pool for the kernels, outputs like the inputs.
#pragma once

#include <torch/csrc/stable/ops.h>

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

inline std::vector<Tensor> empty_like(const std::vector<Tensor>& tensors, ScalarType type) {
  std::vector<Tensor> out;
  for (const Tensor& t : tensors)
    out.push_back(
        torch::stable::empty(t.sizes(), type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  return out;
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
    throw_non_finite(e.tensor, e.index, e.nan);
  }
}

}  // namespace dimap::cpu
