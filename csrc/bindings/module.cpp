// The engine on files and shards, and how the package was built. No torch here: the operators are torch.ops.dimap.
//
// This file declares and converts; what it binds is in cpu/files and cpu/select. python/dimap/_C.pyi documents it.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <bit>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "core/counts.h"
#include "core/wire.h"
#include "cpu/files/elements.h"
#include "cpu/files/expand.h"
#include "cpu/files/groups.h"
#include "cpu/files/prune.h"
#include "cpu/isa/decide.h"
#include "cpu/sparse/pack.h"
#include "cpu/sparse/planes.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;
using namespace dimap;

namespace {

// What Python gives

using Files = std::vector<std::tuple<int, std::string>>;  // descriptor, path
using Progress = std::optional<std::function<void(const std::string&, int64_t, int64_t)>>;
using Sum = std::function<void(py::memoryview)>;
using TensorTuple = std::tuple<int32_t, int64_t, int64_t, int, int32_t>;        // file, offset, weights, dtype, layer
using Piece = std::function<void(int32_t, int64_t, py::memoryview)>;            // file, where in its output, bytes
using ElementTuple = std::tuple<int32_t, int64_t, int64_t, int64_t, uint64_t>;  // file, offset, count, size, mask

using PatternTuple = std::tuple<int64_t, int64_t, int64_t>;  // n, m, inner
using NormsTuple = std::tuple<py::buffer, int64_t>;          // float32, inner

std::vector<File> files_of(const Files& given) {
  std::vector<File> files;
  for (const auto& [descriptor, path] : given) files.push_back({descriptor, path});
  return files;
}

DType dtype_of(int number) {
  if (number < 0 || number > 2)
    throw py::value_error("dtype must be 0, 1 or 2 (float32, bfloat16, float16), got " + std::to_string(number));
  return static_cast<DType>(number);
}

cpu::ThreadPool::Watch watch_of(Progress progress) {
  return [progress = std::move(progress)](const char* step, int64_t done, int64_t bytes) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (*step && progress && *progress) (*progress)(step, done, bytes);
  };
}

class PythonExchange final : public Exchange {
 public:
  explicit PythonExchange(Sum sum) : sum_(std::move(sum)) {}
  void sum(std::span<int64_t> numbers) const override {
    const py::gil_scoped_acquire gil;
    const auto n = static_cast<py::ssize_t>(numbers.size());
    if (n > 0) sum_(py::memoryview::from_buffer(numbers.data(), {n}, {py::ssize_t{8}}));
  }

 private:
  Sum sum_;
};

std::unique_ptr<Exchange> exchange_of(std::optional<Sum> sum) {
  if (!sum) return nullptr;
  return std::make_unique<PythonExchange>(std::move(*sum));
}

// Tensors in files, which may have norms.
void set_tensors(Problem& problem, const Files& files, const std::vector<TensorTuple>& tensors,
                 const std::vector<NormsTuple>& norms) {
  problem.files = files_of(files);
  for (const auto& [file, offset, numel, dtype, layer] : tensors)
    problem.tensors.push_back({nullptr, numel, dtype_of(dtype), layer, file, offset});
  if (norms.empty()) return;
  if (norms.size() != tensors.size())
    throw py::value_error("norms must have one entry for each of the " + std::to_string(tensors.size()) +
                          " tensors, or none, got " + std::to_string(norms.size()));
  for (size_t t = 0; t < norms.size(); ++t) {
    const auto& [values, inner] = norms[t];
    const py::buffer_info info = values.request();
    const auto* begin = static_cast<const float*>(info.ptr);
    const int64_t size = info.size * info.itemsize / 4;
    if ((size < 1 || inner < 1) && problem.tensors[t].numel > 0)
      throw py::value_error("norms[" + std::to_string(t) + "] must fit its tensor");
    problem.tensors[t].dtype = DType::kFloat32;
    problem.tensors[t].norms = std::make_shared<const Norms>(Norms{{begin, begin + size}, inner});
  }
}

