// Plain calls of supervised_contrastive (see common/plain.h) and their place in autograd: similarities that fit one
// block, a temperature that is a number, no class that is ignored, no bias that learns.
#include "../common/plain.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../common/cpu/memory.h"
#include "../common/plain_functions.h"
#include "../margin_cross_entropy/means.h"
#include "cpu_block.h"
#include "statistics.h"

namespace ltk {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kBlockBytes = int64_t(8) << 20;  // plan.py: more similarities are worked on block by block

enum Reduction { kNone, kMean, kSum, kMeanPositives };

struct PlainPairs {
  Tensor query, key;  // the same tensor for a batch against itself
  Tensor query_label, key_label;
  OptionalTensor exclude, key_bias;
  int64_t begin, end;  // of the keys that receive a gradient
  double scale;
  bool inside;  // the mean over positives is taken inside of the logarithm
  Reduction reduction;

  bool is_one() const { return key.is_same(query) && begin == 0 && end == key.size(0); }
  bool key_needs() const { return !is_one() && key.requires_grad(); }
  bool needs() const { return query.requires_grad() || key_needs(); }
};

// Labels as the kernels compare them; nothing where one is beyond int32.
OptionalTensor read_labels(PlainReader& read, PyObject* given, int64_t size) {
  const OptionalTensor labels = read.indices(given, {size});
  if (!read.plain || !labels.has_value()) return std::nullopt;
  const int64_t* first = labels->const_data_ptr<int64_t>();
  const Tensor narrow = at::empty({size}, labels->options().dtype(at::kInt));
  int32_t* out = narrow.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < size; ++i) {
    out[i] = static_cast<int32_t>(first[i]);
    read.expect(out[i] == first[i]);
  }
  return narrow;
}

OptionalTensor read_exclude(PlainReader& read, PyObject* given, int64_t rows, int64_t keys) {
  if (given == Py_None) return std::nullopt;
  const Tensor narrow = at::empty({rows}, at::TensorOptions().dtype(at::kInt));
  int32_t* out = narrow.mutable_data_ptr<int32_t>();
  if (PyUnicode_CheckExact(given)) {
    read.expect(PyUnicode_CompareWithASCIIString(given, "self") == 0 && keys >= rows);
    for (int64_t i = 0; i < rows; ++i) out[i] = static_cast<int32_t>(i);
    return narrow;
  }
  const OptionalTensor index = read.indices(given, {rows});
  if (!read.plain) return std::nullopt;
  const int64_t* first = index->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    read.expect(first[i] >= -1 && first[i] < keys);
    out[i] = static_cast<int32_t>(first[i]);
  }
  return narrow;
}

void read_learning(PlainReader& read, PlainPairs& call, int64_t keys) {
  PyObject* given = read.next();
  call.begin = 0, call.end = keys;
  if (given == Py_None) return;
  read.expect(PyTuple_CheckExact(given) && PyTuple_GET_SIZE(given) == 2);
  if (!read.plain) return;
  call.begin = read.integer(PyTuple_GET_ITEM(given, 0));
  call.end = read.integer(PyTuple_GET_ITEM(given, 1));
  read.expect(0 <= call.begin && call.begin <= call.end && call.end <= keys);
}

PlainPairs read_pairs(PlainReader& read) {
  PlainPairs call = {};
  call.query = read.floating();
  call.key = read.floating();
  PyObject *query_label = read.next(), *key_label = read.next();
  if (!read.plain || call.query.dim() != 2 || call.key.dim() != 2) {
    read.plain = false;
    return call;
  }
  const int64_t rows = call.query.size(0), keys = call.key.size(0), width = call.query.size(1);
  const at::ScalarType dtype = call.query.scalar_type();
  read.expect(rows > 0 && keys > 0 && width > 0 && call.key.size(1) == width && call.key.scalar_type() == dtype);
  const int64_t bytes = rows * keys * static_cast<int64_t>(call.query.element_size());
  read.expect(bytes <= kBlockBytes && !at::autocast::is_autocast_enabled(at::kCPU));
  const bool shared = key_label == Py_None || key_label == query_label;
  read.expect(!shared || rows == keys);
  if (!read.plain) return call;
  call.query_label = read_labels(read, query_label, rows).value_or(Tensor());
  call.key_label = shared ? call.query_label : read_labels(read, key_label, keys).value_or(Tensor());
  read.expect(call.query_label.defined() && call.key_label.defined());
  const double temperature = read.number();
  read.expect(temperature > 0);
  call.scale = 1.0 / temperature;
  call.inside = read.choice({"out", "in"}) == 1;
  call.key_bias = read.vector(keys, dtype == at::kDouble ? at::kDouble : at::kFloat);
  read.expect(!call.key_bias.has_value() || !call.key_bias->requires_grad());
  call.exclude = read_exclude(read, read.next(), rows, keys);
  read_learning(read, call, keys);
  read.flag();                          // normalized: of no use here
  read.expect(read.next() == Py_None);  // ignore_index
  call.reduction = static_cast<Reduction>(read.choice({"none", "mean", "sum", "mean_positives"}));
  read.choice({"nan", "zero"});  // there are rows
  read.expect(read.integer() >= bytes);
  return call;
}

