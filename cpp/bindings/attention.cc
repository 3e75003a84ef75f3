// foveal.attention on NumPy and DLPack arrays: Python arguments -> AttentionProblem -> results.
//
// A plain C function with positional arguments: pybind11's dispatcher takes 0.16 us to hand over 18 arguments, where a
// whole call on tiny arrays takes 1.5. Its Python caller has the keywords and the defaults.
#include "bindings/attention.h"

#include <algorithm>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attention/rejection.h"
#include "attention/threads.h"
#include "bindings/array_in_out.h"
#include "bindings/attention_options.h"
#include "bindings/errors.h"
#include "bindings/gil.h"
#include "foveal/attention.h"

namespace py = pybind11;

namespace foveal {
namespace {

#define FOVEAL_ENUMERATOR(enumerator, name, statement) enumerator,
enum Argument {
  kQ,
  kK,
  kV,
  FOVEAL_OPTIONS(FOVEAL_ENUMERATOR, FOVEAL_ENUMERATOR) kOut,
  kReturnLse,
  kReturnWeights,
  kReturnStats,
  kNumArguments
};
#undef FOVEAL_ENUMERATOR

// What functions have beside, each block at a place of its own.
enum Boundary { kCuSeqlensQ, kCuSeqlensKv, kNumBoundaries };
enum Gradient {
  kLse,
  kDout,
  kDlse,
  kDentropy,
  kEntropy,
  kMass,
  kBiasGrad,
  kSinksGrad,
  kGateGrad,
  kSpanGrad,
  kUGrad,
  kNumGradients
};  // `out` is that of the forward pass
enum Update {
  kNewK,
  kNewV,
  kBlockTable,
  kCacheBatchIdx,
  kKScale,
  kVScale,
  kRotaryCos,
  kRotarySin,
  kRotaryInterleaved,
  kNumUpdates
};

// ---- scalars --------------------------------------------------------------------------------------------------------

bool is_true(py::handle value) {
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

// Python's bool or NumPy's: an integer or an array here is a mistake, such as a causal length.
bool to_bool(const char* name, py::handle value) {
  if (value.ptr() == Py_True) return true;
  if (value.ptr() == Py_False) return false;
  const std::string type = type_text(value);
  if (type != "numpy.bool" && type != "numpy.bool_") {
    reject_type(std::string(name) + " has type " + type + ", expected bool");
  }
  return is_true(value);
}

double to_double(const char* name, py::handle value) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number != -1.0 || PyErr_Occurred() == nullptr) return number;
  const bool overflow = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
  if (!overflow && PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
  PyErr_Clear();
  if (overflow) reject_value(std::string(name) + " is beyond float64, expected a finite number");
  reject_type(std::string(name) + " has type " + type_text(value) + ", expected a number");
}

// Without a seed dropout takes one from the system.
uint64_t to_seed(py::handle value, double dropout_p) {
  if (dropout_p == 0.0) return 0;
  if (value.is_none()) {
    std::random_device entropy;
    return uint64_t{entropy()} << 32 | entropy();
  }
  const py::object index = integer_of(value);
  if (!index) {
    PyErr_Clear();
    reject_type("seed has type " + type_text(value) + ", expected an integer or None");
  }
  int overflow = 0;
  const int64_t seed = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || seed < 0) {
    reject_value("seed is " + py::str(index).cast<std::string>() + ", expected 0 to 2^63 - 1");
  }
  return static_cast<uint64_t>(seed);
}

// One side of a window: None is unlimited here, so the core's own sign for it is no number to accept.
int64_t to_window_side(const char* name, py::handle value) {
  if (value.is_none()) return kUnlimited;
  const py::object index = integer_of(value);
  if (!index) {
    PyErr_Clear();
    reject_type(std::string(name) + " has type " + type_text(value) + ", expected an integer or None");
  }
  int overflow = 0;
  const int64_t width = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow > 0) return kUnlimited;
  if (overflow < 0 || width < 0) {
    reject_value(std::string(name) + " is " + py::str(index).cast<std::string>() + ", expected None or at least 0");
  }
  return width;
}

