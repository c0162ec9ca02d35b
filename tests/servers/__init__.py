"""Real servers, services as processes, and what tests, demo and benchmarks read from them.

Import from the modules; this file imports nothing, so that `servers.packages` works before
anything outside the standard library is installed.
"""