// The log-sum-exps of a row's negatives and positives, of both, and what it is worth.
struct Row {
  double peak[2], mass[2], sum, positives, total;

  template <class A>
  Row(const A* s, int64_t row, int64_t rows)
      : peak{s[kNegPeak * rows + row], s[kPosPeak * rows + row]},
        mass{s[kNegMass * rows + row], s[kPosMass * rows + row]},
        sum(s[kPosSum * rows + row]),
        positives(s[kNumPos * rows + row]) {
    const double neg = side(0), pos = side(1), high = std::max(neg, pos);
    // maxima pass over NaN; an infinite one is the sum
    total = std::isnan(neg) || std::isnan(pos) ? neg + pos
            : std::isinf(high)                 ? high
                                               : high + std::log(std::exp(neg - high) + std::exp(pos - high));
  }

  double side(int i) const {
    return mass[i] == 0 ? -std::numeric_limits<double>::infinity() : peak[i] + std::log(mass[i]);
  }
  double loss(const PlainPairs& call) const {
    if (!(positives > 0)) return 0;
    return total + (call.inside ? std::log(positives) - side(1) : -call.scale * sum / positives);
  }
};

// Each row's share of the result.
template <class A>
double share_of(const PlainPairs& call, const A* statistics, int64_t rows) {
  if (call.reduction == kMean) return 1.0 / static_cast<double>(rows);
  if (call.reduction != kMeanPositives) return 1;
  int64_t some = 0;
  for (int64_t row = 0; row < rows; ++row) some += statistics[kNumPos * rows + row] > 0;
  return 1.0 / static_cast<double>(std::max<int64_t>(some, 1));
}

Block block_of(const PlainPairs& call, const Tensor& z) {
  return {z, call.query_label, call.key_label, call.exclude, 0, call.key_bias, std::nullopt, std::nullopt, call.scale};
}

struct PlainResult {
  Tensor loss, statistics, z;
};

template <class A>
PlainResult forward_pairs(const PlainPairs& call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor query = call.query.contiguous(), key = call.key.contiguous();
  Tensor z = MemoryPool::empty({query.size(0), key.size(0)}, query.scalar_type());
  at::mm_out(z, query, key.t());
  const Tensor statistics = run_statistics(block_of(call, z), false);
  const int64_t rows = query.size(0);
  const A* s = statistics.template const_data_ptr<A>();
  const double share = share_of(call, s, rows);
  Tensor losses = at::empty({rows}, statistics.options());
  A* out = losses.template mutable_data_ptr<A>();
  for (int64_t row = 0; row < rows; ++row) out[row] = static_cast<A>(Row(s, row, rows).loss(call));
  if (call.reduction != kNone) {
    const double total = ordered_sum<double>(out, rows);
    losses = at::empty({}, statistics.options());
    *losses.template mutable_data_ptr<A>() = static_cast<A>(share * total);
  }
  return {losses, statistics, z};
}

// Returns d loss / d (neg, pos, pos_sum), [3, N], for the upstream gradient.
template <class A>
Tensor upstream_of(const PlainPairs& call, const Tensor& statistics, const Tensor& grad_loss) {
  const int64_t rows = statistics.size(1);
  const A* s = statistics.const_data_ptr<A>();
  const Tensor given = grad_loss.to(dtype_of<A>()).contiguous();
  const A* upstream = given.const_data_ptr<A>();
  const double share = share_of(call, s, rows);
  const Tensor result = at::zeros({3, rows}, statistics.options());
  A* out = result.mutable_data_ptr<A>();
  for (int64_t i = 0; i < rows; ++i) {
    const Row row(s, i, rows);
    if (!(row.positives > 0)) continue;
    const double factor = share * static_cast<double>(upstream[given.dim() == 0 ? 0 : i]);
    const double negative = factor * std::exp(row.side(0) - row.total);
    out[i] = static_cast<A>(negative);
    out[rows + i] = static_cast<A>(call.inside ? -negative : factor * std::exp(row.side(1) - row.total));
    if (!call.inside) out[2 * rows + i] = static_cast<A>(-factor / row.positives);
  }
  return result;
}