void read_window(py::handle window, AttentionProblem& problem) {
  if (!PyTuple_Check(window.ptr()) && !PyList_Check(window.ptr())) {
    reject_type("window has type " + type_text(window) + ", expected (left, right)");
  }
  const auto sides = py::reinterpret_borrow<py::sequence>(window);
  if (sides.size() != 2) {
    reject_value("window has " + std::to_string(sides.size()) + " items, expected (left, right)");
  }
  problem.window_left = to_window_side("window[0]", sides[0]);
  problem.window_right = to_window_side("window[1]", sides[1]);
}

Normalizer to_normalizer(py::handle name) {
  if (!PyUnicode_Check(name.ptr())) reject_type("normalizer has type " + type_text(name) + ", expected a string");
  std::string choices;
  for (int n = 0; n < kNormalizers; ++n) {
    if (PyUnicode_CompareWithASCIIString(name.ptr(), kNormalizerNames[n]) == 0) return static_cast<Normalizer>(n);
    choices += std::string(n == 0 ? "'" : n + 1 < kNormalizers ? ", '" : " or '") + kNormalizerNames[n] + "'";
  }
  reject_value("normalizer is " + py::repr(name).cast<std::string>() + ", expected " + choices);
}

void read_scale(py::handle scale, AttentionProblem& problem) {
  problem.has_scale = !scale.is_none();
  if (problem.has_scale) problem.scale = to_double("scale", scale);
}

Layout to_layout(py::handle layout) {
  if (!PyUnicode_Check(layout.ptr()))
    reject_type("layout has type " + type_text(layout) + ", expected 'bhsd' or 'bshd'");
  if (PyUnicode_CompareWithASCIIString(layout.ptr(), "bhsd") == 0) return Layout::kBhsd;
  if (PyUnicode_CompareWithASCIIString(layout.ptr(), "bshd") == 0) return Layout::kBshd;
  reject_value("layout is " + py::repr(layout).cast<std::string>() + ", expected 'bhsd' or 'bshd'");
}

// ---- the call -------------------------------------------------------------------------------------------------------

// By what name errors call it, and where its blocks begin; 0: it has none.
struct Function {
  const char* name;
  int num_arguments, boundaries = 0, gradients = 0, update = 0;
};
constexpr int kCommon = kNumArguments;
constexpr Function kAttention = {"attention", kCommon};
constexpr Function kBackward = {"attention", kCommon + int{kNumGradients}, 0, kCommon};
constexpr Function kVarlen = {"attention_varlen", kCommon + int{kNumBoundaries}, kCommon};
constexpr Function kVarlenBackward = {"attention_varlen", kVarlen.num_arguments + int{kNumGradients}, kCommon,
                                      kVarlen.num_arguments};
constexpr Function kStatistics = {"attention_stats", kCommon + 1};  // top_k
constexpr Function kCache = {"attention_kvcache", kCommon + int{kNumUpdates}, 0, 0, kCommon};

// Reads options that are arrays, None for those that are not given.
struct OptionReader {
  CallArrays& arrays;
  int64_t batch;
  const char* kv_lens;  // what the function calls them

  TensorView array(const char* name, py::handle value, Elements elements) const {
    return value.is_none() ? TensorView{} : arrays.view(name, value, elements);
  }
  TensorView integers(const char* name, py::handle value) const { return arrays.integers(name, value, batch); }
};

// Both sides of a pair such as (tau, T).
py::tuple to_pair(const char* name, const char* expected, py::handle value) {
  if (!PyTuple_Check(value.ptr()) && !PyList_Check(value.ptr()))
    reject_type(std::string(name) + " has type " + type_text(value) + ", expected " + expected);
  auto pair = py::reinterpret_steal<py::tuple>(PySequence_Tuple(value.ptr()));
  if (!pair) throw py::error_already_set();
  if (pair.size() != 2)
    reject_value(std::string(name) + " has " + std::to_string(pair.size()) + " items, expected " + expected);
  return pair;
}

void read_gate(py::handle gate, const OptionReader& read, AttentionProblem& problem) {
  if (gate.is_none()) return;
  const py::tuple pair = to_pair("gate", "(tau, T)", gate);
  problem.gate_tau = read.arrays.numbers("gate[0]", pair[0]);
  problem.gate_temperature = read.arrays.numbers("gate[1]", pair[1]);
}

