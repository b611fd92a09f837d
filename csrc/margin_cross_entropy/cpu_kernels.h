// Vector kernels of the rows kernel, compiled once per instruction set.
//
// Memory sees one read and one write per logit. A row's exponentials are taken from a guess of its peak, which a sample
// gives, into `scratch`; a second sweep writes its gradient from there. Where sums relative to the peak are needed
// (label smoothing, class probabilities) and where rows are cut, a block is swept twice in the first-level cache:
// maximum first, then exponentials.

#include "cpu_panels.h"
#include "cpu_rows.h"

namespace ltk {
namespace LTK_ISA {

#define LTK_TABLE(T, A)                                                                                \
  {forward_rows<T, A>,        sum_part<T, A>,      finish_cut_row<T, A>,      compute_gradients<T, A>, \
   write_part_gradient<T, A>, forward_panel<T, A>, write_class_gradient<T, A>}
const Tables<Kernels> margin_cross_entropy = LTK_TABLES;
#undef LTK_TABLE

}  // namespace LTK_ISA
}  // namespace ltk
