// Every operator's schema: the public contract, and nothing else.
//
// weights: tensors of float32, bfloat16 or float16, on one device. layers[i], modules[i]: the layer and the module of
// weights[i], counted from 0. keep[m]: how many weights module m keeps. Documentation: python/dimap/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dimap, m) {
  m.def("score(Tensor[] weights, int[] layers) -> Tensor[]");
  m.def("select(Tensor[] weights, int[] layers, int[] modules, int[] keep) -> Tensor[]");
  // The same into tensors at hand: contiguous, shapes of the weights, sharing no memory with them or each other.
  m.def("score.out(Tensor[] weights, int[] layers, *, Tensor(a!)[] out) -> ()");
  m.def("select.out(Tensor[] weights, int[] layers, int[] modules, int[] keep, *, Tensor(a!)[] out) -> ()");
  m.def("prune_(Tensor(a!)[] weights, int[] layers, int[] modules, int[] keep) -> ()");
  m.def("select_cuts(Tensor[] weights, int[] layers, int[] modules, int[] keep) -> (Tensor[], Tensor)");
  m.def("apply_(Tensor(a!)[] weights, Tensor[] masks) -> ()");

  // N:M: of every m weights along a dimension the n largest, of equal ones the first. In each weight it is a multiple
  // of m.
  m.def("select_nm(Tensor[] weights, int n, int m, int dim) -> Tensor[]");
  m.def("nm_(Tensor(a!)[] weights, int n, int m, int dim) -> ()");

  // The three stages, for streams and shards. windows: int64 [layers, 7]; table: int64 [layers, 22 + 3 * bins],
  // additive.
  m.def("survey(Tensor[] weights, int[] layers, Tensor windows, int bins) -> Tensor");
  m.def(
      "solve(Tensor table, Tensor windows, int[] modules, int[] keep) "
      "-> (Tensor cuts, Tensor quota, Tensor thresholds, Tensor windows)");
  m.def(
      "emit(Tensor[] weights, int[] layers, int[] modules, Tensor cuts, Tensor quota) "
      "-> (Tensor[] masks, Tensor quota)");

  // Sparse weights in files: one bit a weight, and the nonzero ones.
  m.def("pack(Tensor weights) -> (Tensor bits, Tensor values)");
  m.def("unpack(Tensor bits, Tensor values, int[] sizes) -> Tensor");
}