// dz += dz^T, in tiles that stay in the first-level cache.
template <class A>
void add_transposed(A* dz, int64_t n) {
  constexpr int64_t kTile = 32;
  for (int64_t rows = 0; rows < n; rows += kTile)
    for (int64_t columns = rows; columns < n; columns += kTile)
      for (int64_t i = rows; i < std::min(n, rows + kTile); ++i)
        for (int64_t j = std::max(columns, i); j < std::min(n, columns + kTile); ++j)
          dz[i * n + j] = dz[j * n + i] = dz[i * n + j] + dz[j * n + i];
}

template <class A>
std::array<Tensor, 2> backward_pairs(const PlainPairs& call, const Tensor& statistics, const Tensor& z,
                                     const Tensor& grad_loss) {
  const Tensor upstream = upstream_of<A>(call, statistics, grad_loss);
  const int64_t rows = statistics.size(1);
  const Tensor terms = at::empty({5, rows}, statistics.options());
  A* out = terms.mutable_data_ptr<A>();
  const A *s = statistics.const_data_ptr<A>(), *g = upstream.const_data_ptr<A>();
  for (int64_t i = 0; i < rows; ++i) {
    for (int side = 0; side < 2; ++side) {
      const A mass = s[(side ? kPosMass : kNegMass) * rows + i];
      out[2 * side * rows + i] = s[(side ? kPosPeak : kNegPeak) * rows + i];
      out[(2 * side + 1) * rows + i] = mass == 0 ? A(0) : g[side * rows + i] / mass;
    }
    out[4 * rows + i] = g[2 * rows + i];
  }
  Tensor dz = MemoryPool::empty(z.sizes(), z.scalar_type());
  run_gradient(block_of(call, z), terms, c10::List<bool>({true, false, false}), dz);
  const Tensor query = call.query.contiguous(), key = call.key.contiguous();
  if (call.is_one()) {  // both gradients are the queries': one product of both
    if (z.scalar_type() == dtype_of<A>()) {
      add_transposed(dz.mutable_data_ptr<A>(), rows);
    } else {
      dz = at::add(dz, dz.t());
    }
    return {at::mm(dz, query), Tensor()};
  }
  std::array<Tensor, 2> results;
  if (call.query.requires_grad()) results[0] = at::mm(dz, key);
  if (call.key_needs()) {
    Tensor of_some = at::mm(dz.narrow(1, call.begin, call.end - call.begin).t(), query);
    results[1] = of_some;
    if (call.end - call.begin < key.size(0)) {
      results[1] = at::zeros(key.sizes(), key.options());
      results[1].narrow(0, call.begin, call.end - call.begin).copy_(of_some);
    }
  }
  return results;
}

// The same through the dispatcher, for autograd, modes and whatever else is to see the operator.
std::array<Tensor, 2> watched_backward(const PlainPairs& call, const Tensor& statistics, const Tensor& z,
                                       const Tensor& upstream) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lt_kernels::partitioned_logsumexp_bwd", "");
  const auto none = c10::IValue();
  const c10::List<bool> needs({call.query.requires_grad(), call.key_needs(), false, false, false});
  const Tensor rest = statistics.narrow(0, 0, 4), slopes = at::empty({0}, statistics.options());
  torch::jit::Stack stack = {upstream[0], upstream[1], upstream[2], none, rest, slopes, z, call.query.contiguous()};
  stack.emplace_back(call.is_one() ? none : c10::IValue(call.key.contiguous()));
  for (const Tensor& labels : {call.query_label, call.key_label}) stack.emplace_back(labels);
  for (const OptionalTensor& each : {call.exclude, call.key_bias}) stack.emplace_back(each);
  stack.insert(stack.end(), {none, none, call.scale, call.begin, call.end, false, none, false, "materialize",
                             kBlockBytes, needs, "native"});
  op.callBoxed(stack);
  const std::vector<Tensor> gradients = stack.back().toTensorVector();
  return {needs.get(0) ? gradients[0] : Tensor(), needs.get(1) ? gradients[1] : Tensor()};
}