void read_span(py::handle span, const OptionReader& read, AttentionProblem& problem) {
  if (span.is_none()) return;
  const py::tuple pair = to_pair("span", "(z, ramp)", span);
  problem.span = read.arrays.numbers("span[0]", pair[0]);
  problem.span_ramp = to_double("span[1]", pair[1]);
}

AttentionProblem read_problem(const Function& function, PyObject* const* arguments, CallArrays& arrays) {
  const auto argument = [arguments](int index) { return py::handle(arguments[index]); };
  const auto optional = [&](const char* name, int index, Elements elements, Access access = Access::kRead) {
    return argument(index).is_none() ? TensorView{} : arrays.view(name, argument(index), elements, access);
  };
  AttentionProblem problem;
#define FOVEAL_SKIP(enumerator, name, statement)
#define FOVEAL_READ(enumerator, name, statement)   \
  {                                                \
    const py::handle value = argument(enumerator); \
    statement;                                     \
  }
  FOVEAL_OPTIONS(FOVEAL_SKIP, FOVEAL_READ)

  problem.q = arrays.view("q", argument(kQ), Elements::kFloating);
  const bool cache = function.update != 0;
  const Access access = cache && !argument(function.update + kNewK).is_none() ? Access::kWrite : Access::kRead;
  problem.k = arrays.view(cache ? "k_cache" : "k", argument(kK), Elements::kFloating, access);
  problem.v = arrays.view(cache ? "v_cache" : "v", argument(kV), Elements::kFloating, access);
  int64_t batch = problem.q.rank == 4 ? problem.q.shape[0] : 1;
  if (function.boundaries != 0) {
    const auto boundaries = [&](const char* name, Boundary index) {
      return arrays.integers(name, argument(function.boundaries + index), CallArrays::kAnyCount);
    };
    problem.cu_seqlens_q = boundaries("cu_seqlens_q", kCuSeqlensQ);
    problem.cu_seqlens_kv = boundaries("cu_seqlens_kv", kCuSeqlensKv);
    for (const auto& [name, view] :
         {std::pair("cu_seqlens_q", &problem.cu_seqlens_q), std::pair("cu_seqlens_kv", &problem.cu_seqlens_kv)})
      if (!view->present()) reject_type(std::string(name) + " is None, expected (B + 1,) integers");
    batch = problem.cu_seqlens_q.shape[0] - 1;
  }
  const OptionReader read = {arrays, batch, cache ? "cache_lens" : "kv_lens"};
  FOVEAL_OPTIONS(FOVEAL_READ, FOVEAL_SKIP)
#undef FOVEAL_READ
#undef FOVEAL_SKIP
  problem.out = optional("out", kOut, Elements::kFloating, Access::kWrite);
  if (cache) {
    problem.block_table = arrays.table("block_table", argument(function.update + kBlockTable), batch);
    problem.k_scale = optional("k_scale", function.update + kKScale, Elements::kFloating);
    problem.v_scale = optional("v_scale", function.update + kVScale, Elements::kFloating);
  }
  return problem;
}

CacheUpdate read_update(PyObject* const* arguments, CallArrays& arrays, int64_t batch) {
  const auto optional = [&](const char* name, Update index) {
    const py::handle array = arguments[index];
    return array.is_none() ? TensorView{} : arrays.view(name, array, Elements::kFloating);
  };
  CacheUpdate update;
  update.k = optional("k", kNewK);
  update.v = optional("v", kNewV);
  update.rotary_cos = optional("rotary_cos", kRotaryCos);
  update.rotary_sin = optional("rotary_sin", kRotarySin);
  update.rotary_interleaved = to_bool("rotary_interleaved", arguments[kRotaryInterleaved]);
  update.cache_batch_idx = arrays.integers("cache_batch_idx", arguments[kCacheBatchIdx], batch);
  return update;
}

// `update`: null for a problem without one.
using Compute = Status (*)(const CanonicalProblem& problem, const CanonicalUpdate* update);

// As the core's own rejections, unless an exception is set already, as after an interrupt.
void reject_if_failed(const Status& status) {
  if (status.ok()) return;
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  throw Rejection{status};
}

