"""Ways to compute the same faster: one per file, each exporting SPEEDUP.

`why_not(device)` returns why a device can't use it, `needless(step, device)` why a training has no use for it. Whether
it helps is not decided here: the planner measures it.
"""
