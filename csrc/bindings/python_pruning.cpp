// Pruning of files and of shards.
#include <bit>
#include <limits>
#include <variant>

#include "bindings/python.h"
#include "cpu/files/prune.h"

namespace dimap::python {
namespace {

using Piece = std::function<void(int32_t, int64_t, py::memoryview)>;  // file, where in its output, bytes
using PatternTuple = std::tuple<int64_t, int64_t, int64_t>;           // n, m, inner
using CutTuple = std::tuple<int64_t, int64_t>;

CutTuple tuple_of(const Cut& cut) {
  return {int64_t{cut.keep_from}, cut.tie == Cut::kNoTie ? int64_t{-1} : int64_t{cut.tie}};
}

using Decided = std::tuple<std::vector<CutTuple>, std::vector<int64_t>, std::vector<double>>;

Decided decided_of(const cpu::Decision& decision) {
  Decided out;
  for (const Cut& cut : decision.cuts) std::get<0>(out).push_back(tuple_of(cut));
  std::get<1>(out) = decision.quotas();
  for (const ModuleCut& module : decision.modules) std::get<2>(out).push_back(module.threshold);
  return out;
}

class Pruning {
 public:
  Pruning(const Files& files, const std::vector<TensorTuple>& tensors, const std::vector<int64_t>& modules,
          const std::vector<int64_t>& keep, int threads, int32_t rank, int32_t size, std::optional<Sum> exchange,
          Progress progress, int64_t aside, const std::vector<PatternTuple>& patterns,
          const std::vector<NormsTuple>& norms)
      : aside_(aside), pool_(threads, watch_of(std::move(progress))), exchange_(exchange_of(std::move(exchange))) {
    problem_.rank = rank, problem_.ranks = size;
    set_tensors(problem_, files, tensors, norms);
    set_modules(problem_, modules, keep, std::nullopt);
    if (!patterns.empty() && patterns.size() != tensors.size())
      throw py::value_error("patterns must have one entry for each of the " + std::to_string(tensors.size()) +
                            " tensors, or none, got " + std::to_string(patterns.size()));
    for (size_t t = 0; t < patterns.size(); ++t) {
      const auto& [n, m, inner] = patterns[t];
      if (m < 1 || n < 0 || n > m || inner < 1 || problem_.tensors[t].numel % (m * inner))
        throw py::value_error("patterns[" + std::to_string(t) + "] must fit its tensor");
      problem_.patterns.push_back({n, m, inner});
    }
  }

  void decide() {
    const py::gil_scoped_release release;
    pruning_.emplace(problem_, pool_, exchange_.get(), aside_);
  }

  std::vector<int64_t> count_packed() {
    const py::gil_scoped_release release;
    return decided().count_packed();
  }

  using Rest = std::tuple<int32_t, int64_t, int64_t, int64_t, uint64_t, int64_t, uint64_t>;
  std::vector<int64_t> write(const std::variant<Files, Piece>& targets,
                             const std::vector<std::tuple<int64_t, int64_t>>& places, const std::vector<Rest>& rest,
                             const std::optional<std::tuple<int, std::string, std::vector<int64_t>>>& masks) {
    if (places.size() != problem_.tensors.size())
      throw py::value_error("places must have one entry for each of the " + std::to_string(problem_.tensors.size()) +
                            " tensors, got " + std::to_string(places.size()));
    std::vector<cpu::Place> at;
    for (const auto& [values, bits] : places) at.push_back({values, bits});
    std::vector<cpu::Elements> elements;
    for (const auto& [file, offset, count, size, mask, place, most] : rest)
      elements.push_back({file, offset, count, size, mask, place, most});
    std::optional<cpu::MaskFile> mask_file;
    if (masks) mask_file = {{std::get<0>(*masks), std::get<1>(*masks)}, std::get<2>(*masks)};
    const py::gil_scoped_release release;
    if (const auto* take = std::get_if<Piece>(&targets)) {
      const auto sink = [take](int32_t file, const char* memory, int64_t bytes, int64_t place) {
        const py::gil_scoped_acquire gil;
        (*take)(file, place, py::memoryview::from_memory(memory, bytes));
      };
      written_ = decided().write(sink, at, elements, mask_file);
    } else {
      cpu::Targets files(files_of(std::get<Files>(targets)));
      const auto sink = [&files](int32_t file, const char* memory, int64_t bytes, int64_t place) {
        files.write(file, memory, bytes, place);
      };
      written_ = decided().write(sink, at, elements, mask_file);
    }
    return written_.rest;
  }