// As arrays of the caller's kind.
py::tuple hand_over_all(const CallArrays& arrays, std::vector<py::object>& results) {
  py::tuple all(results.size());
  for (size_t x = 0; x < results.size(); ++x) all[x] = arrays.hand_over(std::move(results[x]));
  return all;
}

constexpr Result kRowStatistics[] = {Result::kEntropy, Result::kMass, Result::kMaxWeight, Result::kThreshold,
                                     Result::kArgmax};

// (out, lse, weights, statistics of the rows), None where not asked for; out alone when it is all that is asked for.
template <class Run>
py::object results_of(CanonicalProblem& problem, PyObject* const* arguments, const CallArrays& arrays, Run run) {
  const auto make = [&](Result result) {
    const TensorView wanted = problem.wanted(result);
    TensorView view;
    py::object made = arrays.allocate(wanted.dtype, wanted.shape, wanted.rank, view);
    problem.take(result, view);
    return made;
  };
  py::object out, lse, weights;
  if (!problem.out.present()) out = make(Result::kOut);
  if (is_true(arguments[kReturnLse])) lse = make(Result::kLse);
  if (is_true(arguments[kReturnWeights])) weights = make(Result::kWeights);
  std::vector<py::object> statistics;
  if (is_true(arguments[kReturnStats]))
    for (const Result result : kRowStatistics) statistics.push_back(make(result));

  reject_if_failed(run());

  out = out ? arrays.hand_over(std::move(out)) : py::reinterpret_borrow<py::object>(arguments[kOut]);
  if (!lse && !weights && statistics.empty()) return out;
  const auto or_none = [&](py::object& result) {
    return result ? arrays.hand_over(std::move(result)) : py::object(py::none());
  };
  return py::make_tuple(std::move(out), or_none(lse), or_none(weights),
                        statistics.empty() ? py::object(py::none()) : hand_over_all(arrays, statistics));
}

py::object run(const Function& function, PyObject* const* arguments, Compute compute) {
  CallArrays arrays(arguments[kQ]);
  const AttentionProblem given = read_problem(function, arguments, arrays);
  Status status;
  if (function.update != 0) {
    const int64_t batch = given.q.rank == 4 ? given.q.shape[0] : 1;
    CanonicalUpdate update = canonicalize(given, read_update(arguments + function.update, arrays, batch), status);
    reject_if_failed(status);
    return results_of(update.problem, arguments, arrays, [&] { return compute(update.problem, &update); });
  }
  CanonicalProblem problem = canonicalize(given, status);
  reject_if_failed(status);
  return results_of(problem, arguments, arrays, [&] { return compute(problem, nullptr); });
}

// ---- computing without the GIL --------------------------------------------------------------------------------------

// compute(options), interruptible.
template <class Compute>
Status compute_released(Compute compute) {
  Status status;
  ExecutionOptions options;
  options.num_threads = num_threads(0, status);
  if (!status.ok()) return status;
  ReleasedGil gil;
  options.interrupted = [](void* released) { return static_cast<ReleasedGil*>(released)->interrupted(); };
  options.interrupted_context = &gil;
  return compute(options);
}

Status compute_forward(const CanonicalProblem& problem, const CanonicalUpdate* update) {
  return compute_released([&](const ExecutionOptions& options) {
    return update != nullptr ? attention_kvcache(*update, options) : attention_forward(problem, options);
  });
}

Status compute_reference(const CanonicalProblem& problem, const CanonicalUpdate*) {
  const ReleasedGil gil;
  return attention_reference(problem);
}

Status compute_nothing(const CanonicalProblem&, const CanonicalUpdate*) { return {}; }