// Layers, modules and what they keep; the totals come from the tensors, or are given.
void set_modules(Problem& problem, const std::vector<int64_t>& modules, const std::vector<int64_t>& keep,
                 const std::optional<std::vector<int64_t>>& totals) {
  for (const int64_t m : modules) {
    if (m < 0 || m >= static_cast<int64_t>(keep.size()))
      throw py::value_error("modules must be in [0, " + std::to_string(keep.size()) + "), got " + std::to_string(m));
    problem.layer_module.push_back(static_cast<int32_t>(m));
  }
  problem.keep = keep;
  for (const TensorView& t : problem.tensors)
    if (t.layer < 0 || static_cast<size_t>(t.layer) >= modules.size())
      throw py::value_error("layers must be in [0, " + std::to_string(modules.size()) + "), got " +
                            std::to_string(t.layer));
  problem.count();
  if (totals) {
    if (totals->size() != modules.size())
      throw py::value_error("totals must have one entry for each of the " + std::to_string(modules.size()) +
                            " layers, got " + std::to_string(totals->size()));
    problem.layer_total = *totals;
    std::fill(problem.module_total.begin(), problem.module_total.end(), 0);
    for (size_t l = 0; l < modules.size(); ++l) problem.module_total[problem.layer_module[l]] += (*totals)[l];
  }
  for (size_t m = 0; m < keep.size(); ++m)
    if (keep[m] < 0 || keep[m] > problem.module_total[m])
      throw py::value_error("keep[" + std::to_string(m) + "] must be in [0, " +
                            std::to_string(problem.module_total[m]) + "], got " + std::to_string(keep[m]));
}

std::vector<cpu::Elements> elements_of(const std::vector<ElementTuple>& given) {
  std::vector<cpu::Elements> elements;
  for (const auto& [file, offset, count, size, mask] : given) elements.push_back({file, offset, count, size, mask});
  return elements;
}

// What Python gets

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
      write_window({counts_.windows()[l], counts_.granularity(static_cast<int32_t>(l))}, &*rows.end() - kWindowColumns);
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

std::vector<int64_t> count_nonzero(const Files& files, const std::vector<ElementTuple>& tensors, int threads,
                                   Progress progress) {
  const cpu::ThreadPool pool(threads, watch_of(std::move(progress)));
  const py::gil_scoped_release release;
  return cpu::count_nonzero(files_of(files), elements_of(tensors), pool);
}

std::vector<std::tuple<int64_t, std::vector<int>>> count_groups(
    const Files& files,
    const std::vector<std::tuple<int32_t, int64_t, int64_t, uint64_t, int64_t, int64_t, int64_t>>& tensors, int threads,
    Progress progress) {
  std::vector<cpu::Grid3> grids;
  for (const auto& [file, offset, size, mask, outer, length, inner] : tensors)
    grids.push_back({file, offset, size, mask, outer, length, inner});
  const cpu::ThreadPool pool(threads, watch_of(std::move(progress)));
  std::vector<cpu::Most> found;
  {
    const py::gil_scoped_release release;
    found = cpu::count_groups(files_of(files), grids, pool);
  }
  std::vector<std::tuple<int64_t, std::vector<int>>> out;
  for (const cpu::Most& one : found) out.emplace_back(one.nonzero, std::vector<int>(one.most.begin(), one.most.end()));
  return out;
}

void expand(
    const Files& files, const Files& targets,
    const std::vector<std::tuple<int32_t, int64_t, int64_t, int32_t, int64_t, int64_t, int64_t, int64_t>>& tensors,
    const std::vector<std::tuple<int32_t, int64_t, int64_t, int64_t>>& rest, int threads, Progress progress) {
  std::vector<cpu::Packed> packed;
  for (const auto& [file, values, count, bits_file, bits, numel, size, place] : tensors)
    packed.push_back({file, values, count, bits_file, bits, numel, size, place});
  std::vector<cpu::Copied> copied;
  for (const auto& [file, offset, bytes, place] : rest) copied.push_back({file, offset, bytes, place});
  const cpu::ThreadPool pool(threads, watch_of(std::move(progress)));
  const py::gil_scoped_release release;
  cpu::expand(files_of(files), files_of(targets), packed, copied, pool);
}

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

