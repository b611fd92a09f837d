"""What every kernel over rows of logits shares: the options of a row's loss, and the mathematics of its scalars.

One thing has one name in Python, in Triton and in C++:

| term | meaning | Python | Triton | C++ |
|---|---|---|---|---|
| row | one sample (and position) with its C logits | `[N, K]` | `row` | `row` |
| position | one of the K rows that share a sample (pixels) | `positions` | `positions` | `k` |
| options | everything but the logits that a row's loss depends on | `RowOptions` | `KernelOptions` | `RowOptions` |
| slot | one target of a row with its derived numbers | `Slot` | `Slot` | `Slot` |
| label | a class index as given, before it is known to be one | `target` | `Label` | `label` |
| share | the weight of a mixup target, lambda or 1 - lambda | `mix_lambda` | `share` | `share` |
| factor | `coefficient` times share: 0 if the row is ignored | `Slot.factor` | `Slot.factor` | `factor` |
| u | a shifted logit, scale * class_scale * x + class_bias | `u` | `u` | `u` |
| plain | u of a target, without its margin | `Slot.plain` | `Slot.plain` | `plain` |
| shifted | v: u of a target with its margin | `Slot.shifted` | `Slot.shifted` | `shifted` |
| phi | what the margin makes of the target's cosine | `Slot.phi` | `Slot.phi` | `phi` |
| rest | maximum and sum of the columns that are no target | `rest` | `rest_ptr` | `Rest` |
| peak | the maximum that exponentials are relative to | `rest[0]` | `peak` | `peak` |
| mass | the sum of exp(u - peak) | `rest[1]` | `mass` | `mass` |
| total | log-sum-exp of a slot's loss, minus the peak | `total` | `total` | `total` |
| slope | the factor of exp(u - peak) in a column's gradient | `Slopes.slope` | `Slopes.slope` | `slope` |
| smooth | the factor of the class weight in a column's gradient | `Slopes.smooth` | `Slopes.smooth` | `smooth` |
| soft | targets are class probabilities | `soft` | `soft` | `soft` |
| group | 16 aligned bytes of a row | - | `GROUP` | `group` |
| body, edge | a row's whole groups; the columns beside them | - | `body_*`, `edge_*` | `body`, `edge` |
| lane | one thread's column of a tile | - | `LANES` | `lane` |
| tile | what one program holds of a row or of a product | `Launch` | `BLOCK_*` | `tile` |
| part | one of the pieces of a row that has several programs | `parts` | `parts` | `parts` |
| panel | neighbouring positions that one block works on | - | `BLOCK_K` | `panel` |
| ready | a gradient that forward computed beside the loss | `ReadyGradient` | `grad_ptr` | `grad` |
"""
