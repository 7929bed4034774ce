"""Probes on frozen features, the groups of long-tail results, failure signatures and the report of a run.

Meant to be imported where evaluation happens, never by `import ltood_fast`: scikit-learn and matplotlib come with the
``[train]`` extra. The way through: features -> `evaluate.evaluate_features` -> `results.RunResults` ->
`report.write_report` (which asks `signatures` and `plots`); `runs` reads the reports of many runs into one table.
"""
