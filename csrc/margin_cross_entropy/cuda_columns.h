// How a row is cut up and where its logits are kept; sums and gradients over its columns.
#pragma once

#include <type_traits>

#include "cuda_terms.h"

namespace ltk::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------ rows: geometry

template <class T>
struct View {  // one row in memory
  using A = typename T::A;
  const typename T::Stored* x;
  typename T::Stored* grad;
  int64_t q, grad_q;  // offsets
  int head, groups;   // columns before the first aligned group; whole groups after them
  int column[2];      // of the targets, -1: none
  int skip[2];        // the groups of these columns, -1: none; never the same
  bool grad_aligned;  // the gradient's groups are aligned where the logits' are

  LTK_MEMBER View(const Call<A>& call, int64_t row) {
    const int64_t n = divide(row, call.k), k = row - n * call.k;
    x = static_cast<const typename T::Stored*>(call.x) + (n * call.x_n + k * call.x_k);
    grad = static_cast<typename T::Stored*>(call.grad) + (n * call.grad_n + k * call.grad_k);
    q = n * call.q_n + k * call.q_k;
    grad_q = n * call.grad_q_n + k * call.grad_q_k;
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(*x) % T::kGroup);
    head = past == 0 ? 0 : T::kGroup - past;
    if (head > call.classes) head = call.classes;
    groups = (call.classes - head) / T::kGroup;
    grad_aligned = (reinterpret_cast<uintptr_t>(grad) - reinterpret_cast<uintptr_t>(x)) % sizeof(Group) == 0;
  }

  LTK_MEMBER void find_targets(const Call<A>& call, int64_t row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bool bad = false;
      column[i] = find_column(call, row, i, &bad);
      const int body = column[i] - head;
      skip[i] = column[i] >= 0 && body >= 0 && body / T::kGroup < groups ? body / T::kGroup : -1;
    }
    if (skip[1] == skip[0]) skip[1] = -1;
  }

  LTK_MEMBER const Group* body() const { return reinterpret_cast<const Group*>(x + head); }
  LTK_MEMBER int first_column(int group) const { return head + group * T::kGroup; }
  LTK_MEMBER bool in_body(int group) const { return group != skip[0] && group != skip[1]; }

  // Returns a lane's column of the edge, -1: none.
  LTK_MEMBER int edge_column(int lane, int classes) const {
    const int part = lane / T::kGroup, i = lane % T::kGroup, tail = first_column(groups);
    if (part == 0) return i < head ? i : -1;
    if (part == 1) return tail + i < classes ? tail + i : -1;
    const int group = part == 2 ? skip[0] : part == 3 ? skip[1] : -1;
    return group >= 0 ? first_column(group) + i : -1;
  }
  LTK_MEMBER bool is_target(int c) const { return c == column[0] || c == column[1]; }
};

// A block's groups [first, last) of a row. Thread t has every kThreads-th of them from first + t on.
template <class T, int kThreads>
struct Part {
  View<T> view;
  int thread, first, last;

  LTK_MEMBER void take_part(int index, int of) {
    const int share = (view.groups + of - 1) / of;
    first = index * share;
    last = first + share < view.groups ? first + share : view.groups;
  }
};

// A part's groups between the passes over a row. each(f) calls f(group, its 16 bytes) for this thread's groups except
// the edge's.
template <class T, int kThreads, int kGroups>
struct InRegisters : Part<T, kThreads> {
  Group raw[kGroups];

  LTK_MEMBER InRegisters(const View<T>& view, int thread) : Part<T, kThreads>{view, thread, 0, 0} {}
  LTK_MEMBER void load() {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = this->first + i * kThreads + this->thread;
      if (group < this->last) raw[i] = this->view.body()[group];
    }
  }
  template <class F>
  LTK_MEMBER void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = this->first + i * kThreads + this->thread;
      if (group < this->last && this->view.in_body(group)) f(group, raw[i]);
    }
  }
};

template <class T, int kThreads>
struct InSharedMemory : Part<T, kThreads> {
  Group* buffer;  // each thread copies what it will read itself

  LTK_MEMBER InSharedMemory(const View<T>& view, int thread) : Part<T, kThreads>{view, thread, 0, 0} {}
  LTK_MEMBER void load() {
    for (int group = this->first + this->thread; group < this->last; group += kThreads)
      copy_async(buffer + (group - this->first), this->view.body() + group);
  }
  template <class F>
  LTK_MEMBER void each(const F& f) const {
#pragma unroll 2
    for (int group = this->first + this->thread; group < this->last; group += kThreads)
      if (this->view.in_body(group)) f(group, buffer[group - this->first]);
  }
};