  Decided cuts_found() const {
    const cpu::Decision* decision = decided().decision();
    return decision ? decided_of(*decision) : Decided{};
  }
  std::vector<double> thresholds() const { return std::get<2>(cuts_found()); }
  std::vector<CutTuple> cuts() const { return std::get<0>(cuts_found()); }
  std::vector<int64_t> kept() const { return decided().kept(); }
  int readings() const { return decided().decision() ? decided().decision()->readings : 0; }
  std::vector<int64_t> nonzero() const { return written_.nonzero; }
  std::vector<bool> nan() const { return {written_.nan.begin(), written_.nan.end()}; }
  std::vector<double> smallest() const {
    std::vector<double> values;
    for (const uint32_t key : written_.smallest)
      values.push_back(key == kKeyEnd ? std::numeric_limits<double>::quiet_NaN() : double{std::bit_cast<float>(key)});
    return values;
  }

 private:
  cpu::FilePruning& decided() {
    if (!pruning_) throw std::runtime_error("decide() must come first");
    return *pruning_;
  }
  const cpu::FilePruning& decided() const { return const_cast<Pruning*>(this)->decided(); }

  Problem problem_;
  int64_t aside_;
  cpu::ThreadPool pool_;
  std::unique_ptr<Exchange> exchange_;
  std::optional<cpu::FilePruning> pruning_;
  cpu::FilePruning::Written written_;
};

Decided decide_shards(const std::vector<std::tuple<uintptr_t, int64_t, int, int32_t>>& tensors,
                      const std::vector<int64_t>& totals, const std::vector<int64_t>& modules,
                      const std::vector<int64_t>& keep, Sum exchange, int ranks) {
  Problem problem;
  problem.ranks = ranks;
  for (const auto& [address, numel, dtype, layer] : tensors)
    problem.tensors.push_back({reinterpret_cast<const void*>(address), numel, dtype_of(dtype), layer});
  set_modules(problem, modules, keep, totals);
  const cpu::ThreadPool pool(0, watch_of(std::nullopt));
  const PythonExchange sum(std::move(exchange));
  const py::gil_scoped_release release;
  return decided_of(cpu::Decision(problem, pool, &sum, cpu::Keeps::kCounts, {}));
}

}  // namespace

void bind_pruning(py::module_& m) {
  py::class_<Pruning>(m, "Pruning", "Weights in files that are pruned together, or one rank's part of them.")
      .def(py::init<const Files&, const std::vector<TensorTuple>&, const std::vector<int64_t>&,
                    const std::vector<int64_t>&, int, int32_t, int32_t, std::optional<Sum>, Progress, int64_t,
                    const std::vector<PatternTuple>&, const std::vector<NormsTuple>&>(),
           py::arg("files"), py::arg("tensors"), py::arg("modules"), py::arg("keep"), py::kw_only(),
           py::arg("threads") = 0, py::arg("rank") = 0, py::arg("size") = 1, py::arg("exchange") = py::none(),
           py::arg("progress") = py::none(), py::arg("aside") = cpu::kAsideMost,
           py::arg("patterns") = std::vector<PatternTuple>{}, py::arg("norms") = std::vector<NormsTuple>{})
      .def("decide", &Pruning::decide)
      .def("count_packed", &Pruning::count_packed)
      .def("write", &Pruning::write, py::arg("targets"), py::arg("places"), py::arg("rest"), py::kw_only(),
           py::arg("masks") = py::none())
      .def_property_readonly("thresholds", &Pruning::thresholds)
      .def_property_readonly("cuts", &Pruning::cuts)
      .def_property_readonly("kept", &Pruning::kept)
      .def_property_readonly("readings", &Pruning::readings)
      .def_property_readonly("nonzero", &Pruning::nonzero)
      .def_property_readonly("nan", &Pruning::nan)
      .def_property_readonly("smallest", &Pruning::smallest);
  m.def("decide_shards", &decide_shards, py::arg("tensors"), py::arg("totals"), py::arg("modules"), py::arg("keep"),
        py::kw_only(), py::arg("exchange"), py::arg("size"));
}

}  // namespace dimap::python
