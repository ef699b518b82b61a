"""Skipping rules: which tokens make far reads, and what is added for the others.

`learned` holds the rule that consolidation learns, `baselines` the rules that it is compared with: window only, readers
at random, whole layers, whole heads, the true error. To add a rule, subclass `patch.FarReads` in a file here; to
compare it, add an entry to `compare.methods.Comparison.entries`.
"""