// Returns the saved tensors; says what to do if one was written since.
variable_list unpack(AutogradContext* ctx) {
  try {
    return ctx->get_saved_variables();
  } catch (const std::exception& error) {
    if (std::string_view(error.what()).find("modified by an inplace operation") == std::string_view::npos) throw;
    TORCH_CHECK(false,
                "partitioned_logsumexp: got an input that was written in place before backward, as an enqueue writes a "
                "queue's features, expected the same values. Enqueue before the loss or after its backward, or give "
                "the loss queue.snapshot()");
  }
}

enum Saved { kQuery, kKey, kStatisticsOfRows, kProducts, kQueryLabel, kKeyLabel, kExclude, kKeyBias };

struct SupervisedContrastiveBackward : torch::autograd::Function<SupervisedContrastiveBackward> {
  // No key where it is the query: an input given twice, with one gradient, is more than compiled autograd can add up.
  static Tensor forward(AutogradContext* ctx, const Tensor& query, const OptionalTensor& key, const PlainPairs& call) {
    const bool is_double = query.scalar_type() == at::kDouble;
    const PlainResult result = is_double ? forward_pairs<double>(call) : forward_pairs<float>(call);
    ctx->save_for_backward({query, key.value_or(Tensor()), result.statistics, result.z, call.query_label,
                            call.key_label, call.exclude.value_or(Tensor()), call.key_bias.value_or(Tensor())});
    ctx->set_materialize_grads(false);
    ctx->saved_data["scale"] = call.scale;
    ctx->saved_data["options"] = std::vector<int64_t>{call.begin, call.end, call.inside, call.reduction};
    return result.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(3);
    const Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) return results;
    refuse_batched(grad_loss, "partitioned_logsumexp");
    const variable_list saved = unpack(ctx);
    const auto optional = [&](Saved i) { return saved[i].defined() ? OptionalTensor(saved[i]) : std::nullopt; };
    PlainPairs call = {saved[kQuery],    saved[kKey],        saved[kQueryLabel],
                       saved[kKeyLabel], optional(kExclude), optional(kKeyBias)};
    const std::vector<int64_t> options = ctx->saved_data["options"].toIntVector();
    call.scale = ctx->saved_data["scale"].toDouble();
    call.begin = options[0], call.end = options[1], call.inside = options[2] != 0;
    call.reduction = static_cast<Reduction>(options[3]);
    if (!call.key.defined()) call.key = call.query;
    const Tensor &statistics = saved[kStatisticsOfRows], &z = saved[kProducts];
    const bool is_double = statistics.scalar_type() == at::kDouble;
    std::array<Tensor, 2> gradients;
    if (!c10::GradMode::is_enabled() && is_plain(grad_loss) && is_undisturbed()) {
      const c10::impl::ExcludeDispatchKeyGuard exact(c10::autocast_dispatch_keyset);  // products in the vectors' dtype
      const auto run = is_double ? backward_pairs<double> : backward_pairs<float>;
      gradients = run(call, statistics, z, grad_loss);
    } else {
      // a copy, as it may have no memory (zeros of autograd) or be a lazy negation
      const Tensor given = at::empty(grad_loss.sizes(), statistics.options()).copy_(grad_loss.detach());
      const Tensor upstream =
          is_double ? upstream_of<double>(call, statistics, given) : upstream_of<float>(call, statistics, given);
      gradients = watched_backward(call, statistics, z, upstream);
    }
    results[0] = gradients[0], results[1] = gradients[1];
    return results;
  }
};

}  // namespace

// Returns the loss of a plain call, or None.
PyObject* plain_supervised_contrastive(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PlainReader read(arguments, count);
  if (!read.plain) Py_RETURN_NONE;
  const PlainPairs call = read_pairs(read);
  if (!read.plain) Py_RETURN_NONE;
  Tensor loss;
  {
    pybind11::gil_scoped_release released;
    RECORD_FUNCTION("lt_kernels::supervised_contrastive", c10::ArrayRef<const c10::IValue>());
    if (c10::GradMode::is_enabled() && call.needs()) {
      const OptionalTensor key = call.is_one() ? std::nullopt : OptionalTensor(call.key);
      loss = SupervisedContrastiveBackward::apply(call.query, key, call);
    } else {
      const bool is_double = call.query.scalar_type() == at::kDouble;
      loss = (is_double ? forward_pairs<double>(call) : forward_pairs<float>(call)).loss;
    }
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

}  // namespace ltk
