// The operators that a compiled model calls, on torch's stable ABI: one build serves every torch from 2.11 on.
//
//   kvc_native::load(...)        makes the kernels of a shared object known by their content hash
//   kvc_native::linears(...)     linear layers of one input; few tokens go to a generated kernel, many to torch
//   kvc_native::attend(...), attend_part(...)   attention over stores (attend_operator.cpp)
//   kvc_native::lookup(...)      the same for one token over keys that a sketch finds (lookup_operator.cpp)
//   kvc_native::sketch_*(...)    the parts of making a sketch (sketch_build.cpp)
//
// Kernels run on torch's own threads.
#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernel.h"
#include "operators.h"

namespace {

std::shared_mutex loading;
std::unordered_map<uint64_t, const KvcAttendKernel *> attend_kernels;
std::unordered_map<uint64_t, const KvcLinearKernel *> linear_kernels;
std::unordered_map<uint64_t, const KvcLookupKernel *> lookup_kernels;

// Loads a shared object of generated kernels; returns how many it holds.  A kernel is called by its content hash, of which the
// bits of `variant` are turned over: one request built for two instruction sets is two kernels.  What is known stays as it is.
int64_t load(std::string path, int64_t variant) {
  const std::unique_lock<std::shared_mutex> lock(loading);
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(library, "cannot load ", path, ": ", dlerror());
  using List = const KvcKernels *(*)();
  const List list = (List)dlsym(library, "kvc_kernels");
  STD_TORCH_CHECK(list, path, " holds no kernels of kvcompile");
  const KvcKernels *kernels = list();
  STD_TORCH_CHECK(kernels->version == kKernelVersion, path, " was made for another version of the launcher");
  for (int64_t i = 0; i < kernels->attends; i++) attend_kernels.insert({kernels->attend[i]->key ^ variant, kernels->attend[i]});
  for (int64_t i = 0; i < kernels->linears; i++) linear_kernels.insert({kernels->linear[i]->key ^ variant, kernels->linear[i]});
  for (int64_t i = 0; i < kernels->lookups; i++) lookup_kernels.insert({kernels->lookup[i]->key ^ variant, kernels->lookup[i]});
  return kernels->attends + kernels->linears + kernels->lookups;
}

// The kernel that was loaded under a key, or null.
template <class Kernel>
const Kernel *find_kernel(const std::unordered_map<uint64_t, const Kernel *> &kernels, uint64_t key) {
  const std::shared_lock<std::shared_mutex> lock(loading);
  const auto found = kernels.find(key);
  return found == kernels.end() ? nullptr : found->second;
}

Tensor linear_of_many(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
  StableIValue stack[] = {torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor concatenate(const std::vector<Tensor> &parts) {
  StableIValue stack[] = {torch::stable::detail::from(parts), torch::stable::detail::from(int64_t(-1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cat", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x [1, tokens, in], weights [out_i, in], biases none or [out_i] each: [1, tokens, sum of out_i].  AOTInductor hands an empty
// list over as none.
Tensor linears(const Tensor &any_x, const std::vector<Tensor> &weights, const std::optional<std::vector<Tensor>> &some_biases,
               std::string key) {
  const std::vector<Tensor> biases = some_biases.value_or(std::vector<Tensor>());
  const KvcLinearKernel *const found = find_kernel(linear_kernels, std::strtoull(key.c_str(), nullptr, 16));
  STD_TORCH_CHECK(found, "no kernel is loaded for these linear layers");
  const KvcLinearKernel &kernel = *found;
  STD_TORCH_CHECK(any_x.dim() == 3 && any_x.size(0) == 1, "x must be [1, tokens, in]");
  const Tensor x = any_x.is_contiguous() ? any_x : torch::stable::contiguous(any_x);
  STD_TORCH_CHECK(!weights.empty() && (biases.empty() || biases.size() == weights.size()),
                  "each weight or none must have a bias of its own");
  const int64_t tokens = x.size(1), in = x.size(2);
  const bool in_rows = std::all_of(weights.begin(), weights.end(), [](const Tensor &weight) { return weight.is_contiguous(); });
  if (tokens > kernel.max_tokens || tokens == 0 || !in_rows) {
    std::vector<Tensor> parts;
    for (size_t i = 0; i < weights.size(); i++)
      parts.push_back(linear_of_many(x, weights[i], biases.empty() ? std::nullopt : std::optional<Tensor>(biases[i])));
    return parts.size() == 1 ? parts[0] : concatenate(parts);
  }
  const ScalarType type = number_type(kernel.bytes);
  STD_TORCH_CHECK(x.scalar_type() == type, "x must be of the kernel's type");
  int64_t out = 0;
  for (size_t i = 0; i < weights.size(); out += weights[i++].size(0)) {
    const Tensor &weight = weights[i];
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in && weight.scalar_type() == type, "a weight of another size or type");
    STD_TORCH_CHECK(biases.empty() || (biases[i].dim() == 1 && biases[i].is_contiguous() && biases[i].size(0) == weight.size(0) &&
                                       biases[i].scalar_type() == type),
                    "a bias of another size or type");
  }
  Tensor y = torch::stable::new_empty(x, {1, tokens, out});
  constexpr int64_t kGrain = 8;  // rows of one thread are a multiple of it
  const int64_t grains = (out + kGrain - 1) / kGrain;
  const int64_t threads = out * in < 1 << 15 ? 1 : std::min<int64_t>(grains, torch::stable::get_num_threads());
  on_threads(threads, [&](int64_t thread, int64_t count) {
    const int64_t begin = grains * thread / count * kGrain, end = std::min(out, grains * (thread + 1) / count * kGrain);
    int64_t row = 0;
    for (size_t i = 0; i < weights.size(); row += weights[i++].size(0)) {
      const int64_t first = std::max(begin - row, int64_t(0)), last = std::min(end - row, weights[i].size(0));
      if (first < last)
        kernel.multiply(x.data_ptr(), tokens, in, weights[i].data_ptr(), biases.empty() ? nullptr : biases[i].data_ptr(),
                        (char *)y.data_ptr() + row * kernel.bytes, out, first, last);
    }
  });
  return y;
}

}  // namespace

const KvcAttendKernel *find_attend_kernel(uint64_t key) { return find_kernel(attend_kernels, key); }
const KvcLookupKernel *find_lookup_kernel(uint64_t key) { return find_kernel(lookup_kernels, key); }

STABLE_TORCH_LIBRARY(kvc_native, m) {
  m.def("load(str path, int variant) -> int");
  m.def("linears(Tensor x, Tensor[] weights, Tensor[]? biases, str kernel) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(kvc_native, CompositeExplicitAutograd, m) { m.impl("load", TORCH_BOX(&load)); }
STABLE_TORCH_LIBRARY_IMPL(kvc_native, CPU, m) { m.impl("linears", TORCH_BOX(&linears)); }
