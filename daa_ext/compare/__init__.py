"""Comparing methods: one experiment file, many training runs, one table (`daa compare`).

Scoring (`scoring`, `likelihood`, `score`, `harness`) runs in a process of its own for each model;
see docs/scoring.md.
"""
