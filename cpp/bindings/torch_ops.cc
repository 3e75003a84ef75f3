// The CPU kernels of torch.ops.foveal.*: torch tensors -> AttentionProblem -> core, without torch's headers.
//
// The dispatcher calls a boxed kernel without the GIL. Its arguments and results are words on a stack (torch_shim.h).
//
// Errors: what a C++ exception becomes in Python differs between torch versions (2.13 maps std::invalid_argument to
// ValueError, 2.15 does not), so a kernel's entry throws std::runtime_error, a RuntimeError everywhere, and leaves the
// Status behind for this thread; foveal.attention turns it into the exception that NumPy callers meet.
#include "bindings/torch_ops.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "attention/rejection.h"
#include "attention/threads.h"
#include "bindings/errors.h"
#include "bindings/gil.h"
#include "bindings/torch_arguments.h"
#include "foveal/attention.h"

namespace py = pybind11;

namespace foveal {
namespace {

using namespace torch_shim;

// --- Ctrl-C ----------------------------------------------------------------------------------------------------------

// What a signal handler raised inside a kernel, until Python can raise it; touched with the GIL, on the main thread.
py::error_already_set* interrupt = nullptr;

int raise_interrupt(void*) {
  if (interrupt == nullptr) return 0;
  interrupt->restore();
  delete std::exchange(interrupt, nullptr);
  return -1;
}

// The exception cannot pass through the dispatcher. foveal.attention fetches it; after a direct or compiled call of the
// op the interpreter raises it as soon as it is back in Python.
bool run_signal_handlers(void*) {
  const TakenGil gil;
  if (PyErr_CheckSignals() == 0) return false;
  delete std::exchange(interrupt, new py::error_already_set());
  Py_AddPendingCall(raise_interrupt, nullptr);
  return true;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

ExecutionOptions execution_options() {
  uint32_t torch_threads = 0;
  require(torch.torch_get_num_threads(&torch_threads), "give its number of threads");
  Status status;
  ExecutionOptions options;
  options.num_threads = num_threads(static_cast<int>(torch_threads), status);
  options.interrupted = run_signal_handlers;
  if (!status.ok()) fail(std::move(status));
  return options;
}

template <class Pass>
void execute(Pass pass) {
  Status status = pass(execution_options());
  stay_if_finalizing();
  if (!status.ok()) fail(std::move(status));
}

struct Results {
  Tensor out, lse, weights;  // none where not asked for; `out` when it was given
  std::vector<Tensor> statistics;
};

constexpr Result kRowStatistics[] = {Result::kEntropy, Result::kMass, Result::kMaxWeight, Result::kThreshold,
                                     Result::kArgmax};

Tensor make_result(CanonicalProblem& problem, Result result, int64_t top_k = 0) {
  const TensorView wanted = problem.wanted(result, top_k);
  TensorView view;
  Tensor made = allocate(wanted.dtype, wanted.shape, wanted.rank, view);
  problem.take(result, view);
  return made;
}

template <class Pass>
Results results_of(CanonicalProblem& problem, bool with_lse, bool with_weights, Pass pass,
                   bool with_statistics = false) {
  const auto make = [&](Result result) { return make_result(problem, result); };
  Results results;
  if (!problem.out.present()) results.out = make(Result::kOut);
  if (with_lse) results.lse = make(Result::kLse);
  if (with_weights) results.weights = make(Result::kWeights);
  if (with_statistics)
    for (const Result result : kRowStatistics) results.statistics.push_back(make(result));
  execute(pass);
  return results;
}

// Judged by the rules for callers, or the kernel ends here.
template <class... Given>
auto canonical(const Given&... given) {
  Status status;
  auto judged = canonicalize(given..., status);
  if (!status.ok()) fail(std::move(status));
  return judged;
}

Results compute(const AttentionProblem& given, bool with_lse, bool with_weights, bool with_statistics = false) {
  CanonicalProblem problem = canonical(given);
  return results_of(
      problem, with_lse, with_weights,
      [&](const ExecutionOptions& options) { return attention_forward(problem, options); }, with_statistics);
}

StableIValue result(Tensor& tensor) { return reinterpret_cast<StableIValue>(tensor.release()); }

// A schema has one type for each result: weights that nobody asked for are an empty tensor.
StableIValue result_or_empty(Tensor& tensor, DType dtype) {
  constexpr int64_t kNone = 0;
  TensorView view;
  if (!tensor) tensor = allocate(dtype, &kNone, 1, view);
  return result(tensor);
}

void attention_plain(StableIValue* stack) {
  ArgumentReader read(stack);
  const Tensor q = read.tensor(), k = read.tensor(), v = read.tensor();
  const bool causal = read.boolean();
  const std::optional<double> scale = read.optional_real();
  AttentionProblem problem;
  problem.q = view_of("q", q);
  problem.k = view_of("k", k);
  problem.v = view_of("v", v);
  problem.causal = causal;
  problem.has_scale = scale.has_value();
  problem.scale = scale.value_or(0.0);
  Results results = compute(problem, false, false);
  stack[0] = result(results.out);
}

struct ForwardArguments : ProblemArguments {
  explicit ForwardArguments(ArgumentReader& read) {
    read_all(read);
    return_weights = read.boolean();
  }

  bool return_weights;
};

void attention_forward_boxed(StableIValue* stack) {
  ArgumentReader read(stack);
  ForwardArguments arguments(read);
  AttentionProblem problem = problem_of(arguments);
  Results results = compute(problem, true, arguments.return_weights);
  stack[2] = result_or_empty(results.weights, problem.q.dtype);
  stack[1] = result(results.lse);
  stack[0] = result(results.out);
}

void attention_forward_stats(StableIValue* stack) {
  ArgumentReader read(stack);
  ForwardArguments arguments(read);
  AttentionProblem problem = problem_of(arguments);
  Results results = compute(problem, true, arguments.return_weights, true);
  for (size_t x = 0; x < results.statistics.size(); ++x) stack[3 + x] = result(results.statistics[x]);
  stack[2] = result_or_empty(results.weights, problem.q.dtype);
  stack[1] = result(results.lse);
  stack[0] = result(results.out);
}

// Of q, k and the options; no values are read.
void attention_stats_op(StableIValue* stack) {
  ArgumentReader read(stack);
  ProblemArguments arguments;
  arguments.q = read.tensor();
  arguments.k = read.tensor();
  arguments.read_arrays(read);
  arguments.read_dense_arrays(read);
  arguments.read_numbers(read);
  arguments.bshd = read.boolean();
  const int64_t top_k = read.integer();
  AttentionProblem given = problem_of(arguments, /*with_values=*/false);
  CanonicalProblem problem = canonical(given);
  if (top_k < 0 || top_k > problem.k.shape[2])
    fail({ErrorKind::kValue,
          "top_k is " + std::to_string(top_k) + ", expected 0 to Skv = " + std::to_string(problem.k.shape[2])});
  std::vector<Tensor> results;
  for (const Result result : kRowStatistics) results.push_back(make_result(problem, result));
  for (const Result result : {Result::kKeyMass, Result::kTopKeys, Result::kTopWeights})
    results.push_back(make_result(problem, result, top_k));
  execute([&](const ExecutionOptions& options) { return attention_forward(problem, options); });
  for (size_t x = 0; x < results.size(); ++x) stack[x] = result(results[x]);
}

void attention_forward_out_boxed(StableIValue* stack) {
  ArgumentReader read(stack);
  const Tensor out = read.tensor();
  ForwardArguments arguments(read);
  AttentionProblem problem = problem_of(arguments);
  problem.out = view_of("out", out);
  require(torch.torch_get_mutable_data_ptr(out.get(), &problem.out.data), "give a pointer");
  Results results = compute(problem, true, arguments.return_weights);
  stack[1] = result_or_empty(results.weights, problem.q.dtype);
  stack[0] = result(results.lse);
}

// What every backward op begins with.
struct SavedArguments {
  explicit SavedArguments(ArgumentReader& read)
      : dout(read.tensor()), dlse(read.optional_tensor()), out(read.tensor()), lse(read.tensor()) {}

  Tensor dout, dlse, out, lse;
};

// What every backward op ends with.
struct WantedGradients {
  explicit WantedGradients(ArgumentReader& read)
      : bias(read.boolean()),
        sinks(read.boolean()),
        gate(read.boolean()),
        span(read.boolean()),
        u(read.boolean()),
        dentropy(read.optional_tensor()),
        entropy(read.optional_tensor()),
        mass(read.optional_tensor()) {}

  bool bias, sinks, gate, span, u;
  Tensor dentropy, entropy, mass;
};

// Puts (dq, dk, dv, dbias, dsinks, dgate_tau, dgate_temperature, dspan, du) on the stack.
void differentiate(StableIValue* stack, AttentionProblem& problem, const SavedArguments& saved,
                   const WantedGradients& wanted) {
  const DType dtype = problem.q.dtype, accumulator = accumulator_of(dtype);
  const auto allocate_like = [](const TensorView& view, DType of, TensorView& gradient) {
    if (view.rank > kMaxRank) throw std::runtime_error("too many dimensions");
    return allocate(of, view.shape, view.rank, gradient);
  };
  problem.out = view_of("out", saved.out);
  problem.lse = view_of("lse", saved.lse);
  problem.entropy = optional_view("entropy", wanted.entropy);
  problem.mass = optional_view("mass", wanted.mass);
  AttentionGradients given;
  given.dout = view_of("dout", saved.dout);
  given.dlse = optional_view("dlse", saved.dlse);
  given.dentropy = optional_view("dentropy", wanted.dentropy);
  Tensor dq = allocate_like(problem.q, dtype, given.dq);
  Tensor dk = allocate_like(problem.k, dtype, given.dk);
  Tensor dv = allocate_like(problem.v, dtype, given.dv);
  Tensor dbias, dsinks, dgate_tau, dgate_temperature, dspan, du;
  const auto allocate_if = [&](bool asked, const TensorView& option, Tensor& made, TensorView& gradient) {
    if (asked && option.present()) made = allocate_like(option, accumulator, gradient);
  };
  allocate_if(wanted.bias, problem.bias, dbias, given.dbias);
  allocate_if(wanted.sinks, problem.sinks, dsinks, given.dsinks);
  allocate_if(wanted.gate, problem.gate_tau, dgate_tau, given.dgate_tau);
  allocate_if(wanted.gate, problem.gate_temperature, dgate_temperature, given.dgate_temperature);
  allocate_if(wanted.span, problem.span, dspan, given.dspan);
  allocate_if(wanted.u, problem.additive, du, given.dadditive);
  const CanonicalGradients gradients = canonical(problem, given);
  execute([&](const ExecutionOptions& options) { return attention_backward(gradients, options); });
  stack[8] = result_or_empty(du, accumulator);
  stack[7] = result_or_empty(dspan, accumulator);
  stack[6] = result_or_empty(dgate_temperature, accumulator);
  stack[5] = result_or_empty(dgate_tau, accumulator);
  stack[4] = result_or_empty(dsinks, accumulator);
  stack[3] = result_or_empty(dbias, accumulator);
  stack[2] = result(dv);
  stack[1] = result(dk);
  stack[0] = result(dq);
}

void attention_backward_boxed(StableIValue* stack) {
  ArgumentReader read(stack);
  const SavedArguments saved(read);
  ProblemArguments arguments;
  arguments.read_all(read);
  const WantedGradients wanted(read);
  AttentionProblem problem = problem_of(arguments);
  differentiate(stack, problem, saved, wanted);
}

struct VarlenArguments : ProblemArguments {
  explicit VarlenArguments(ArgumentReader& read) {
    read_qkv(read);
    cu_seqlens_q = read.tensor();
    cu_seqlens_kv = read.tensor();
    read_arrays(read);
    read_numbers(read);
    bshd = true;
  }

  Tensor cu_seqlens_q, cu_seqlens_kv;
};

AttentionProblem varlen_problem_of(VarlenArguments& arguments) {
  AttentionProblem problem = problem_of(arguments);
  problem.cu_seqlens_q = view_of("cu_seqlens_q", arguments.cu_seqlens_q);
  problem.cu_seqlens_kv = view_of("cu_seqlens_kv", arguments.cu_seqlens_kv);
  return problem;
}

void attention_varlen_forward(StableIValue* stack) {
  ArgumentReader read(stack);
  VarlenArguments arguments(read);
  AttentionProblem problem = varlen_problem_of(arguments);
  Results results = compute(problem, true, false);
  stack[1] = result(results.lse);
  stack[0] = result(results.out);
}

void attention_varlen_backward(StableIValue* stack) {
  ArgumentReader read(stack);
  const SavedArguments saved(read);
  VarlenArguments arguments(read);
  const WantedGradients wanted(read);
  AttentionProblem problem = varlen_problem_of(arguments);
  differentiate(stack, problem, saved, wanted);
}

void attention_kvcache_op(StableIValue* stack) {
  ArgumentReader read(stack);
  ProblemArguments arguments;
  arguments.read_qkv(read);
  const Tensor cache_lens = read.tensor(), k = read.optional_tensor(), v = read.optional_tensor();
  const Tensor block_table = read.optional_tensor(), cache_batch_idx = read.optional_tensor();
  const Tensor k_scale = read.optional_tensor(), v_scale = read.optional_tensor();
  const Tensor rotary_cos = read.optional_tensor(), rotary_sin = read.optional_tensor();
  CacheUpdate given;
  given.rotary_interleaved = read.boolean();
  arguments.read_arrays(read);
  arguments.read_numbers(read);
  AttentionProblem problem = problem_of(arguments);
  problem.layout = Layout::kBshd;
  problem.kv_lens = view_of("cache_lens", cache_lens);
  problem.block_table = optional_view("block_table", block_table);
  problem.k_scale = optional_view("k_scale", k_scale);
  problem.v_scale = optional_view("v_scale", v_scale);
  given.k = optional_view("k", k);
  given.v = optional_view("v", v);
  given.rotary_cos = optional_view("rotary_cos", rotary_cos);
  given.rotary_sin = optional_view("rotary_sin", rotary_sin);
  given.cache_batch_idx = optional_view("cache_batch_idx", cache_batch_idx);
  if (given.k.present()) {
    require(torch.torch_get_mutable_data_ptr(arguments.k.get(), &problem.k.data), "give a pointer");
    require(torch.torch_get_mutable_data_ptr(arguments.v.get(), &problem.v.data), "give a pointer");
  }
  CanonicalUpdate update = canonical(problem, given);
  Results results = results_of(update.problem, true, false,
                               [&](const ExecutionOptions& options) { return attention_kvcache(update, options); });
  stack[1] = result(results.lse);
  stack[0] = result(results.out);
}

// Errors name the function that the op is of.
template <void (*kernel)(StableIValue*), const auto& function>
void boxed_as(StableIValue* stack, uint64_t, uint64_t) {
  try {
    kernel(stack);
  } catch (Rejection& rejection) {
    last_failure = std::move(rejection.status).of(function);
    throw std::runtime_error(last_failure.message());
  } catch (const std::runtime_error& error) {  // torch's own
    throw std::runtime_error(std::string(function) + ": " + error.what());
  }
}

constexpr char kDense[] = "attention", kVarlen[] = "attention_varlen", kCache[] = "attention_kvcache",
               kStats[] = "attention_stats";

// --- Python ----------------------------------------------------------------------------------------------------------

// Returns what the ops still lack: "" or the library or symbol that is missing.
std::string register_torch_ops(const std::vector<std::string>& libraries) {
  if (std::string missing = find_functions(libraries, torch); !missing.empty()) return missing;
  read_codes();
  static TorchLibraryHandle library = nullptr;  // kept: the registrations end with it
  require(torch.aoti_torch_library_init_impl("foveal", "CPU", "torch_ops.cc", __LINE__, &library), "open a library");
  const auto implement = [](const char* name, BoxedKernel kernel) {
    require(torch.torch_library_impl(library, name, kernel, kConventionVersion), "register a kernel");
  };
  implement("attention_plain", boxed_as<attention_plain, kDense>);
  implement("attention_forward", boxed_as<attention_forward_boxed, kDense>);
  implement("attention_forward_stats", boxed_as<attention_forward_stats, kDense>);
  implement("attention_stats", boxed_as<attention_stats_op, kStats>);
  implement("attention_forward_out", boxed_as<attention_forward_out_boxed, kDense>);
  implement("attention_backward", boxed_as<attention_backward_boxed, kDense>);
  implement("attention_varlen_forward", boxed_as<attention_varlen_forward, kVarlen>);
  implement("attention_varlen_backward", boxed_as<attention_varlen_backward, kVarlen>);
  implement("attention_kvcache", boxed_as<attention_kvcache_op, kCache>);
  return "";
}

// The exception that the kernel whose RuntimeError says `message` meant; None when the error came from elsewhere.
py::object take_torch_failure(const std::string& message) {
  const Status failure = std::exchange(last_failure, {});
  if (failure.ok() || message.find(failure.message()) == std::string::npos) return py::none();
  if ((failure.kind == ErrorKind::kInterrupted || failure.kind == ErrorKind::kForked) && interrupt != nullptr) {
    const py::object raised = interrupt->value();
    delete std::exchange(interrupt, nullptr);
    return raised;
  }
  return py::handle(exception_class(failure.kind))(failure.message());
}

}  // namespace

void bind_torch_ops(py::module_& module) {
  module.def(
      "register_torch_ops", &register_torch_ops, py::arg("libraries"), py::pos_only(),
      "Give torch.ops.foveal their CPU kernels. Returns the library or symbol that is missing, or an empty string.");
  module.def("take_torch_failure", &take_torch_failure, py::arg("message"), py::pos_only(),
             "The exception that the kernel whose RuntimeError says `message` meant, if any.");
}

}  // namespace foveal
