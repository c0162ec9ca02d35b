"""What the library costs and what it gives, measured against its references in the same run.

`python -m benchmarks`, from the repository's root with `tests` on the path, runs one of the
commands bench, check, growth and steady. All but check keep their figures as JSON in `results/`,
which `tables` and `pictures` render.
"""
