"""What the probes and toggles compute: the algorithms of one paper each, as pure functions, and their results.

A probe collects, a method computes, a result holds. Nothing here adds a hook or changes a model.
"""