// (entropy, mass, max_weight, threshold, argmax, key_mass, top_keys, top_weights); the arguments have k for v.
py::object run_statistics(const Function& function, PyObject* const* arguments) {
  CallArrays arrays(arguments[kQ]);
  const AttentionProblem given = read_problem(function, arguments, arrays);
  Status status;
  CanonicalProblem problem = canonicalize(given, status);
  reject_if_failed(status);
  const py::object index = integer_of(arguments[kCommon]);
  if (!index) {
    PyErr_Clear();
    reject_type("top_k has type " + type_text(arguments[kCommon]) + ", expected an integer");
  }
  int overflow = 0;
  const int64_t top_k = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow), most = problem.k.shape[2];
  if (overflow != 0 || top_k < 0 || top_k > most)
    reject_value("top_k is " + py::str(index).cast<std::string>() + ", expected 0 to Skv = " + std::to_string(most));
  std::vector<py::object> results;
  const auto make = [&](Result result) {
    const TensorView wanted = problem.wanted(result, top_k);
    TensorView view;
    results.push_back(arrays.allocate(wanted.dtype, wanted.shape, wanted.rank, view));
    problem.take(result, view);
  };
  for (const Result result : kRowStatistics) make(result);
  for (const Result result : {Result::kKeyMass, Result::kTopKeys, Result::kTopWeights}) make(result);
  reject_if_failed(
      compute_released([&](const ExecutionOptions& options) { return attention_forward(problem, options); }));
  return hand_over_all(arrays, results);
}

// (dq, dk, dv, dbias, dsinks, dgate_tau, dgate_temperature, dspan, du), None where not asked for.
py::object run_backward(const Function& function, PyObject* const* arguments) {
  PyObject* const* own = arguments + function.gradients;
  CallArrays arrays(arguments[kQ]);
  AttentionProblem problem = read_problem(function, arguments, arrays);
  const DType dtype = problem.q.dtype, accumulator = accumulator_of(dtype);
  AttentionGradients g;
  problem.lse = arrays.view("lse", own[kLse], Elements::kFloating);
  g.dout = arrays.view("dout", own[kDout], Elements::kFloating);
  const auto optional = [&](const char* name, Gradient index) {
    return own[index] == Py_None ? TensorView{} : arrays.view(name, own[index], Elements::kFloating);
  };
  g.dlse = optional("dlse", kDlse);
  g.dentropy = optional("dentropy", kDentropy);
  problem.entropy = optional("entropy", kEntropy);
  problem.mass = optional("mass", kMass);
  py::object results[9];
  const auto allocate = [&](size_t index, const TensorView& like, DType of, TensorView& gradient) {
    results[index] = arrays.allocate(of, like.shape, like.rank, gradient);
  };
  allocate(0, problem.q, dtype, g.dq);
  allocate(1, problem.k, dtype, g.dk);
  allocate(2, problem.v, dtype, g.dv);
  if (problem.bias.present() && is_true(own[kBiasGrad])) allocate(3, problem.bias, accumulator, g.dbias);
  if (problem.sinks.present() && is_true(own[kSinksGrad])) allocate(4, problem.sinks, accumulator, g.dsinks);
  if (problem.gate_tau.present() && is_true(own[kGateGrad])) {
    allocate(5, problem.gate_tau, accumulator, g.dgate_tau);
    allocate(6, problem.gate_temperature, accumulator, g.dgate_temperature);
  }
  if (problem.span.present() && is_true(own[kSpanGrad])) allocate(7, problem.span, accumulator, g.dspan);
  if (problem.additive.present() && is_true(own[kUGrad])) allocate(8, problem.additive, accumulator, g.dadditive);
  Status status;
  const CanonicalGradients gradients = canonicalize(problem, g, status);
  reject_if_failed(status);
  reject_if_failed(
      compute_released([&](const ExecutionOptions& options) { return attention_backward(gradients, options); }));
  for (py::object& result : results) result = result ? arrays.hand_over(std::move(result)) : py::none();
  return py::make_tuple(results[0], results[1], results[2], results[3], results[4], results[5], results[6], results[7],
                        results[8]);
}

// ---- entry points ---------------------------------------------------------------------------------------------------

template <class Run>
PyObject* enter(const Function& function, PyObject* const* arguments, Py_ssize_t count, Run run) {
  try {
    if (count == function.num_arguments) return run(arguments).release().ptr();
    PyErr_Format(PyExc_TypeError, "%s: %zd positional arguments, expected %d", function.name, count,
                 function.num_arguments);
  } catch (Rejection& rejection) {
    set_error(std::move(rejection.status).of(function.name));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_Format(PyExc_MemoryError, "%s: out of memory", function.name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <Compute compute, const Function& function>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return enter(function, arguments, count, [](PyObject* const* given) { return run(function, given, compute); });
}

template <const Function& function>
PyObject* backward_entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return enter(function, arguments, count, [](PyObject* const* given) { return run_backward(function, given); });
}

PyObject* statistics_entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return enter(kStatistics, arguments, count,
               [](PyObject* const* given) { return run_statistics(kStatistics, given); });
}