// How it was built

py::object or_none(const std::string& s) { return s.empty() ? py::object(py::none()) : py::str(s); }

py::dict build_info() {
  py::dict info;
  info["version"] = DIMAP_VERSION;
  info["compiler"] = DIMAP_COMPILER;
  info["torch"] = DIMAP_TORCH_BUILT_WITH;
  info["torch_target"] = DIMAP_TORCH_TARGET;
  info["cuda"] = or_none(DIMAP_CUDA_VERSION);
  info["cuda_architectures"] = or_none(DIMAP_CUDA_ARCHITECTURES);
  const cpu::Kernels* available[3];
  const int n = cpu::available_kernels(available);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(available[i]->name);
  info["instruction_sets"] = names;
  info["instruction_set"] = cpu::kernels().name;
  return info;
}

// Errors carry their parts; Python makes sentences of them.
void raise(PyObject* kind, const py::tuple& parts) { PyErr_SetObject(kind, parts.ptr()); }

void translate(std::exception_ptr error) {
  const py::module_ self = py::module_::import("dimap._C");
  try {
    if (error) std::rethrow_exception(error);
  } catch (const NonFinite& e) {
    raise(self.attr("NonFiniteError").ptr(), py::make_tuple(e.tensor, e.index, e.name));
  } catch (const cpu::Changed& e) {
    raise(self.attr("ChangedError").ptr(), py::make_tuple(e.tensor));
  } catch (const cpu::BadBits& e) {
    raise(self.attr("BitsError").ptr(), py::make_tuple(e.tensor, e.required, e.got));
  } catch (const cpu::FileError& e) {
    raise(PyExc_OSError, py::make_tuple(e.code, e.what(), e.path));
  }
}

void add_error(py::module_& m, const char* name, const char* doc) {
  const std::string full = std::string("dimap._C.") + name;
  m.attr(name) =
      py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(full.c_str(), doc, PyExc_ValueError, nullptr));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The engine on files and shards, without torch; how dimap was built and what it can run on.";
  m.attr("__version__") = DIMAP_VERSION;
  add_error(m, "NonFiniteError", "A NaN or an infinity: (tensor, flat index, 'nan', 'inf' or '-inf').");
  add_error(m, "ChangedError", "A file changed between two readings: (tensor,).");
  add_error(m, "BitsError", "Bits that do not fit their values: (tensor, values as the bits say, values).");
  py::register_local_exception_translator(&translate);

  m.def(
      "build_info", &build_info,
      "Version, compiler, torch (built beside, ABI targeted), CUDA version and architectures (None: built without), "
      "and the instruction sets that this processor has; 'instruction_set' is the one in use (DIMAP_ISA forces one).");
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
  m.def("count_nonzero", &count_nonzero, py::arg("files"), py::arg("tensors"), py::kw_only(), py::arg("threads") = 0,
        py::arg("progress") = py::none());
  m.def("count_groups", &count_groups, py::arg("files"), py::arg("tensors"), py::kw_only(), py::arg("threads") = 0,
        py::arg("progress") = py::none());
  m.def("expand", &expand, py::arg("files"), py::arg("targets"), py::arg("tensors"), py::arg("rest"), py::kw_only(),
        py::arg("threads") = 0, py::arg("progress") = py::none());
  m.def("pack_bits", &pack_bits, py::arg("mask"));
  m.def("threads", [] { return cpu::ThreadPool(0).workers(); });
  m.def("split", &split, py::arg("data"), py::arg("size"));
  m.def("merge", &merge, py::arg("content"), py::arg("size"), py::arg("out"));
}
