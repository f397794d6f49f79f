// Surveys of files, and what a pruning would keep by them.
#include <limits>

#include "bindings/python.h"
#include "core/counts.h"
#include "core/wire.h"
#include "cpu/files/prune.h"

namespace dimap::python {
namespace {

// Rows of int64 as bytes.
py::bytes bytes_of(const std::vector<int64_t>& rows) {
  return py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size() * 8);
}

std::vector<int64_t> rows_of(const py::buffer& given) {
  const py::buffer_info info = given.request();
  const auto* begin = static_cast<const int64_t*>(info.ptr);
  return {begin, begin + static_cast<size_t>(info.size * info.itemsize) / 8};
}

py::bytes survey(const Files& files, const std::vector<TensorTuple>& tensors, const py::buffer& windows, int64_t bins,
                 int threads, int32_t rank, int32_t size, std::optional<Sum> exchange, Progress progress,
                 const std::vector<NormsTuple>& norms) {
  Problem problem;
  problem.rank = rank, problem.ranks = size;
  set_tensors(problem, files, tensors, norms);
  const std::vector<int64_t> given = rows_of(windows);
  const size_t layers = given.size() / static_cast<size_t>(kWindowColumns);
  std::vector<Window> views;
  for (size_t l = 0; l < layers; ++l) views.push_back(read_window(given.data() + l * kWindowColumns).window);
  set_modules(problem, std::vector<int64_t>(layers), {0}, std::nullopt);
  const auto columns = static_cast<size_t>(wire_columns(bins));
  std::vector<int64_t> rows(layers * columns);
  const cpu::ThreadPool pool(threads, watch_of(std::move(progress)));
  const std::unique_ptr<Exchange> sum = exchange_of(std::move(exchange));
  {
    const py::gil_scoped_release release;
    cpu::Loader loader(problem, pool.workers());
    const cpu::Survey seen = cpu::survey(problem, views, bins, {}, loader, pool);
    for (size_t l = 0; l < layers; ++l) write_table(seen.tables[l], rows.data() + l * columns);
    if (sum) sum->sum(rows);
  }
  return bytes_of(rows);
}

// `Counts` in Python's types.
class PythonCounts {
 public:
  PythonCounts(const std::vector<std::tuple<int32_t, int64_t>>& parts,
               const std::vector<std::tuple<int32_t, int64_t, int64_t>>& sets, std::vector<int32_t> modules,
               std::vector<int32_t> granularities, int64_t bins, uint32_t first, uint32_t last)
      : counts_(parts_of(parts), sets_of(sets), std::move(modules), std::move(granularities), bins, first, last) {}

  // Of the parts that are wanted: their numbers, and a row for each.
  std::tuple<std::vector<int64_t>, py::bytes> windows() const {
    std::vector<int64_t> numbers, rows;
    for (int64_t p = 0; p < counts_.parts(); ++p) {
      const auto l = static_cast<size_t>(counts_.layer_of(p));
      if (!counts_.wanted()[l]) continue;
      numbers.push_back(p);
      rows.resize(rows.size() + static_cast<size_t>(kWindowColumns));
      write_window({counts_.windows()[l], counts_.granularity(static_cast<int32_t>(l))},
                   rows.data() + rows.size() - kWindowColumns);
    }
    return {numbers, bytes_of(rows)};
  }
  void take(const py::buffer& rows) { counts_.take(rows_of(rows)); }

  using Pairs = std::vector<std::tuple<int64_t, int64_t>>;
  std::tuple<Pairs, Pairs, Pairs, std::vector<double>> kept(const std::vector<int64_t>& keep) const {
    check(keep);
    const Kept kept = counts_.kept(keep);
    const auto pairs = [](const std::vector<Bounds>& bounds) {
      Pairs out;
      for (const Bounds& b : bounds) out.emplace_back(b.least, b.most);
      return out;
    };
    std::vector<double> thresholds;
    for (size_t m = 0; m < kept.low.size(); ++m)
      thresholds.push_back(kept.low[m] == kept.high[m] ? kept.low[m] : std::numeric_limits<double>::quiet_NaN());
    return {pairs(kept.sets), pairs(kept.parts), pairs(kept.nonzero), thresholds};
  }
  bool close_in(const std::vector<int64_t>& least, const std::vector<int64_t>& most) {
    check(least), check(most);
    return counts_.close_in(least, most);
  }
  std::vector<std::pair<int64_t, double>> curve(int64_t part) const {
    if (part < 0 || part >= counts_.parts()) throw py::index_error("no such part");
    return counts_.curve(part);
  }

 private:
  static std::vector<Part> parts_of(const std::vector<std::tuple<int32_t, int64_t>>& given) {
    std::vector<Part> parts;
    for (const auto& [set, total] : given) parts.push_back({set, total});
    return parts;
  }
  static std::vector<Set> sets_of(const std::vector<std::tuple<int32_t, int64_t, int64_t>>& given) {
    std::vector<Set> sets;
    for (const auto& [layer, least, most] : given) sets.push_back({layer, least, most});
    return sets;
  }
  void check(const std::vector<int64_t>& keep) const {
    if (static_cast<int64_t>(keep.size()) != counts_.modules())
      throw py::value_error("keep must have one entry for each of the " + std::to_string(counts_.modules()) +
                            " modules, got " + std::to_string(keep.size()));
  }

  Counts counts_;
};

}  // namespace

void bind_counts(py::module_& m) {
  m.def("survey", &survey, py::arg("files"), py::arg("tensors"), py::arg("windows"), py::arg("bins"), py::kw_only(),
        py::arg("threads") = 0, py::arg("rank") = 0, py::arg("size") = 1, py::arg("exchange") = py::none(),
        py::arg("progress") = py::none(), py::arg("norms") = std::vector<NormsTuple>{});
  py::class_<PythonCounts>(m, "Counts", "How many weights of each part a pruning keeps, for any `keep`.")
      .def(py::init<const std::vector<std::tuple<int32_t, int64_t>>&,
                    const std::vector<std::tuple<int32_t, int64_t, int64_t>>&, std::vector<int32_t>,
                    std::vector<int32_t>, int64_t, uint32_t, uint32_t>(),
           py::arg("parts"), py::arg("sets"), py::arg("modules"), py::arg("granularities"), py::arg("bins"),
           py::arg("first"), py::arg("last"))
      .def("windows", &PythonCounts::windows)
      .def("take", &PythonCounts::take, py::arg("rows"))
      .def("kept", &PythonCounts::kept, py::arg("keep"))
      .def("close_in", &PythonCounts::close_in, py::arg("keep_least"), py::arg("keep_most"))
      .def("curve", &PythonCounts::curve, py::arg("part"));
}

}  // namespace dimap::python
