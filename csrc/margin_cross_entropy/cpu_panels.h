// The rows kernel where a sample's positions are contiguous: it runs along them, a panel of positions at a time.
// Included by cpu_kernels.h, whose functions of one row it uses.

namespace ltk {
namespace LTK_ISA {
namespace {

// Adds the weights of the ordinary columns and their weighted sums, by positions. scratch: u, with the targets at -inf.
template <class A>
[[gnu::noinline]] void sum_panel_weighted(const Call<A>& call, int64_t n, int64_t begin, int64_t count,
                                          const RowSlots<A>* slots, const A* peak, A* scratch, double* weight,
                                          double* weighted) {
  constexpr int64_t W = Simd<A>::W;
  const A lowest = minus_infinity<A>();
  const int64_t padded = (count + kPadding - 1) / kPadding * kPadding;
  auto set_targets = [&](bool to_peak) {
    for (int64_t p = 0; p < count; ++p)
      for (int i = 0; i < slots[p].count; ++i)
        if (slots[p].slot[i].column >= 0) scratch[slots[p].slot[i].column * padded + p] = to_peak ? peak[p] : lowest;
  };
  const A share = call.smooth_share * (call.smoothing > A(0)), kept = A(1) - call.smoothing;
  set_targets(true);
  for (int64_t first = 0; first < call.classes; first += kTerms) {
    A weight_part[kPanel] = {}, weighted_part[kPanel] = {};
    for (int64_t c = first; c < call.classes && c < first + kTerms; ++c) {
      const A w = weight_of(call, c), s = smooth_weight_of(call, c);
      for (int64_t p = 0; p < padded; p += W) {
        Vec<A> each = splat(s);
        if (call.q)
          each = w * kept * get_some<A>(call.q + n * call.q_n + c * call.q_c + begin + p, count - p, A(0)) + share * s;
        Vec<A> product = each * (load(scratch + c * padded + p) - load(peak + p));
        if (call.masks) product = each == Vec<A>{} ? Vec<A>{} : product;
        store(weight_part + p, load(weight_part + p) + each);
        store(weighted_part + p, load(weighted_part + p) + product);
      }
    }
    for (int64_t p = 0; p < padded; ++p) weight[p] += weight_part[p], weighted[p] += weighted_part[p];
  }
  set_targets(false);
}

// Writes the gradient of a panel. scratch: exp(u - peak), 0 for the targets.
template <class T, class A>
[[gnu::noinline]] void write_panel_gradient(const Call<A>& call, int64_t n, int64_t begin, int64_t count,
                                            const RowGradient<A>* gradients, const A* scratch) {
  constexpr int64_t W = Simd<A>::W;
  const int64_t padded = (count + kPadding - 1) / kPadding * kPadding;
  A slope[kPanel], smooth[kPanel], soft[kPanel];
  for (int64_t p = 0; p < count; ++p)
    slope[p] = gradients[p].slope, smooth[p] = gradients[p].smooth, soft[p] = gradients[p].soft;
  for (int64_t p = count; p < padded; ++p) slope[p] = smooth[p] = soft[p] = 0;
  T* grad = static_cast<T*>(call.grad) + n * call.grad_n + begin;
  for (int64_t c = 0; c < call.classes; ++c) {
    const A a = scale_of(call, c), w = weight_of(call, c), s = smooth_weight_of(call, c);
    for (int64_t p = 0; p < padded && p < count; p += W) {
      Vec<A> less = load(smooth + p) * s;
      if (call.q)
        less =
            less + load(soft + p) * w * get_some<A>(call.q + n * call.q_n + c * call.q_c + begin + p, count - p, A(0));
      const Vec<A> du = load(slope + p) * load(scratch + c * padded + p) - less;
      put_some<A>(grad + c * call.grad_c + p, du * a, count - p);
    }
  }
  for (int64_t p = 0; p < count; ++p)
    for (int i = 0; i < 2; ++i) {
      const int64_t c = gradients[p].column[i];
      if (c >= 0) IO<T>::put(grad + c * call.grad_c + p, scale_of(call, c) * gradients[p].dc[i]);
    }
}

template <class T, class A>
void forward_panel(const Call<A>& call, int64_t n, int64_t begin, int64_t count, A* scratch) {
  constexpr int64_t W = Simd<A>::W;
  const A lowest = minus_infinity<A>();
  const int64_t padded = (count + kPadding - 1) / kPadding * kPadding;
  const T* x = static_cast<const T*>(call.x) + n * call.x_n + begin;
  const int64_t first_row = n * call.k + begin;
  A peak[kPanel], total[kPanel] = {};
  double weight[kPanel] = {}, weighted[kPanel] = {};
  Int<A> index[kPanel] = {};
  A best[kPanel];
  RowSlots<A> slots[kPanel];

  for (int64_t p = 0; p < padded; ++p) peak[p] = best[p] = lowest;
  for (int64_t c = 0; c < call.classes; ++c) {
    const A a = scale_of(call, c), bias = call.class_bias ? call.class_bias[c] : A(0);
    A* u = scratch + c * padded;
    for (int64_t p = 0; p < padded; p += W) {
      const Vec<A> logit = get_some<A>(x + c * call.x_c + p, count - p, A(0));
      const Vec<A> v = affine(logit, a, bias);
      store(u + p, v);
      store(peak + p, maximum<A>(v, load(peak + p)));
      if (call.prediction) {
        const Vec<A> held = load(best + p);
        const auto better = (logit > held) | ((logit != logit) & (held == held));
        store(best + p, better ? logit : held);
        store_index<A>(index + p, better ? typename Simd<A>::I{} + static_cast<Int<A>>(c) : load_index<A>(index + p));
      }
    }
  }

  bool again = false;
  for (int64_t p = 0; p < count; ++p) {
    slots[p] = load_slots(call, first_row + p, x + p, call.x_c);
    for (int i = 0; i < slots[p].count; ++i) {
      if (slots[p].slot[i].column < 0) continue;
      A& u = scratch[slots[p].slot[i].column * padded + p];
      again |= !(u < peak[p]);
      u = lowest;
    }
  }
  if (again) {
    for (int64_t p = 0; p < padded; ++p) peak[p] = lowest;
    for (int64_t c = 0; c < call.classes; ++c)
      for (int64_t p = 0; p < padded; p += W)
        store(peak + p, maximum<A>(load(scratch + c * padded + p), load(peak + p)));
  }
  for (int64_t p = 0; p < padded; ++p)
    if (peak[p] == lowest) peak[p] = 0;

  if (call.q || call.smoothing > A(0))
    sum_panel_weighted(call, n, begin, count, slots, peak, scratch, weight, weighted);

  for (int64_t first = 0; first < call.classes; first += kTerms) {
    A part[kPanel] = {};
    for (int64_t c = first; c < call.classes && c < first + kTerms; ++c)
      for (int64_t p = 0; p < padded; p += W) {
        const Vec<A> e = exp_vector(load(scratch + c * padded + p) - load(peak + p));
        store(scratch + c * padded + p, e);
        store(part + p, load(part + p) + e);
      }
    for (int64_t p = 0; p < padded; p += W) store(total + p, load(total + p) + load(part + p));
  }

  RowGradient<A> gradients[kPanel];
  for (int64_t p = 0; p < count; ++p) {
    const PartSums<A> s = {peak[p], total[p], weight[p], weighted[p], best[p], index[p]};
    gradients[p] = finish_row(call, slots[p], first_row + p, s);
  }
  if (call.grad) write_panel_gradient<T>(call, n, begin, count, gradients, scratch);
}

template <class T, class A>
void write_class_gradient(const Call<A>& call, const RowGradients<A>& rows, int64_t n, int64_t column, int64_t begin,
                          int64_t end, double* du_sum, double* dx_sum) {
  constexpr int64_t W = Simd<A>::W, kFlush = kTerms * W;
  using IVec = typename Simd<A>::I;
  const T* x = static_cast<const T*>(call.x) + n * call.x_n + column * call.x_c;
  T* grad = call.grad ? static_cast<T*>(call.grad) + n * call.grad_n + column * call.grad_c : nullptr;
  const A* q = call.q ? call.q + n * call.q_n + column * call.q_c : nullptr;
  A* grad_q = call.grad_q ? call.grad_q + n * call.grad_q_n + column * call.grad_q_c : nullptr;
  const A a = scale_of(call, column), bias = call.class_bias ? call.class_bias[column] : A(0),
          w = weight_of(call, column), s = smooth_weight_of(call, column);
  const IVec here = IVec{} + static_cast<Int<A>>(column);
  for (int64_t block = begin; block < end; block += kFlush) {
    Vec<A> du_total = {}, dx_total = {};
    const int64_t stop = block + kFlush < end ? block + kFlush : end;
    for (int64_t p = block; p < stop; p += W) {
      const int64_t count = stop - p;
      const Vec<A> logit = get_some<A>(x + p, count, A(0));
      const Vec<A> u = affine(logit, a, bias) - get_some<A>(rows.peak + p, count, A(0));
      Vec<A> less = get_some<A>(rows.smooth + p, count, A(0)) * s;
      const Vec<A> soft = get_some<A>(rows.soft + p, count, A(0));
      if (q) less = less + soft * w * get_some<A>(q + p, count, A(0));
      Vec<A> du = get_some<A>(rows.slope + p, count, A(0)) * exp_vector(u) - less;
      Vec<A> dc = du, dx = du * logit;
      for (int i = 0; i < 2; ++i) {
        IVec columns = IVec{} - Int<A>(1);
        if (count >= W) {
          columns = load_index<A>(rows.column[i] + p);
        } else {
          for (int64_t l = 0; l < count; ++l) columns[l] = rows.column[i][p + l];
        }
        du = columns == here ? get_some<A>(rows.du[i] + p, count, A(0)) : du;
        dc = columns == here ? get_some<A>(rows.dc[i] + p, count, A(0)) : dc;
        dx = columns == here ? Vec<A>{} : dx;
      }
      if (grad) put_some<A>(grad + p, dc * a, count);
      if (grad_q) {
        Vec<A> log_total = {};
        for (int64_t l = 0; l < W && l < count; ++l) log_total[l] = std::log(call.total[n * call.k + p + l]);
        put_some<A>(grad_q + p, soft * w * (log_total - u), count);
      }
      for (int64_t l = count; l < W; ++l) du[l] = dx[l] = 0;
      du_total = du_total + du;
      dx_total = dx_total + dx;
    }
    if (du_sum) *du_sum += sum_lanes<A>(du_total);
    if (dx_sum) *dx_sum += sum_lanes<A>(dx_total);
  }
}

}  // namespace
}  // namespace LTK_ISA
}  // namespace ltk
