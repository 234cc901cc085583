"""Ways to compute the same faster: one a file, each exporting SPEEDUP.

`why_not(device)` says where one can't be used, `needless(step, device)` which training has no use for it. What
really helps is not decided here: the planner measures it.
"""