#define FOVEAL_NAME(enumerator, name, statement) ", " #name
#define FOVEAL_SIGNATURE \
  "($module, q, k, v" FOVEAL_OPTIONS(FOVEAL_NAME, FOVEAL_NAME) ", out, return_lse, return_weights, return_stats"
#define FOVEAL_VARLEN ", cu_seqlens_q, cu_seqlens_kv"
#define FOVEAL_GRADIENTS \
  ", lse, dout, dlse, dentropy, entropy, mass, bias_grad, sinks_grad, gate_grad, span_grad, u_grad"
#define FOVEAL_CACHE \
  ", new_k, new_v, block_table, cache_batch_idx, k_scale, v_scale, rotary_cos, rotary_sin, rotary_interleaved"
#define FOVEAL_END ", /)\n--\n\n"

PyCFunction function_of(PyObject* (*entry)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry));
}

PyMethodDef methods[] = {
    {"attention", function_of(entry<compute_forward, kAttention>), METH_FASTCALL,
     "attention" FOVEAL_SIGNATURE FOVEAL_END "foveal.attention on arrays that are no torch tensors."},
    {"attention_reference", function_of(entry<compute_reference, kAttention>), METH_FASTCALL,
     "attention_reference" FOVEAL_SIGNATURE FOVEAL_END "The same by the plain float64 oracle."},
    {"check_attention", function_of(entry<compute_nothing, kAttention>), METH_FASTCALL,
     "check_attention" FOVEAL_SIGNATURE FOVEAL_END "Raise what `attention` raises when it refuses its arguments."},
    {"attention_stats", function_of(statistics_entry), METH_FASTCALL,
     "attention_stats" FOVEAL_SIGNATURE ", top_k" FOVEAL_END "foveal.attention_stats, likewise; v is k."},
    {"attention_varlen", function_of(entry<compute_forward, kVarlen>), METH_FASTCALL,
     "attention_varlen" FOVEAL_SIGNATURE FOVEAL_VARLEN FOVEAL_END "foveal.attention_varlen, likewise."},
    {"check_attention_varlen", function_of(entry<compute_nothing, kVarlen>), METH_FASTCALL,
     "check_attention_varlen" FOVEAL_SIGNATURE FOVEAL_VARLEN FOVEAL_END
     "Raise what `attention_varlen` raises when it refuses its arguments."},
    {"attention_kvcache", function_of(entry<compute_forward, kCache>), METH_FASTCALL,
     "attention_kvcache" FOVEAL_SIGNATURE FOVEAL_CACHE FOVEAL_END
     "foveal.attention_kvcache, likewise: k and v are the cache, kv_lens is cache_lens."},
    {"check_attention_kvcache", function_of(entry<compute_nothing, kCache>), METH_FASTCALL,
     "check_attention_kvcache" FOVEAL_SIGNATURE FOVEAL_CACHE FOVEAL_END
     "Raise what `attention_kvcache` raises when it refuses its arguments."},
    {"attention_varlen_backward", function_of(backward_entry<kVarlenBackward>), METH_FASTCALL,
     "attention_varlen_backward" FOVEAL_SIGNATURE FOVEAL_VARLEN FOVEAL_GRADIENTS FOVEAL_END
     "The gradients (dq, dk, dv, dbias, dsinks, dgate_tau, dgate_temperature, dspan, du), likewise."},
    {"attention_backward", function_of(backward_entry<kBackward>), METH_FASTCALL,
     "attention_backward" FOVEAL_SIGNATURE FOVEAL_GRADIENTS FOVEAL_END
     "The gradients (dq, dk, dv, dbias, dsinks, dgate_tau, dgate_temperature, dspan, du), from the out and lse of the "
     "forward pass."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_attention(py::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  py::tuple names(kNormalizers);
  for (int n = 0; n < kNormalizers; ++n) names[static_cast<size_t>(n)] = kNormalizerNames[n];
  module.attr("NORMALIZERS") = names;
}

}  // namespace foveal