template <class T, int kThreads>
struct InGlobalMemory : Part<T, kThreads> {
  static constexpr int kAhead = 4;

  LTK_MEMBER InGlobalMemory(const View<T>& view, int thread) : Part<T, kThreads>{view, thread, 0, 0} {}
  template <class F>
  LTK_MEMBER void each(const F& f) const {
    for (int begin = this->first + this->thread; begin < this->last; begin += kAhead * kThreads) {
      Group raw[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (begin + i * kThreads < this->last) raw[i] = this->view.body()[begin + i * kThreads];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int group = begin + i * kThreads;
        if (group < this->last && this->view.in_body(group)) f(group, raw[i]);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------- rows: the work on columns

// The inputs of a row's columns: logits only; class_bias too; or any, decided at run time.
enum Kind { kPlain, kBiased, kAnything };

// Calls f with the kind of this call as a constant.
template <bool kGeneral, class A, class F>
LTK_DEVICE void with_kind(const Call<A>& call, const F& f) {
  if constexpr (kGeneral) {
    f(std::integral_constant<Kind, kAnything>{});
  } else if (call.class_bias) {
    f(std::integral_constant<Kind, kBiased>{});
  } else {
    f(std::integral_constant<Kind, kPlain>{});
  }
}

// Class vectors at kCount columns from `column` on.
template <Kind kKind, int kCount, class A>
struct Columns {
  A a[kCount], b[kCount];  // u = a x + b

  LTK_MEMBER Columns(const Call<A>& call, int column, A scale) {
    if (kKind == kAnything && call.class_scale) {
      load_values<kCount>(call.class_scale + column, a);
#pragma unroll
      for (int i = 0; i < kCount; ++i) a[i] *= scale;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) a[i] = scale;
    }
    if (kKind == kBiased || (kKind == kAnything && call.class_bias)) {
      load_values<kCount>(call.class_bias + column, b);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) b[i] = A(0);
    }
  }
};

template <int kCount, class A>
LTK_DEVICE void load_weights(const Call<A>& call, int column, Weights<A> (&w)[kCount]) {
  A own[kCount], smooth[kCount];
  if (call.smooth_weight) load_values<kCount>(call.smooth_weight + column, smooth);
  if (call.q && call.weight) load_values<kCount>(call.weight + column, own);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    w[i] = {call.q && call.weight ? own[i] : A(1), call.smooth_weight ? smooth[i] : A(1)};
}

template <int kCount, class A>
LTK_DEVICE void load_probabilities(const Call<A>& call, int64_t offset, A (&q)[kCount]) {
  constexpr bool kSame = sizeof(A) == 8;
  if (call.q_dtype == (kSame ? kDouble : kFloat)) {
    load_values<kCount>(static_cast<const A*>(call.q) + offset, q);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) q[i] = load_probability(call, offset + i);
  }
}

// Adds kCount ordinary columns from `column` on to the sums.
template <Kind kKind, int kCount, class A>
LTK_DEVICE void add_columns(const Call<A>& call, Sums<A>& s, int64_t q_offset, int column, A scale,
                            const A (&x)[kCount]) {
  const Columns<kKind, kCount, A> columns(call, column, scale);
  A u[kCount], w[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) u[i] = shift_logit(x[i], columns.a[i], columns.b[i]);
  if (kKind == kAnything && (call.q || call.smoothing > A(0))) {
    Weights<A> each[kCount];
    A q[kCount] = {};
    load_weights<kCount>(call, column, each);
    if (call.q) load_probabilities<kCount>(call, q_offset + column, q);
#pragma unroll
    for (int i = 0; i < kCount; ++i) w[i] = call.q ? soft_weight(call, q[i], each[i]) : each[i].smooth;
    add<true>(s, u, w, call.masks);
  } else {
    add<false>(s, u, w, false);
  }
}

// A lane's column of a row's edge, and its logit.
template <class A>
struct Edge {
  int column;  // -1: none
  A x;
};

template <class T>
LTK_DEVICE Edge<typename T::A> load_edge(const View<T>& view, int lane, int classes) {
  const int column = view.edge_column(lane, classes);
  return {column, column >= 0 ? T::get(view.x[column]) : typename T::A(0)};
}

// Returns the sums over this block's part of a row and this lane's column of the edge.
template <bool kGeneral, class T, class Source, class A>
LTK_DEVICE Sums<A> sum_row(const Call<A>& call, const Source& source, const Edge<A>& edge, A scale) {
  const View<T>& view = source.view;
  Sums<A> s = empty_sums<A>();
  with_kind<kGeneral>(call, [&](auto kind) {
    source.each([&](int group, const Group& raw) {
      const int column = view.first_column(group);
      A x[T::kGroup];
#pragma unroll
      for (int i = 0; i < T::kGroup; ++i) x[i] = T::at(raw, i);
      add_columns<decltype(kind)::value>(call, s, view.q, column, scale, x);
      if (kGeneral && call.prediction) {
#pragma unroll
        for (int i = 0; i < T::kGroup; ++i) take_better(s, x[i], column + i);
      }
    });
  });
  if (edge.column >= 0) {
    const A x[1] = {edge.x};
    if (!view.is_target(edge.column)) add_columns<kAnything>(call, s, view.q, edge.column, scale, x);
    if (kGeneral && call.prediction) take_better(s, edge.x, edge.column);
  }
  return s;
}

template <class A>
struct Slopes {  // the fields of a row's record that every column needs
  A peak, slope, smooth, soft, log_total;
};

// Computes the logits' gradients dx of kCount ordinary columns, and writes the probabilities' gradients.
template <Kind kKind, int kCount, class A>
LTK_DEVICE void differentiate_columns(const Call<A>& call, const Slopes<A>& g, int64_t q_offset, int64_t grad_q_offset,
                                      int column, A scale, const A (&x)[kCount], A (&dx)[kCount]) {
  const Columns<kKind, kCount, A> columns(call, column, scale);
  const A scaled_slope = g.slope * scale;
  A u[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    u[i] = shift_logit(x[i], columns.a[i], columns.b[i]) - g.peak;
    dx[i] = (kKind == kAnything ? g.slope : scaled_slope) * fast_exp(u[i]);
  }
  if constexpr (kKind != kAnything) return;
  if (call.q || g.smooth != A(0)) {
    A q[kCount] = {};
    Weights<A> w[kCount];
    load_weights<kCount>(call, column, w);
    if (call.q) load_probabilities<kCount>(call, q_offset + column, q);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      dx[i] -= subtracted(call, g.smooth, g.soft, w[i], q[i]);
      if (call.grad_q)
        store_probability_gradient(call, grad_q_offset + column + i,
                                   differentiate_probability(call, g.soft, w[i].own, g.log_total - u[i]));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) dx[i] *= columns.a[i];
}

// Writes the gradients of this block's part of a row and of this lane's column of the edge.
template <bool kGeneral, class T, class Source, class A>
LTK_DEVICE void write_gradient(const Call<A>& call, const Source& source, const Edge<A>& edge, A scale,
                               const Slopes<A>& g, const int (&target)[2], const A (&dc)[2]) {
  const View<T>& view = source.view;
  with_kind<kGeneral>(call, [&](auto kind) {
    source.each([&](int group, const Group& raw) {
      const int column = view.first_column(group);
      A x[T::kGroup], dx[T::kGroup];
#pragma unroll
      for (int i = 0; i < T::kGroup; ++i) x[i] = T::at(raw, i);
      differentiate_columns<decltype(kind)::value>(call, g, view.q, view.grad_q, column, scale, x, dx);
      if (kGeneral && call.grad == nullptr) return;
      if (view.grad_aligned) {
        *reinterpret_cast<Group*>(view.grad + column) = T::pack(dx);
      } else {
#pragma unroll
        for (int i = 0; i < T::kGroup; ++i) view.grad[column + i] = T::put(dx[i]);
      }
    });
  });
  if (edge.column >= 0) {
    const A x[1] = {edge.x};
    A dx[1];
    differentiate_columns<kAnything>(call, g, view.q, view.grad_q, edge.column, scale, x, dx);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (edge.column == target[i]) dx[0] = scale * load_class_scale(call, edge.column) * dc[i];
    if (!kGeneral || call.grad != nullptr) view.grad[edge.column] = T::put(dx[0]);
  }
}

}  // namespace
}  // namespace ltk::cuda
