"""Up to how many items many plans run in one batch: the same items under every plan of a grid, each row steered by its own.

Token by token, a small batch costs nearly as much as a large one, and a search asks for the same few items again and
again: for answers of several tokens this pays up to `FEW` items, for answers of one token it does not
(benchmarks/search.py measures both). `eval.answering.live.LiveAnswerer` takes a plan for each row.
"""

FEW = 25
