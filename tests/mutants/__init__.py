"""Deliberate faults in the library, each of which the suite must find: it proves the suite.

``python -m mutants`` puts each into a copy of its own and lets the suite judge that copy.
"""
